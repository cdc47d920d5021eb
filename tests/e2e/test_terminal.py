"""The command in a real terminal: what a person sees of it, and what stays when they interrupt it or walk away."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator

import click
import pytest

import homes
import processes
import terminals
from ovm.cli import ovm as command_line

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(sys.platform != "linux", reason="the tiny image is one for QEMU"),
]


@pytest.fixture
def terminal(home: homes.Home) -> Iterator[terminals.Terminal]:
    with terminals.opened(home.root / "t", home.environment) as terminal:
        yield terminal


async def booting(home: homes.Home) -> None:
    """Waits until the guest's first word."""
    console = home.machine("default") / "log" / "console.log"
    async with asyncio.timeout(homes.DEADLINE_S):
        while not console.exists() or "tiny: booted" not in console.read_text(errors="replace"):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("columns", [100, 40])
async def test_a_start_ends_with_the_lines_to_use_it(home: homes.Home, columns: int) -> None:
    """What was drawn meanwhile is gone, also on a narrow screen; those lines, typed as they stand, work."""
    home.init()
    with terminals.opened(home.root / "t", home.environment, columns=columns) as terminal:
        await terminal.begin("ovm start")
        await terminal.shows("starting default")
        status, printed = await terminal.ended()
        assert status == 0
        first, *_ = printed.splitlines()
        assert re.fullmatch(r"starting default: \d+\.\d s", first)
        assert printed.count("starting default") == 1
        exports = [line.strip() for line in printed.splitlines() if line.strip().startswith("export ")]
        assert [line.partition("=")[0] for line in exports] == [
            "export DOCKER_HOST",
            "export CONTAINER_HOST",
            "export DOCKER_BUILDKIT",
        ]
        assert "To stop it: ovm stop" in printed
        info = (await home.good("info", "--json")).json
        for typed in (exports[0], 'eval "$(ovm env)"'):
            assert (await terminal.run(f"{typed}; echo $DOCKER_HOST"))[1] == info["docker_host"]
        assert (await terminal.run("ovm stop"))[0] == 0
    await home.nothing_left()


async def test_ctrl_c_in_the_middle_of_a_start_leaves_nothing(home: homes.Home, terminal: terminals.Terminal) -> None:
    """Ctrl-C in the middle of a start leaves nothing running, and the command reports that."""
    home.init("default", "never")
    await terminal.begin("ovm start")
    await booting(home)
    terminal.press("C-c")
    status, printed = await terminal.ended()
    assert (status, "nothing that this command started is left running" in printed) == (130, True)
    await home.nothing_left()


async def test_a_closed_terminal_leaves_the_machine_running(home: homes.Home, terminal: terminals.Terminal) -> None:
    """A machine keeps running when its terminal is closed."""
    home.init()
    assert (await terminal.run("ovm start"))[0] == 0
    pid = (await home.status())["pid"]
    shell = int((await terminal.run("echo $$"))[1])
    terminal.close()
    async with asyncio.timeout(homes.DEADLINE_S):
        while processes.command(shell) not in {"", processes.GONE}:
            await asyncio.sleep(0.02)
    status = await home.status()
    assert (status["state"], status["pid"]) == ("VirtualMachineStateRunning", pid)
    await home.good("stop", "--force")
    await home.nothing_left()


async def test_a_terminal_closed_during_a_start(home: homes.Home, terminal: terminals.Terminal) -> None:
    """The start goes on to its end."""
    home.init()
    await terminal.begin("ovm start")
    async with asyncio.timeout(homes.DEADLINE_S):
        while not (home.machine("default") / "service.json").exists():
            await asyncio.sleep(0.02)
    terminal.close()
    assert (await home.good("start", "--json")).json["ssh_port"]
    await home.good("stop", "--force")
    await home.nothing_left()


