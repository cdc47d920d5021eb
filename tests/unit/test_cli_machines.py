"""``ovm init``, ``ls``, ``rm``, ``config`` and ``autostart``, as they are typed; no machine is started."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import pwd
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovm import cli
from ovm.cli import autostart as autostart_command
from ovm.cli import names
from ovm.cli.init import TEMPLATE, template
from ovm.errors import HelperExited
from ovm.integrations import autostart
from ovm.model.options import Options
from ovm.process import lock
from ovm.registry import machines, records
from ovm.registry.records import Ended, ServiceRecord
from ovm.registry.settings import KINDS, Settings, parse

MIB = 1024 * 1024
DEADLINE_S = 60.0

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable, place in {
        "OVM_HOME": "home",
        "XDG_RUNTIME_DIR": "run",
        "XDG_CONFIG_HOME": "config",
        "DOCKER_CONFIG": "docker",
        "PODMAN_CONNECTIONS_CONF": "podman-connections.json",
        "CONTAINERS_CONF": "containers.conf",
    }.items():
        monkeypatch.setenv(variable, str(tmp_path / place))
    for variable in ("VISUAL", "EDITOR", "DBUS_SESSION_BUS_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "containers.conf").touch()
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Status, stdout and stderr of ``ovm ARGS``."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def good(run: Run) -> Callable[..., str]:
    """The stdout of ``ovm ARGS``, which succeeds."""

    def good(*args: str) -> str:
        status, out, err = run(*args)
        assert (status, "Traceback" in err) == (0, False), err
        return out

    return good


def make_disk(name: str, mib: int = 64 * 1024) -> Path:
    """A machine that was started once."""
    machine = machines.of(name)
    machine.target.mkdir(parents=True, exist_ok=True)
    with machine.data_disk.open("wb") as file:
        file.truncate(mib * MIB)
        file.write(os.urandom(3 * MIB))
        os.fsync(file.fileno())
    return machine.data_disk


def on_a_terminal(answers: str, *args: str) -> tuple[int, str]:
    """``ovm ARGS`` on a terminal where somebody types ``answers``: its status, and all that is to be seen."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "ovm", *args]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = bytearray()

    def look() -> None:
        try:
            while part := os.read(ours, 4096):
                seen.extend(part)
        except OSError:  # its end on Linux
            return

    looking = threading.Thread(target=look)
    looking.start()
    os.write(ours, answers.encode())
    status = process.wait(DEADLINE_S)
    looking.join(DEADLINE_S)
    os.close(ours)
    return status, seen.decode()


# init


def test_a_machine_is_made_with_what_was_chosen(good, home):
    made = good("init", "dev", "--cpus", "3", "--memory", "1G", "--disk", "128G", "--mount", f"{home}:/x,y:ro")
    assert made == f"{home}/home/machines/dev/machine.toml\n"
    settings = machines.find("dev").settings()
    assert (settings.cpus, settings.memory, settings.disk) == (3, 1024, 128 * 1024)
    assert [(str(m.host_path), m.guest_path, m.read_only) for m in settings.mounts or ()] == [(str(home), "/x,y", True)]


def test_relative_folders_are_those_of_the_working_directory(good, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home / "you"))
    monkeypatch.setattr("ovm.registry.host_checks.load_image", lambda _directory: None)
    for folder in ("src", "you/x"):
        (home / folder).mkdir(parents=True)
    good(
        "init", "--mount", "src:/src", "--mount", "~/x", "--image", "mine", "--port", "80:80", "--port", "[::1]:1:2/udp"
    )
    settings = machines.find("default").settings()
    assert [str(mount.host_path) for mount in settings.mounts or ()] == [f"{home}/src", f"{home}/you/x"]
    assert (settings.image, [str(port) for port in settings.ports]) == (
        f"{home}/mine",
        ["127.0.0.1:80:80/tcp", "[::1]:1:2/udp"],
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("mounts", "/nonexistent"), "/nonexistent is not a directory"),
        (("ca_certificates", "/nonexistent.pem"), "/nonexistent.pem is not a file"),
        (("timezone", "Mars"), "Mars is unknown"),
        (("image", "/nonexistent"), "/nonexistent"),
    ],
)
def test_a_setting_that_this_host_cannot_serve_is_refused(run, good, setting, words):
    """It is not stored, so later commands and other settings work."""
    good("init")
    before = machines.find("default").settings_text()
    status, _, err = run("config", "set", *setting)
    assert (status, machines.find("default").settings_text()) == (1, before)
    assert words in err


