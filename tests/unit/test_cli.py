"""The command line: what it takes, what it prints, and the status it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest

import ovm
from ovm import cli, registry
from ovm.cli.start import parse_memory, parse_mount
from ovm.errors import StartError


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``ovm ARGS``."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_help_imports_nothing_heavy():
    """``ovm --help`` is answered by click alone, and lists every verb."""
    script = (
        "import sys; sys.argv = ['ovm', '--help']\n"
        "from ovm.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'asyncio', 'msgspec', 'asyncssh', 'rich', 'httpx2'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    for verb in ("start", "prune", "doctor", "image", "completion"):
        assert any(line.strip().startswith(verb) for line in lines)


def test_version(capsys):
    """``ovm --version`` is the package's version."""
    assert run(capsys, "--version") == (0, f"ovm {ovm.__version__}\n", "")


def test_every_verb_has_a_command_of_that_name():
    """The table of verbs leads to commands, each called what the table calls it."""
    context = click.Context(cli.ovm)
    for verb in cli.ovm.list_commands(context):
        command = cli.ovm.get_command(context, verb)
        assert command is not None
        assert command.name == verb


def test_unknown_verb_is_a_usage_error_with_a_guess(capsys):
    """A mistyped verb ends with 2 and names the one that was meant."""
    status, out, err = run(capsys, "strat")
    assert (status, out) == (2, "")
    assert "did you mean 'start'?" in err


def test_start_without_foreground_names_it(capsys):
    """Nothing runs in the background yet; the error says what to type instead."""
    status, _, err = run(capsys, "start")
    assert status == 2
    assert "--foreground" in err


@pytest.mark.parametrize(
    ("text", "mib"), [("2048", 2048), ("512M", 512), ("2G", 2048), ("4g", 4096), ("1 GiB", 1024), ("256MB", 256)]
)
def test_memory_sizes(text, mib):
    """Sizes as people write them, in MiB."""
    assert parse_memory(text) == mib


@pytest.mark.parametrize("text", ["", "x", "2T", "-1", "1.5G"])
def test_what_is_no_size_is_refused(text):
    """Anything else is a usage error."""
    with pytest.raises(click.BadParameter, match="no size"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "host", "guest", "read_only"),
    [
        ("/srv", "/srv", "/srv", False),
        ("/srv:ro", "/srv", "/srv", True),
        ("/srv:/data", "/srv", "/data", False),
        ("/srv:/data:ro", "/srv", "/data", True),
        ("/srv:/data:rw", "/srv", "/data", False),
        ("here", os.path.abspath("here"), os.path.abspath("here"), False),  # noqa: PTH100
    ],
)
def test_mounts(text, host, guest, read_only):
    """``HOST[:GUEST][:ro]``, with a relative HOST taken from the working directory."""
    mount = parse_mount(text)
    assert (os.fspath(mount.host_path), mount.guest_path, mount.read_only) == (host, guest, read_only)


@pytest.mark.parametrize("text", ["", ":/data", "/a:/b:/c", "/a:", "/a:rel", "/a:/etc", "/a:/b/../c"])
def test_what_is_no_mount_is_refused(text):
    """Anything else is a usage error, as is a place where the guest keeps its own."""
    with pytest.raises(click.BadParameter):
        parse_mount(text)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``ovm start --foreground`` fail with ``error``."""

    async def fail(*_args: object, **_kwargs: object) -> object:
        raise error

    monkeypatch.setattr(registry, "create_ovm", fail)
    monkeypatch.setitem(vars(ovm), "create_ovm", fail)


START = ("--progress", "none", "start", "--foreground", "--image", "/nowhere")


def test_error_is_a_message_with_its_evidence(capsys, monkeypatch):
    """What ovm raises on purpose becomes a message with evidence and hint on stderr, and status 1."""
    failing(monkeypatch, StartError("QEMU ended", stage="boot", log_tail=("boom",), hint="look there"))
    status, out, err = run(capsys, *START)
    assert (status, out) == (1, "")
    assert err == "ovm: QEMU ended (stage: boot)\n  | boom\n  hint: look there\n"


def test_error_as_json(capsys, monkeypatch):
    """With --json the error is one line of JSON on stdout, and nothing else is there."""
    failing(monkeypatch, StartError("QEMU ended", stage="boot"))
    status, out, err = run(capsys, *START, "--json")
    assert (status, err) == (1, "")
    assert json.loads(out) == {"error": {"code": "start-failed", "message": "QEMU ended", "stage": "boot"}}


@pytest.mark.parametrize("args", [("start", "--json", "--memory", "x"), ("start", "--nonsense", "--json")])
def test_usage_error_as_json(capsys, args):
    """A usage error is JSON too where JSON was asked for, wherever --json stands."""
    status, out, _ = run(capsys, *args)
    assert status == 2
    assert json.loads(out)["error"]["code"] == "usage"


def test_system_error_names_the_file(capsys, monkeypatch):
    """An error of the operating system is a message, too."""
    failing(monkeypatch, PermissionError(13, "Permission denied", "/some/file"))
    status, _, err = run(capsys, *START)
    assert (status, err) == (1, "ovm: /some/file: Permission denied\n")


def test_bug_is_no_traceback(capsys, monkeypatch):
    """A bug of ours is one line and a hint; the traceback comes only where it was asked for."""
    monkeypatch.delenv("OVM_DEBUG", raising=False)
    failing(monkeypatch, KeyError("x"))
    status, _, err = run(capsys, *START)
    assert status == 1
    assert "KeyError: 'x'" in err
    assert "OVM_DEBUG" in err
    assert "Traceback" not in err
    monkeypatch.setenv("OVM_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(list(START))


def test_interrupt_is_130(capsys, monkeypatch):
    """Ctrl-C ends with the status a shell knows, without a traceback."""
    failing(monkeypatch, KeyboardInterrupt())
    status, _, err = run(capsys, *START)
    assert (status, err) == (130, "\novm: interrupted\n")


def test_closed_pipe_is_quiet():
    """When the reader of stdout is gone there is nothing to complain about."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-c", "from ovm.cli import main; main(['completion', 'fish'])"]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capsys, shell):
    """Each shell gets a script that asks ovm for its completions."""
    status, out, _ = run(capsys, "completion", shell)
    assert status == 0
    assert f"_OVM_COMPLETE={shell}_complete" in out


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("ovm st", ["start"]),
        ("ovm ", ["start", "prune", "doctor", "image", "completion"]),
        ("ovm start --fore", ["--foreground"]),
    ],
)
def test_completions(words, completions):
    """Verbs and options are completed."""
    environment = os.environ | {
        "_OVM_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from ovm.cli import main; main()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == completions
