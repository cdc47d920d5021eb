"""Confinement: a helper has the files it was given, and is the process it would have been."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ovm
from ovm.process import confine, guard, landlock
from ovm.process.confine import Rights

PYTHON = os.path.realpath(sys.executable)
confined = pytest.mark.skipif(not confine.available(), reason="this kernel has no Landlock")


def run(code: str, *words: object, sockets=(), reads=()) -> str:
    """What Python prints when it does ``code`` confined; errors by their names."""
    reads = [Path(sys.base_prefix), *reads]
    argv = [PYTHON, "-I", "-S", "-c", f"import os, socket, sys\n{code}", *map(str, words)]
    command = confine.command(argv, Rights(sockets=sockets, reads=reads))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2].partition(":")[0]


@pytest.fixture
def given(tmp_path) -> Path:
    """A directory for sockets, with a file in it."""
    path = tmp_path / "given"
    path.mkdir()
    (path / "file").touch()
    return path


@confined
@pytest.mark.parametrize(
    "code",
    [
        "os.unlink(path)",
        "os.rename(path, path + '2')",
        "os.rename(path, given + '/2')",
        "os.link(path, given + '/2')",
        "os.rename(given + '/file', path)",
        "os.truncate(path, 0)",
        "os.rmdir(path + '.d')",
        "open(path)",
        "os.listdir(os.path.dirname(path))",
        "open(path, 'a')",
        "open(path + '2', 'w')",
        "os.mkdir(path + '2')",
        "os.symlink('/', path + '2')",
        "os.symlink('/', given + '/2')",
        "os.mkfifo(path + '2')",
        "open(given + '/2', 'w')",
        "open(given + '/file')",
        "socket.socket(socket.AF_UNIX).bind(path + '2')",
        "open('/etc/ovm-test', 'w')",
        "open(os.path.expanduser('~') + '/.ovm-test', 'w')",
        "os.execv(path, [path])",
    ],
)
def test_what_was_not_given_is_refused(tmp_path, given, code):
    """Neither the user's other files nor the system's can be changed, made or removed, nor the user's be read."""
    file = tmp_path / "file"
    file.write_text("precious")
    file.chmod(0o755)
    (tmp_path / "file.d").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(f"path, given = sys.argv[1:]\n{code}\nprint('done')", file, given, sockets=[given]) == "PermissionError"
    assert file.read_text() == "precious"
    assert sorted(tmp_path.rglob("*")) == before


CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    words = (ctypes.c_char_p(os.fsencode(w)) if isinstance(w, str) else ctypes.c_long(w) for w in arguments)
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        raise OSError(ctypes.get_errno(), "")
"""
filtered = pytest.mark.skipif(
    not confine.available() or not landlock._filter(platform.machine(), 1), reason="this kernel has no filter of ours"
)


@filtered
@pytest.mark.parametrize(
    "code",
    [
        "os.chmod(path, 0o666)",
        "os.fchmod(os.open(given, os.O_RDONLY), 0o700)",
        "os.chmod(given + '/file', 0o666)",
        "os.chown(path, -1, -1)",
        "os.lchown(path, -1, -1)",
        "os.fchown(2, -1, -1)",
        "os.utime(path)",
        "os.utime(given + '/file')",
        "os.setxattr(path, 'user.ovm', b'')",
        "os.removexattr(path, 'user.ovm')",
        "os.truncate(path, 0)",
        "os.link(given + '/file', given + '/2')",
        "os.symlink('/', given + '/2')",
        "os.mkfifo(given + '/2')",
        "os.kill(os.getppid(), 0)",
        "os.kill(0, 0)",
        "os.kill(-1, 0)",
        "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        "call({'x86_64': 272, 'aarch64': 97}[os.uname()[4]], 1 << 28)",
        "call({'x86_64': 56, 'aarch64': 220}[os.uname()[4]], 1 << 28 | 17, 0, 0, 0, 0)",
        "call({'x86_64': 101, 'aarch64': 117}[os.uname()[4]], 16, os.getppid(), 0, 0)",
        "call({'x86_64': 165, 'aarch64': 40}[os.uname()[4]], 'none', given, 'tmpfs', 0, 0)",
        "call({'x86_64': 321, 'aarch64': 280}[os.uname()[4]], 0, 0, 0)",
        "call({'x86_64': 250, 'aarch64': 219}[os.uname()[4]], 0, -3, 0)",
        "call(425, 1, 0)",
    ],
)
def test_calls_past_landlock_are_refused(tmp_path, given, code):
    """B27: modes, owners, times and attributes of the user's files stay, its own directory's too; and no other process
    is reached.
    """
    file = tmp_path / "file"
    file.write_text("precious")
    with contextlib.suppress(OSError):
        os.setxattr(file, "user.ovm", b"")
    before = file.stat()
    code = f"import resource, signal\n{CALLS}\npath, given = sys.argv[1:]\n{code}\nprint('done')"
    assert run(code, file, given, reads=[given]) == "PermissionError"
    after = file.stat()
    assert [after.st_mode, after.st_uid, after.st_mtime_ns, after.st_ctime_ns, after.st_nlink] == [
        before.st_mode, before.st_uid, before.st_mtime_ns, before.st_ctime_ns, before.st_nlink
    ]  # fmt: skip


@filtered
def test_what_a_program_does_to_itself_is_not_refused():
    """Threads, children, signals to itself and limits of its own: Go's runtime wants them."""
    code = (
        "import resource, signal, subprocess, threading\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "thread = threading.Thread(target=print, args=['thread'], kwargs={'flush': True})\n"
        "thread.start(); thread.join()\n"
        "subprocess.run(['/bin/echo', 'child'])"
    )
    assert run(code).split() == ["heard", "heard", "thread", "child"]