def test_a_folder_that_vanished_does_not_block_other_settings(good, home):
    """Only what changes is checked: a folder may be on a disk that is not mounted now."""
    (home / "src").mkdir()
    good("init", "--mount", str(home / "src"))
    (home / "src").rmdir()
    good("config", "set", "cpus", "3")


def test_without_choices_all_is_left_to_the_defaults(good):
    good("init")
    assert machines.find("default").settings() == Settings()


def test_what_is_made_can_be_edited_by_its_own_words():
    """Each setting is there, and right as soon as its # is taken away; what is chosen is not there twice."""
    every = re.sub(r"^# (?=\w+ = )", "", template(""), flags=re.MULTILINE)
    parse(every, Path("machine.toml"))
    assert tomllib.loads(every).keys() == KINDS.keys()
    some = template('memory = "1G"\nports = ["1:2"]\nregister = true\n')
    assert tomllib.loads(some) == {"memory": "1G", "ports": ["1:2"], "register": True}
    assert len(re.findall(r"\bmemory =", some)) == 1


DEFAULTS = {
    "memory": machines.DEFAULT_MEMORY_MIB,
    "disk": machines.DEFAULT_DISK_MIB,
    "publish_address": Options.__dataclass_fields__["publish_address"].default,
    "proxy": "host",
    "hostname": Options.__dataclass_fields__["hostname"].default,
    "accelerator": Options.__dataclass_fields__["accelerator"].default,
    "kernel_cmdline": "",
    "pause_on_sleep": True,
}
"""Of those whose example is what counts without it."""


def test_what_the_words_call_a_default_is_one():
    shown = parse("\n".join(f"{key} = {TEMPLATE[key][0]}" for key in DEFAULTS), Path("x"))
    assert {key: getattr(shown, key) for key in DEFAULTS} == DEFAULTS


def test_no_machine_is_made_twice(good, run):
    good("init", "dev", "--cpus", "2")
    make_disk("made")  # by create_ovm
    for name in ("dev", "made"):
        status, _, err = run("init", name, "--cpus", "3")
        assert (status, f"the machine {name} already exists" in err) == (1, True)
        assert f"ovm config edit {name}" in err
    assert machines.find("dev").settings().cpus == 2


@pytest.mark.parametrize(
    "wrong", [["--memory", "x"], ["--mount", "a:b:c"], ["--port", "x"], ["--port", "0:1"], ["--cpus", "0"], ["a b"]]
)
def test_what_cannot_be_made(run, wrong):
    status, _, err = run("init", *wrong)
    assert (status, machines.names()) == (1 if wrong == ["a b"] else 2, [])
    assert "Traceback" not in err
    assert "bug" not in err


# ls


def listed(good: Callable[..., str]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(good("ls", "--json"))}


def test_no_machines(run):
    assert run("ls") == (0, "", "no machines yet; create one: ovm start\n")
    assert run("ls", "--json") == (0, "[]\n", "")
    assert run("ls", "--format", "{name}") == (0, "", "")


