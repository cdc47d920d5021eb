"""The command line: what it takes, what it prints, and the status it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import click
import pytest

import ovm
from ovm import cli
from ovm.cli import port, start
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


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``ovm start`` fail with ``error``."""

    def fail(*_args: object) -> None:
        raise error

    monkeypatch.setattr(start, "provide_image", fail)


START = ("--progress", "none", "start")


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
    assert (status, err) == (
        1,
        "ovm: /some/file: Permission denied\n  hint: check the owner and mode of /some and of the files in it\n",
    )


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


def test_interrupt_while_it_is_still_being_read():
    """Python's own traceback would tell a person nothing."""
    script = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "ovm.cli":
            print("reading", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from ovm.__main__ import main
main()
"""
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


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
        ("ovm st", ["start", "stop", "status"]),
        ("ovm ", list(cli._VERBS)),
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
        [sys.executable, "-m", "ovm"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == completions


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("80", ("127.0.0.1", 0, 80, "tcp")),
        ("9000:80", ("127.0.0.1", 9000, 80, "tcp")),
        ("0.0.0.0:9000:80/udp", ("0.0.0.0", 9000, 80, "udp")),
        ("127.0.0.2:80", ("127.0.0.2", 0, 80, "tcp")),
        ("[::1]:9000:80", ("::1", 9000, 80, "tcp")),
    ],
)
def test_ports(text, meant):
    """As docker's ``-p`` has them; without HOST any free one."""
    assert port.parse(text) == meant


@pytest.mark.parametrize("text", ["", "web", "1:2:3", "80/sctp", "1.2.3:80", "123456"])
def test_what_is_no_port_is_refused(text):
    with pytest.raises(click.BadParameter, match="8080:80"):
        port.parse(text)