@filtered
def test_another_kind_of_system_call_is_no_way_around():
    """A 64-bit x86 program can make calls by the numbers of x32, which the list has not."""
    if platform.machine() != "x86_64":
        pytest.skip("there is no such kind on this architecture")
    assert run(f"{CALLS}\ncall(0x40000000 | 39)") == "PermissionError"


def test_without_a_list_there_is_no_filter():
    """An architecture whose numbers are not known gets none, rather than a wrong one."""
    assert landlock._filter("riscv64", 1) == b""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_refused_call_has_its_number(machine):
    """As many as there are names, but where the architecture never had the older ones; and none twice."""
    which = list(landlock._ARCHITECTURES).index(machine)
    names = [name for names in landlock.REFUSED for name in names.split()]
    numbers = [number for pair in landlock.REFUSED.values() for number in pair[which]]
    missing = {"x86_64": 0, "aarch64": 9}  # chmod, chown, lchown, utime, utimes, futimesat, link, symlink, mknod
    assert len(numbers) == len(names) - missing[machine] == len(set(numbers))


@confined
def test_sockets_can_be_made_and_removed_where_they_are_given(given):
    """With what gvproxy does before: it removes what lies where its socket is to be."""
    code = "path = sys.argv[1]\nos.unlink(path)\ns = socket.socket(socket.AF_UNIX)\ns.bind(path)\nprint('bound')"
    assert run(code, given / "file", sockets=[given]) == "bound"
    assert (given / "file").is_socket()


@confined
def test_a_file_that_is_given_can_be_read_and_no_more(tmp_path):
    """A key, for one; its neighbour cannot."""
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("secret")
    other.write_text("another")
    assert run("print(open(sys.argv[1]).read())", key, reads=[key]) == "secret"
    assert run("print(open(sys.argv[1]).read())", other, reads=[key]) == "PermissionError"
    assert run("print(open(sys.argv[1], 'a'))", key, reads=[key]) == "PermissionError"


@confined
def test_the_system_can_be_asked(given):
    """Names, time and limits, as resolvers and Go's runtime do."""
    for path in ("/etc/resolv.conf", "/etc/hosts", "/proc/sys/net/core/somaxconn", "/proc/self/cgroup", "/dev/null"):
        if Path(path).exists():
            assert run("open(sys.argv[1]).read(); print('read')", path) == "read", path


@confined
def test_a_resolver_that_changes_is_read_again(tmp_path, monkeypatch):
    """The file that /etc/resolv.conf leads to is replaced by another of its name when the network changes."""
    real, link = tmp_path / "run" / "resolve" / "resolv.conf", tmp_path / "resolv.conf"
    real.parent.mkdir(parents=True)
    real.write_text("one\n")
    link.symlink_to(real)
    monkeypatch.setattr(confine, "RESOLVERS", link)
    command = confine.command(["/bin/sh", "-c", f"cat {real}; read -r _; cat {real}"], Rights())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "one\n"
        (real.parent / "new").write_text("two\n")
        (real.parent / "new").rename(real)
        assert process.communicate("\n", timeout=30)[0] == "two\n"