def test_machines_at_rest(good, run):
    good("init", "b", "--cpus", "3", "--memory", "1G", "--disk", "1G")
    used = make_disk("a", 2048)
    os.utime(used, (0, used.stat().st_mtime - 3 * 86400 - 60))
    status, out, err = run("ls")
    assert (status, err) == (0, "")
    assert [re.split(r"\s{2,}", line) for line in out.splitlines()] == [
        ["NAME", "STATE", "CPUS", "MEMORY", "DISK", "LAST UP"],
        ["a", "stopped", str(machines.DEFAULT_CPUS), "2.0 GiB", "3.0 MiB of 2.0 GiB", "3 days ago"],
        ["b", "stopped", "3", "1.0 GiB", "0 B of 1.0 GiB", "never"],
    ]
    assert good("ls", "--format", "{name}: {disk}, {memory_mib} MiB") == (
        "a: 3.0 MiB of 2.0 GiB, 2048 MiB\nb: 0 B of 1.0 GiB, 1024 MiB\n"
    )
    assert listed(good)["b"] == {
        "name": "b",
        "state": "stopped",
        "why": "",
        "error": None,
        "held_by": "nobody",
        "pid": None,
        "cpus": 3,
        "memory_mib": 1024,
        "disk_bytes": 1024 * MIB,
        "disk_used_bytes": 0,
        "last_up": None,
    }


HEAVY = {
    "asyncio",
    "asyncssh",
    "concurrent.futures",
    "http.client",
    "httpx2",
    "msgspec",
    "ovm.model.options",
    "rich",
    "tomlkit",
}
"""What takes longer to import than a list of machines takes to make."""


