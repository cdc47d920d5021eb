"""``python -m ovm.service NAME``."""

import sys

from ovm.service.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
