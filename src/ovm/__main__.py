"""The program ``ovm``, also as ``python -m ovm``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run ``ovm``. Ctrl-C during the import ends it without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ovm.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
