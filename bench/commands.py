"""Commands that people wait for, each a process of its own, from its spawn to its end."""

from __future__ import annotations

import os

from bench import programs
from bench.samples import Measure, alternate
from bench.setting import Bench, NotHereError

ROWS = (
    "python, nothing imported",
    "python, import ovm",
    "ovm --help",
    "ovm ls, 1 machine",
    "ovm ls, 50 machines",
    "podman machine ls",
)
SETTINGS = "cpus = 2\nmemory = 2048\n"


async def measure(bench: Bench) -> None:
    """All of them, by turns."""
    bench.tell("running commands")
    one, many = _home(bench, 1), _home(bench, bench.scale.machines)
    ovm = programs.own("ovm")
    sides: dict[str, Measure] = {
        ROWS[0]: lambda: programs.time_of(programs.python("-c", "pass")),
        ROWS[1]: lambda: programs.time_of(programs.python("-c", "import ovm")),
        ROWS[2]: lambda: programs.time_of([ovm, "--help"]),
        ROWS[3]: lambda: programs.time_of([ovm, "ls"], environment=one),
        ROWS[4]: lambda: programs.time_of([ovm, "ls"], environment=many),
    }
    try:
        podman = programs.find("podman", "podman")
        user, environment = programs.ordinary_user(bench.work / "podman")  # podman refuses root
        sides[ROWS[5]] = lambda: programs.time_of([podman, "machine", "ls"], environment=environment, user=user)
    except NotHereError as error:
        bench.missing[ROWS[5]] = str(error)
    await alternate(sides, bench.recorder, runs=bench.scale.commands, warm_ups=bench.scale.warm_ups)


def _home(bench: Bench, machines: int) -> dict[str, str]:
    """The environment of a home with so many machines."""
    home = bench.work / f"home-of-{machines}"
    for number in range(machines):
        directory = home / "machines" / f"machine-{number}"
        directory.mkdir(parents=True)
        (directory / "machine.toml").write_text(SETTINGS, "utf-8")
    return os.environ | {"OVM_HOME": os.fspath(home)}