@pytest.mark.parametrize(
    ("leads_to", "allowed"),
    [
        ("/mnt/wsl/resolv.conf", "r/mnt/wsl"),
        ("/run/resolv.conf", "r/run/resolv.conf"),
        ("/resolv.conf", "r/resolv.conf"),
        (f"{Path.home()}/resolv.conf", f"r{Path.home()}/resolv.conf"),
        (f"{Path.home().parent}/resolv.conf", f"r{Path.home().parent}/resolv.conf".replace("//", "/")),
    ],
)
def test_resolvers_open_no_directory_of_the_users(tmp_path, monkeypatch, leads_to, allowed):
    """Where the link leads among the user's files, or to where everybody's are, it is the file alone."""
    (tmp_path / "resolv.conf").symlink_to(leads_to)
    monkeypatch.setattr(confine, "RESOLVERS", tmp_path / "resolv.conf")
    found = set(confine.rules("/program", Rights())) - {f"r{path}" for path in confine.SETTINGS}
    assert {rule for rule in found if rule.startswith("r")} == {allowed}


@pytest.mark.skipif(landlock.version() < 6, reason="this kernel's Landlock knows no scopes")
def test_processes_that_are_not_confined_are_out_of_reach():
    """Neither signals nor sockets without a path, which other programs of the user listen on."""
    name = f"\0ovm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        code = "socket.socket(socket.AF_UNIX).connect('\\0' + sys.argv[1])"
        assert run(code, name[1:]) == "PermissionError"
    assert run("os.kill(os.getppid(), 0)") == "PermissionError"


@confined
def test_nothing_is_gained_by_executing():
    """A program that runs as its owner, root for one, runs as its caller."""
    assert run("print(*(line for line in open('/proc/self/status') if 'NoNewPrivs' in line))") == "NoNewPrivs:\t1"


TELL = """
import json, signal
print(json.dumps([
    os.getpid(), os.getpgrp(), os.getcwd(), os.umask(0), sorted(os.listdir('/proc/self/fd')), dict(os.environ),
    open('/proc/self/status').read().partition('SigIgn:')[2].split()[0], sys.argv[1:]]))
"""


@confined
async def test_it_is_the_process_it_would_have_been(group, tmp_path):
    """Same pid, group, directory, umask, files, environment, signals and arguments as without confinement."""
    told = []
    argv = [PYTHON, "-I", "-S", "-c", f"import os, sys{TELL}", "an argument", "--", "", "x/"]
    with (tmp_path / "lock").open("w") as lock:
        for name, rights in (("free", None), ("confined", Rights(reads=[Path(sys.base_prefix), tmp_path]))):
            log = tmp_path / name
            helper = await group.spawn(name, argv, log_path=log, cwd=tmp_path, pass_fds=[lock.fileno()], rights=rights)
            assert await helper.wait() == "exit status 0", log.read_text()
            pid, *facts = json.loads(log.read_text())
            assert pid == helper.pid
            assert facts[0] == group.guard.pid
            assert str(lock.fileno()) in facts[3]
            told.append(facts)
    assert told[0] == told[1]


@confined
async def test_a_program_that_cannot_be_executed_is_told(group, tmp_path):
    """In the log, in words, and in its status."""
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    for name, reason in (("text", "Exec format error"), ("missing", "No such file or directory")):
        log = tmp_path / f"{name}.log"
        helper = await group.spawn(name, [tmp_path / name], log_path=log, rights=Rights())
        assert await helper.wait() == f"exit status {landlock.CANNOT_EXECUTE}"
        assert log.read_text() == f"ovm: {tmp_path / name} cannot be executed: {reason}\n"


