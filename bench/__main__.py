"""``python -m bench``: measure, print, and judge."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
from pathlib import Path

from bench import comparison, goals, picture, plan, report
from bench.result import Result
from bench.setting import FULL, SMOKE
from ovm.errors import OVMError
from ovm.registry import images as registry

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
INTERRUPTED = 130


def main() -> int:
    """Do as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure ovm side by side with its opponents.")
    parser.add_argument("--runs", type=int, help=f"of each start and each disk, instead of {FULL.runs}")
    parser.add_argument("--smoke", action="store_true", help="try the harness: each thing once, and small")
    parser.add_argument("--image", type=Path, default=registry.default_image_dir(registry.host_arch()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it there")
    parser.add_argument("--base", type=Path, metavar="FILE", help="a result of --json to compare with")
    parser.add_argument("--only", type=Path, metavar="FILE", help="measure nothing: report this result of --json")
    given = parser.parse_args()
    if given.runs is not None and given.runs < 1:
        parser.error("--runs has to be 1 or more")
    try:
        base = given.base and Result.load(given.base)
        result = Result.load(given.only) if given.only else asyncio.run(_measure(given))
    except (OVMError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ninterrupted; nothing is left", file=sys.stderr)
        return INTERRUPTED
    print(report.report(result))
    if base:
        print(f"\n{comparison.compare(base, result)}")
    print(f"\n{report.summary(result)}")
    if given.json:
        result.save(given.json)
    if given.svg:
        given.svg.write_text(picture.svg(result), "utf-8")
    return status(result)


def status(result: Result) -> int:
    """1 if a goal was missed by more than its margin; a smoke run judges none."""
    return int(not result.smoke and bool(goals.missed(result.rows)))


async def _measure(given: argparse.Namespace) -> Result:
    scale = SMOKE if given.smoke else FULL
    if given.runs is not None:
        scale = dataclasses.replace(scale, runs=given.runs)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # as Ctrl-C does it
    line = _Line()
    try:
        return await plan.carry_out(given.image.absolute(), CACHE, scale, line.tell, smoke=given.smoke)
    finally:
        line.clear()


class _Line:
    """What is being done: one line of a terminal, or a line each."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def tell(self, text: str) -> None:
        print(f"\r\033[K{text} …" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