async def test_a_stopped_start_goes_on(home: homes.Home, terminal: terminals.Terminal) -> None:
    """Ctrl-Z and ``fg``; and Ctrl-C ends what follows a log, not the machine."""
    home.init()
    await terminal.begin("ovm start")
    await terminal.shows("starting default")
    terminal.press("C-z")
    await terminal.shows("Stopped")
    terminal.type("fg")
    await terminal.shows("To stop it: ovm stop")
    for following in ("ovm logs -f", "ovm events -f"):
        await terminal.begin(following)
        await terminal.shows("tiny: booted" if "logs" in following else "hypervisor")
        terminal.press("C-c")
        status, printed = await terminal.ended()
        assert (status, "interrupted" in printed) == (130, True)
    assert (await home.status())["state"] == "VirtualMachineStateRunning"
    await home.good("stop", "--force")


async def test_what_loses_data_asks(home: homes.Home, terminal: terminals.Terminal) -> None:
    """Whatever is not a yes keeps it; where nobody can be asked, it is not done either."""
    home.init()
    home.machine("default").joinpath("target").mkdir()
    home.machine("default").joinpath("target", "data.img").write_bytes(b"precious")
    for command in ("ovm rm default", "ovm reset --data"):
        for answer in ("n", "", "C-c", "C-d"):
            await terminal.begin(command)
            await terminal.shows("[y/N]")
            terminal.press(answer) if answer.startswith("C-") else terminal.type(answer)
            status, printed = await terminal.ended()
            assert status in {0, 1, 130}, printed
            assert home.machine("default").joinpath("target", "data.img").exists()
        status, printed = await terminal.run(f"{command} </dev/null")
        assert (status, "--yes" in printed) == (2, True)
    await terminal.begin("ovm rm default")
    await terminal.shows("[y/N]")
    terminal.type("y")
    assert (await terminal.ended())[0] == 0
    assert not home.machine("default").exists()


async def test_colours_are_for_terminals(home: homes.Home, terminal: terminals.Terminal) -> None:
    """Neither in a pipe, nor where NO_COLOR is set; and a reader that has gone is no error of anybody's."""
    for command, coloured in (
        ("ovm status nobody", True),
        ("ovm status nobody 2>&1 | cat", False),
        ("NO_COLOR=1 ovm status nobody", False),
    ):
        await terminal.run(command)
        assert ("\x1b[31m" in terminal.screen(coloured=True)) is coloured
    status, printed = await terminal.run("ovm completion bash | true")
    assert (status, printed) == (0, "")


def verbs(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from verbs(found, (*words, name))
    else:
        yield words, command


MAKES_ONE = {("start",), ("restart",), ("init",)}
"""Of a machine that is not there."""
MUCH = {("image", "build"), ("image", "pull"), ("image", "pack"), ("doctor",)}
"""They do it, whatever they are told."""


async def test_no_traceback_is_ever_shown(home: homes.Home) -> None:
    """Each command, of a machine that is not there, with options it has not, and with settings that make no sense."""
    home.init()
    (home.machine("default") / "machine.toml").write_text("cpus = [\n")
    home.init("odd", cpus="many")
    home.environment["EDITOR"] = "false"
    tried = []
    for words, command in verbs(command_line):
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        if words not in MUCH:
            tried += [[*words], [*words, *["odd"] * max(1, len(arguments))]]
        if words not in MUCH | MAKES_ONE:
            tried.append([*words, "nobody"])
        tried.append([*words, "--no-such-option"])
    at_once = asyncio.Semaphore(4)

    async def try_it(args: list[str]) -> homes.Done:
        async with at_once:
            return await home.run(*args)

    for args, done in zip(tried, await asyncio.gather(*map(try_it, tried)), strict=True):
        said = done.err + done.out
        assert "Traceback" not in said, args
        assert "a bug in ovm" not in said, (args, said)
        assert done.status in {0, 1, 2, 3, 255}, (args, said)
        if args[-1] == "--no-such-option":
            assert (done.status, "No such option" in said) == (2, True), (args, said)
    await home.nothing_left()


async def test_a_home_that_is_none(home: homes.Home) -> None:
    """A file where the directory should be, and one that may not be read."""
    (home.root / "file").write_text("")
    home.environment["OVM_HOME"] = str(home.root / "file")
    for args in (["ls"], ["start"], ["init"], ["status"], ["rm", "-y", "default"], ["image", "ls"], ["env"]):
        done = await home.run(*args)
        assert "Traceback" not in done.err, args
        assert "a bug in ovm" not in done.err, (args, done.err)