@confined
def test_what_cannot_be_confined_is_not_executed(capfd):
    """The kernel takes so many rulesets, and not one more."""
    code = (
        "from ovm.process import landlock\n"
        "for _ in range(16): landlock.confine(['x/', 's/'])\n"
        "landlock.become(['x/'], ['/bin/echo', 'executed'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == landlock.CANNOT_CONFINE
    assert (done.stdout, done.stderr) == ("", "ovm: /bin/echo cannot be confined: Argument list too long\n")


@confined
def test_a_package_that_was_removed_can_still_confine(tmp_path):
    """A helper may have to be started again after an upgrade has replaced the package."""
    shutil.copytree(Path(ovm.__file__).parent, tmp_path / "ovm", ignore=shutil.ignore_patterns("image", "__pycache__"))
    code = (
        "import shutil, subprocess, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from ovm.process import confine\n"
        "assert confine.__file__.startswith(sys.argv[1])\n"
        "confine.command(['/bin/true'], confine.Rights())\n"  # as the first start does
        "shutil.rmtree(sys.argv[1] + '/ovm')\n"
        "command = confine.command(['/bin/sh', '-c', 'exec cat \"$1\"', 'sh', sys.argv[2]], confine.Rights())\n"
        "sys.exit(subprocess.run(command).returncode)"
    )
    secret = tmp_path / "secret"
    secret.write_text("secret")
    argv = [sys.executable, "-c", code, tmp_path, secret]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Permission denied" in done.stderr


def test_a_host_that_cannot_confine_runs_it_as_it_is(monkeypatch):
    """An older kernel, or one that was built without."""
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert not confine.available()
    assert confine.command([Path("/bin/true"), "x"], Rights(sockets=[Path("/s")])) == ["/bin/true", "x"]


@pytest.mark.parametrize(("known", "rights", "scopes"), [(1, 13, 0), (2, 14, 0), (3, 15, 0), (5, 16, 0), (7, 16, 3)])
def test_an_older_kernel_is_asked_for_what_it_knows(monkeypatch, known, rights, scopes):
    """More would be refused; the rights of a later version are given up by a kernel that has it."""
    asked = []
    monkeypatch.setattr(landlock, "version", lambda: known)
    monkeypatch.setattr(landlock, "_call", lambda number, *words: asked.append((number, *words)) or os.open("/", 0))
    monkeypatch.setattr(landlock, "_libc", FakeLibc)
    landlock.confine([])
    handled, network, scoped = (int.from_bytes(asked[0][1][at : at + 8], sys.byteorder) for at in (0, 8, 16))
    assert (handled, network, scoped) == ((1 << rights) - 1, 0, scopes)


class FakeLibc:
    def prctl(self, *_: object) -> int:
        return 0


def test_a_frozen_app_confines_by_itself(monkeypatch):
    """It has no Python to run, so it starts itself with a word that its freeze_support knows."""
    monkeypatch.setattr(guard, "frozen_app", lambda: "/app")
    monkeypatch.setattr(landlock, "version", lambda: 7)
    command = confine.command(["/bin/true", "x"], Rights(sockets=[Path("/s")]))
    assert command[:2] == ["/app", guard.CONFINE_ARGUMENT]
    assert command[-4:] == ["s/s", landlock.END_OF_RULES, "/bin/true", "x"]


@confined
async def test_a_frozen_app_becomes_the_helper(tmp_path):
    """And takes along nothing of what its loader had put into the environment."""
    code = "import sys; sys.frozen = True; sys.argv[0] = 'app'; import ovm; ovm.freeze_support(); print('the app ran')"
    words = [guard.CONFINE_ARGUMENT, *confine.rules("/usr/bin/env", Rights()), landlock.END_OF_RULES, "/usr/bin/env"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *words),
        env={"LD_LIBRARY_PATH": "/loaders", "_PYI_ARCHIVE_FILE": "/app", "HOME": "/home/u"},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert out.decode() == "HOME=/home/u\n"


def test_the_profile_of_macos():
    """Writing is refused but below the directories for sockets, reading the home but for what was given."""
    profile = confine.profile(Rights(sockets=[Path("/s")], reads=[Path("/k"), Path("/l")]))
    assert profile.splitlines() == [
        "(version 1)",
        "(allow default)",
        "(deny file-write*)",
        '(allow file-write* (literal "/dev/null") (literal "/dev/dtracehelper") (subpath (param "SOCKETS0")))',
        '(deny file-read-data (subpath (param "HOME")))',
        '(allow file-read-data (literal (param "PROGRAM")) (subpath (param "READ0")) (subpath (param "READ1")))',
        "(deny process-exec*)",
        '(allow process-exec* (literal (param "PROGRAM")))',
    ]
    assert profile.count("(") == profile.count(")")


def test_the_profiles_paths_have_no_links(tmp_path, monkeypatch):
    """The kernel of macOS compares whole paths, and /tmp is a link there."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    told = list(confine._parameters(f"{tmp_path}/link/program", Rights(sockets=[tmp_path / "link" / 'o"dd'])))
    assert told[::2] == ["-D"] * 3
    real = tmp_path / "real"
    assert told[1::2] == [f"HOME={real}", f"PROGRAM={real}/program", f'SOCKETS0={real}/o"dd']