@pytest.mark.parametrize(
    ("holds", "imported"),
    [(False, set[str]()), (True, {"concurrent.futures", "http.client", "msgspec"})],
    ids=["at rest", "with a service"],
)
def test_a_list_imports_what_its_machines_need(good, holds, imported):
    """Machines at rest are listed by files and locks alone; one with a service takes a client, but no event loop."""
    good("init", "dev", "--cpus", "3", "--port", "8080:80")
    machine = machines.find("dev")
    records.save(machine.ended_record, Ended(at=1.0, reason="failed", code="x", message="it broke"))
    script = (
        "import sys; from ovm.cli import main\n"
        "try: main(['ls'])\n"
        f"finally: print(sorted({HEAVY} & sys.modules.keys()))\n"
    )
    with machine.service_lock.open("w") as held:
        if holds:
            fcntl.flock(held, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, row, said = done.stdout.splitlines()
    assert row.split()[:3] == ["dev", "unknown" if holds else "stopped", "3"]
    assert set(literal_eval(said)) == imported


def test_a_line_of_ones_own(good, run):
    """Of what is shown anywhere, by the fields that --json has."""
    good("init", "dev", "--cpus", "3", "--memory", "1G")
    assert run("status", "dev", "--format", "{name} {state}") == (3, "dev VirtualMachineStateStopped\n", "")
    assert good("config", "get", "--machine", "dev", "--format", "{cpus} of {memory}") == "3 of 1G\n"
    assert good("config", "get", "cpus", "--machine", "dev", "--format", "<{cpus}>") == "<3>\n"
    assert good("image", "ls", "--format", "{name}") == ""
    assert set(run("doctor", "--format", "{status}")[1].split()) <= {"ok", "warn", "missing", "damaged"}


@pytest.mark.parametrize("template", ["{nme}", "{", "{name.x}", "{0}", "{cpus:s}"])
def test_a_template_that_cannot_be_filled_in(good, run, template):
    good("init")
    status, out, err = run("ls", "--format", template)
    assert (status, out) == (2, "")
    assert "the fields are name, state, why" in err


def test_what_is_wrong_is_said_below_the_list(good, run):
    """A crash, a failure, settings that nobody understands: the others are listed all the same."""
    for name in ("crashed", "failed", "wrong"):
        good("init", name)
    crashed, failed, wrong = map(machines.find, ("crashed", "failed", "wrong"))
    records.save(crashed.service_record, dataclasses.replace(ServiceRecord.ours(Path("/run")), boot_id="another"))
    records.save(failed.ended_record, Ended(at=1.0, reason="failed", code="x", message="it broke"))
    wrong.settings_path.write_text("\ncpu = 1\n")
    status, out, err = run("ls")
    assert (status, [line.split()[:2] for line in out.splitlines()[1:]]) == (
        0,
        [["crashed", "crashed"], ["failed", "stopped"], ["wrong", "stopped"]],
    )
    assert err.splitlines() == [
        "crashed: the host went down while it ran",
        "failed: it broke",
        f"wrong: {wrong.settings_path}:2: there is no setting 'cpu'",
    ]
    assert {name: row["why"] for name, row in listed(good).items()}["failed"] == "it broke"


def test_the_error_of_a_machine_that_died_is_shown(good, run):
    """Status and list show how its helper ended, the last lines of the log and the hint; in JSON the whole error."""
    good("init", "dev")
    error = HelperExited("qemu ended", stage="running", exit_reason="exit status 1", log_tail=("KVM",), hint="read it")
    records.save(machines.find("dev").ended_record, Ended.failed(error))
    evidence = ["  it ended: exit status 1", "  | KVM", "  hint: read it"]
    status, out, _ = run("status", "dev")
    assert (status, out.splitlines()) == (3, ["dev is stopped (failed): qemu ended (stage: running)", *evidence])
    assert run("ls")[2].splitlines() == ["dev: qemu ended (stage: running)", *evidence]
    told = json.loads(run("status", "dev", "--json")[1])
    assert (told["why"], told["error"]) == ("stopped (failed): qemu ended", error.as_dict())
    assert listed(good)["dev"]["error"] == error.as_dict()


async def test_a_machine_of_another_program(good):
    """It runs, with settings that only that program knows."""
    disk = make_disk("dev", 1024)
    async with lock.hold([disk.parent], wait_s=0):
        row = listed(good)["dev"]
        assert (row["state"], row["held_by"], row["pid"], row["cpus"]) == ("running", "program", os.getpid(), None)
        assert good("ls").splitlines()[1].split() == ["dev", "running", "3.0", "MiB", "of", "1.0", "GiB", "now"]


def test_the_names_are_completed(good):
    for name in ("dev", "default", "test"):
        good("init", name)
    assert names.complete(None, None, "de") == ["default", "dev"]  # type: ignore[arg-type]


# rm


def test_a_machine_is_removed_for_good(good, run, home):
    for name in ("a", "b", "c"):
        good("init", name)
    make_disk("a")
    status, out, err = run("rm", "a", "b", "a", "-y")
    assert (status, out, err) == (0, "", "removed a\nremoved b\n")
    assert machines.names() == ["c"]
    assert {path.name for path in (home / "home" / "machines").iterdir()} == {".settings.lock", "c"}


def test_nothing_is_removed_unasked(good, run):
    good("init", "a")
    status, _, err = run("rm", "a")
    assert (status, "add --yes" in err, machines.names()) == (2, True, ["a"])


@pytest.mark.parametrize(
    ("answer", "status", "left"), [("y\n", 0, []), ("n\n", 130, ["a", "b"]), ("\n", 130, ["a", "b"])]
)
def test_it_asks_with_what_is_lost(good, answer, status, left):
    good("init", "b")
    make_disk("a")
    ended, seen = on_a_terminal(answer, "rm", "a", "b")
    assert (ended, machines.names()) == (status, left)
    assert "This permanently removes a with all images, containers and volumes (3.0 MiB)." in seen
    assert "Continue? [y/N]" in seen


async def test_none_is_removed_if_one_is_in_use(good, run):
    good("init", "a")
    disk = make_disk("b")
    async with lock.hold([disk.parent], wait_s=0):
        status, _, err = run("rm", "-y", "a", "b")
    assert (status, machines.names()) == (1, ["a", "b"])
    assert f"b is in use by process {os.getpid()}" in err
    status, _, err = run("rm", "-y", "a", "nowhere")
    assert (status, machines.names()) == (1, ["a", "b"])


# config


def test_settings_are_read_back(good, run):
    good("init", "--cpus", "3", "--mount", "/srv:/srv", "--mount", "/opt")
    good("config", "set", "environment.A", "b c")
    assert good("config", "get", "cpus") == "3\n"
    assert good("config", "get", "mounts") == "/srv:/srv,/opt\n"
    assert good("config", "get", "environment.A") == "b c\n"
    assert good("config", "get", "environment") == "A=b c\n"
    assert run("config", "get", "memory") == (0, "", "memory is not set; its default applies\n")
    told = {"cpus": 3, "mounts": ["/srv:/srv", "/opt"], "environment": {"A": "b c"}}
    assert json.loads(good("config", "get", "--json")) == told
    assert tomllib.loads(good("config", "get")) == told
    assert json.loads(good("config", "get", "mounts", "--json")) == ["/srv:/srv", "/opt"]
    assert json.loads(good("config", "get", "environment.B", "--json")) is None


def test_settings_of_a_machine_that_has_none(good):
    """One that was made by ``create_ovm``."""
    make_disk("default")
    assert good("config", "get") == ""
    good("config", "set", "register", "true")
    assert machines.find("default").settings() == Settings(register=True)


def test_a_setting_is_changed_and_taken_away(good, run):
    good("init", "dev", "--cpus", "3")
    before = machines.find("dev").settings_text()
    assert run("config", "set", "memory", "1G", "--machine", "dev") == (0, "", "")
    good("config", "set", "cpus", "--unset", "--machine", "dev")
    assert machines.find("dev").settings() == Settings(memory=1024)
    good("config", "set", "cpus", "3", "--machine", "dev")
    assert set(before.splitlines()) - set(machines.find("dev").settings_text().splitlines()) <= {
        line for line in before.splitlines() if line.startswith("cpus = ")
    }


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["set", "cpu", "3"], 1, "did you mean cpus?"),
        (["get", "cpu"], 1, "did you mean cpus?"),
        (["set", "cpus", "many"], 1, "cpus = 'many' is not a whole number"),
        (["set", "cpus"], 2, "give a VALUE, or --unset"),
        (["set", "cpus", "3", "--unset"], 2, "give a VALUE, or --unset"),
        (["set", "disk", "1G"], 1, "has 65536M and cannot shrink"),
        (["get", "--machine", "nowhere"], 1, "no machine called nowhere"),
    ],
)
def test_a_change_that_cannot_be(run, args, status, words):
    make_disk("default")
    ended, out, err = run("config", *args)
    assert (ended, out, words in err) == (status, "", True)
    assert not machines.find("default").settings_path.exists()


