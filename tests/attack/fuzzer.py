"""``fuzzer.py PARSER [LIBFUZZER_OPTIONS…] SEEDS``: feed one parser what atheris makes up, until it fails."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["ovm", "tomllib"]):
    import parsers


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda content: parsers.try_out(name, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