async def test_a_running_machine_has_to_be_restarted_for_it(good, run):
    disk = make_disk("default")
    async with lock.hold([disk.parent], wait_s=0):
        assert "ovm restart default" in run("config", "set", "cpus", "3")[2]
        assert "ovm port add" in run("config", "set", "ports", "1:2")[2]
        assert "ovm restart default" in run("config", "set", "register", "true")[2]


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets an editor, which is a program for Python with the file as ``path``; in a path with a space."""

    def use(program: str) -> None:
        script = tmp_path / "my editor"
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\npath = Path(sys.argv[-1])\n{program}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("EDITOR", f"'{script}' --wait")

    return use


def test_settings_are_edited(good, editor):
    good("init", "--cpus", "3")
    editor("assert sys.argv[1] == '--wait'; path.write_text(path.read_text() + 'memory = \"1G\"\\n')")
    good("config", "edit")
    assert machines.find("default").settings() == Settings(cpus=3, memory=1024)


def test_settings_that_were_not_there_are_edited_from_the_template(good, editor):
    make_disk("default")
    editor("path.write_text(path.read_text().replace('# cpus', 'cpus'))")
    good("config", "edit")
    assert machines.find("default").settings() == Settings(cpus=2)


def test_wrong_settings_replace_nothing(good, run, editor):
    good("init", "--cpus", "3")
    editor("path.write_text('cpus = 0')")
    status, _, err = run("config", "edit")
    assert (status, "machine.toml:1: cpus = 0 is not" in err) == (1, True)
    assert machines.find("default").settings().cpus == 3


def test_on_a_terminal_wrong_settings_can_be_edited_again(good, editor, tmp_path):
    """From where one was, not from the beginning."""
    good("init")
    editor("path.write_text('cpus = 4' if path.read_text() == 'cpus = 0' else 'cpus = 0')")
    status, seen = on_a_terminal("y\n", "config", "edit")
    assert (status, "Edit it again?" in seen) == (0, True)
    assert machines.find("default").settings() == Settings(cpus=4)
    editor("path.write_text('cpus = 0')")
    status, seen = on_a_terminal("n\n", "config", "edit")
    assert (status, "Traceback" in seen) == (1, False)
    assert machines.find("default").settings() == Settings(cpus=4)


def test_an_editor_that_fails(good, run, editor, monkeypatch):
    good("init", "--cpus", "3")
    editor("path.write_text('cpus = 1'); sys.exit(1)")
    status, _, err = run("config", "edit")
    assert (status, "failed with status 1; nothing is changed" in err) == (1, True)
    for wrong in ("no-such-editor", "'"):
        monkeypatch.setenv("VISUAL", wrong)
        status, _, err = run("config", "edit")
        assert (status, "cannot be started" in err, "$EDITOR" in err) == (1, True, True)
    assert machines.find("default").settings().cpus == 3


# autostart


@pytest.mark.skipif(not shutil.which("systemctl"), reason="systemd is not installed")
def test_a_machine_is_started_at_a_login(good, run, monkeypatch, tmp_path):
    """By either command; and no more when it is removed. Who does not linger is told of that."""
    good("init", "dev")
    monkeypatch.setattr(autostart_command, "LINGERING", tmp_path)
    assert "loginctl enable-linger" in run("autostart", "enable", "dev")[2]
    (tmp_path / pwd.getpwuid(os.getuid()).pw_name).touch()
    assert "loginctl" not in run("autostart", "enable", "dev")[2]
    assert (machines.find("dev").settings().autostart, autostart.is_there("dev")) == (True, True)
    assert "no longer started" in run("autostart", "disable", "dev")[2]
    assert (machines.find("dev").settings().autostart, autostart.is_there("dev")) == (False, False)
    assert run("autostart", "disable", "dev") == (0, "", "dev is not started when you log in\n")
    assert "is started when you log in" in run("config", "set", "autostart", "true", "--machine", "dev")[2]
    assert autostart.is_there("dev")
    good("rm", "-y", "dev")
    assert not autostart.is_there("dev")


@pytest.mark.skipif(not shutil.which("systemctl"), reason="systemd is not installed")
def test_whether_a_machine_is_started_at_a_login_is_told(good, run):
    """Of the host, not of the settings: one may be written by hand."""
    good("init", "dev")
    assert run("autostart", "status", "dev") == (3, "dev is not started when you log in\n", "")
    assert json.loads(run("autostart", "status", "dev", "--json")[1]) == {
        "name": "dev",
        "autostart": False,
        "file": None,
    }
    settings = machines.find("dev").settings_path
    settings.write_text("autostart = true\n")
    status, _, err = run("autostart", "status", "dev")
    assert (status, "ovm autostart enable dev" in err) == (3, True)
    run("autostart", "enable", "dev")
    assert run("autostart", "status", "dev")[:2] == (0, "dev is started when you log in\n")
    told = json.loads(good("autostart", "status", "dev", "--json"))
    assert told == {"name": "dev", "autostart": True, "file": str(autostart.path("dev"))}
    assert run("autostart", "status", "nobody")[0] == 1


def test_where_nothing_can_start_it_nothing_is_written(good, run, monkeypatch):
    good("init")
    monkeypatch.setenv("PATH", "/nowhere")
    for args in (["autostart", "enable"], ["config", "set", "autostart", "true"]):
        status, _, err = run(*args)
        assert (status, "no systemd" in err) == (1, True)
        assert machines.find("default").settings() == Settings()
