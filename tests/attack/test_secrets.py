"""Row B3: what is sent to somebody, shown or logged has no secret in it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import os
import string
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import fuzz
from ovm import cli
from ovm.cli import support_bundle
from ovm.registry import machines
from ovm.registry.machines import Machine
from ovm.registry.settings import Settings
from ovm.text.redaction import Redactor, shown_url

SLOWEST_S = 2.0
"""For an eighth of a MiB."""
AWKWARD = "pa/ss@wo?rd#x"
"""A password that begins and ends other parts of a URL."""


def all_forms(secret: str) -> Iterator[bytes]:
    """Raw, encoded for a URL, and in base64."""
    raw = secret.encode()
    yield raw
    yield json.dumps(secret)[1:-1].encode()
    yield from (form.encode() for form in (quote(secret), quote(secret, safe=""), quote_plus(secret)))
    yield base64.b64encode(raw)
    yield base64.urlsafe_b64encode(raw)


def has_none(content: bytes, *secrets: str) -> None:
    for secret in secrets:
        for form in all_forms(secret):
            assert form not in content, (secret, form, content[max(0, content.find(form) - 200) :][:400])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable, place in {"OVM_HOME": "home", "XDG_RUNTIME_DIR": "run", "HOME": "user"}.items():
        monkeypatch.setenv(variable, str(tmp_path / place))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ovm(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def made(machine: Machine, settings: str = "", **logs: str) -> Machine:
    """A machine's directory with these settings and logs."""
    for directory in (machine.log_dir, machine.target, machine.keys.directory):
        directory.mkdir(parents=True, exist_ok=True)
    machine.settings_path.write_text(settings, encoding="utf-8")
    for name, content in logs.items():
        (machine.log_dir / f"{name}.log").write_text(content, encoding="utf-8")
    return machine


@pytest.fixture
def machine(home: Path) -> Machine:
    return made(Machine("default", home / "home" / "machines" / "default"))


def kept(machine: Machine) -> dict[str, bytes]:
    return dict(support_bundle.kept_files(machine))


def everything(machine: Machine) -> bytes:
    return b"\n".join(name.encode() + b"\n" + content for name, content in kept(machine).items())


NAMED = {
    "GH_TOKEN": "ghp_0123456789abcdef",
    "DB_PASSWORD": "correct horse battery",
    "PRIVATE_KEY": "MIIEvQIBADAN",
    "MY_PASSPHRASE": "let me in",
    "GITHUB_PAT": "11ABCDEFG0",
    "PLAIN": "nobody-would-guess",
    "HTTP_PROXY": "http://:empty-user@proxy.example:3128",
    "HTTPS_PROXY": "https://only-a-user@proxy.example",
    "ALL_PROXY": f"http://me:{AWKWARD}@proxy.example:3128",
}
SECRETS = [*(value for name, value in NAMED.items() if "PROXY" not in name), "empty-user", "only-a-user", AWKWARD]


def test_what_config_set_was_given_is_not_in_a_support_bundle(home, machine):
    """The command itself, from the settings to the file: no value of ``environment``, in settings or logs."""
    for name, value in NAMED.items():
        assert ovm("config", "set", f"environment.{name}", value) == 0
    (machine.log_dir / "service.log").write_text(
        "2026-01-01 00:00:00,000 INFO ovm.life: the guest powered itself off\n"
        + "".join(f"2026-01-01 00:00:00,000 WARNING x: tried {value} there\n" for value in NAMED.values())
    )
    assert ovm("support-bundle", "-o", "sent.tar.gz") == 0
    assert (home / "sent.tar.gz").stat().st_mode & 0o777 == 0o600
    content = gzip.decompress((home / "sent.tar.gz").read_bytes())
    has_none(content, *SECRETS)
    with tarfile.open(home / "sent.tar.gz") as bundle:
        files = {entry.name.partition("/")[2]: bundle.extractfile(entry).read() for entry in bundle}
    assert set(json.loads(files["settings.json"])["environment"]) == set(NAMED)
    assert {"host.json", "doctor.json", "status.json", "info.json", "ports.json", "left-out.json"} < set(files)
    assert b"ovm.life: the guest powered itself off" in files["log/service.log"]


def test_every_setting_is_shown_in_a_way_of_its_own():
    """A setting that is new is not sent until somebody decides how."""
    assert set(support_bundle._SHOWN) == {field.name for field in dataclasses.fields(Settings)}


def test_what_is_harmless_is_sent(machine):
    """Else a bundle helps nobody: numbers, ports, addresses, names of variables, and what the logs say."""
    service = (
        "2026-01-01 00:00:00,000 INFO ovm.life: stopping: podman\n"
        'Traceback (most recent call last):\n  File "/usr/lib/python3/ovm/life.py", line 12, in stop\n'
        "ovm.errors.StartError: qemu ended: exit status 1\n"
    )
    console = (
        "[    0.000000] Linux version 6.12.43 (x@y)\n"
        "[    0.012345] Command line: console=ttyS0 panic=-1 root=/dev/vda\n"
        "[  OK  ] Started ssh.service\n"
        "[    1.200000] RIP: 0010:ffffffff81000000\n"
    )
    made(
        machine,
        'cpus = 3\nmemory = "2G"\nports = ["0.0.0.0:8080:80"]\ntimezone = "Europe/Berlin"\ndns = ["1.1.1.1"]\n'
        'mounts = ["/srv/data:/mnt:ro"]\n[environment]\nCI = "true"\n',
        service=service,
        console=console,
        gvproxy='time="2026-01-01T00:00:00Z" level=info msg="waiting for clients..."\n',
    )
    digest = "sha256:" + "ab" * 32
    (machine.target / "versions.json").write_text(json.dumps({"kernel": digest, "other": "x"}))
    machine.ended_record.write_text('{"at": 1.5, "reason": "failed", "code": "start-failed", "message": "qemu ended"}')
    files = kept(machine)
    assert json.loads(files["settings.json"]) == {
        "cpus": 3,
        "memory": 2048,
        "ports": ["0.0.0.0:8080:80/tcp"],
        "timezone": "Europe/Berlin",
        "dns": ["1.1.1.1"],
        "mounts": [{"host": "[removed: 9 characters]", "guest": "[removed: 4 characters]", "read_only": True}],
        "environment": {"CI": "[removed: 4 characters]"},
    }
    assert json.loads(files["versions.json"]) == {"kernel": digest[:19]}
    assert json.loads(files["ended.json"])["message"] == "qemu ended"
    assert files["log/service.log"].decode() == service
    assert files["log/console.log"].decode() == console
    assert b'msg="waiting for clients..."' in files["log/gvproxy.log"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [('# a hunter2-comment\ncpus = "hunter2-text"\n', 2), ('cpus = 1\nx = "hunter2-text\n', 2), ("\0hunter2-text", 1)],
)
def test_settings_that_cannot_be_understood_are_left_out(machine, settings, line):
    """The bundle has the number of the line, and not its content; nor have the logs."""
    made(machine, settings, service='it said "hunter2-text" was wrong\n')
    files = kept(machine)
    assert json.loads(files["left-out.json"])["machine.toml"] == f"line {line} is invalid"
    has_none(everything(machine), "hunter2-comment", "hunter2-text" if "\0" not in settings else "hunter2-comment")


def test_keys_are_not_sent_however_a_log_quotes_them(home, machine):
    """Neither a whole key nor a line of it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", machine.keys.user_key], check=True, timeout=10)
    key = machine.keys.user_key.read_text()
    lines = [line for line in key.splitlines() if not line.startswith("---")]
    made(machine, service=f"{key}\nthe line {lines[1]} alone\n{json.dumps(key)}\n{key[200:]}")
    has_none(everything(machine), *lines)


@pytest.mark.parametrize("name", ["mine.log", "console.txt", "hunter2-file.log", "service.log.old", "qemu.9.log"])
def test_files_that_ovm_does_not_know_are_left_out(machine, name):
    """Name and content."""
    (machine.log_dir / name).write_text("hunter2-content")
    has_none(everything(machine), "hunter2-file", "hunter2-content")
    assert json.loads(kept(machine)["left-out.json"])["log"].startswith("1 files")


def test_what_is_no_log_is_left_out(home, machine):
    """A link to the user's keys, or a pipe that nobody writes to."""
    (home / "id").write_text("hunter2-content")
    (machine.log_dir / "service.log").symlink_to(home / "id")
    os.mkfifo(machine.log_dir / "qemu.log")
    has_none(everything(machine), "hunter2-content")
    assert set(json.loads(kept(machine)["left-out.json"])) >= {"log/service.log", "log/qemu.log"}


def test_the_guests_own_output_is_left_out(machine):
    """A container on the console prints what it likes; the bundle says how many lines it does not have."""
    made(machine, console="[    1.000000] a\nlogin: hunter2-output\r\nhunter2-output\n[  OK  ] b\n")
    files = kept(machine)
    assert files["log/console.log"] == b"[    1.000000] a\n[  OK  ] b\n"
    assert json.loads(files["left-out.json"])["log/console.log"].startswith("2 lines")


def test_half_a_line_is_not_sent(machine, monkeypatch):
    """The end of a long log may begin in the middle of a URL, whose credentials nobody would recognize."""
    monkeypatch.setattr(support_bundle, "LOG_MAX_BYTES", 40)
    made(machine, service="http://user:hunter2-half@proxy.example\n" + "x" * 12 + "\n")
    assert kept(machine)["log/service.log"] == b"x" * 12 + b"\n"


SHAPES: dict[str, Callable[[str], str]] = {
    "a pair": "exporting MY_VALUE={} now".format,
    "a pair in quotes": 'MY_VALUE = "{}" and'.format,
    "JSON": '{{"access_token": "{}"}}'.format,
    "YAML": "  db-password: {}".format,
    "an option": "ran login --password {} -v".format,
    "a user in a URL": "from https://{}@host.example/a".format,
    "a password in a URL": "from http://:{}@host.example".format,
    "both in a URL": "proxy http://me:{}@[::1]:3128/ refused".format,
    "without a scheme": "proxy me:{}@proxy.example:3128".format,
    "a query": "GET https://host.example/a?x={} done".format,
    "a relative query": "GET /a?x={} done".format,
    "a header": "> Authorization: Bearer {}".format,
    "a cookie": "set-cookie: sid {}".format,
    "PEM": "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----".format,
    "the end of PEM": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n".format,
}
"""How a log may quote a secret that is not the machine's own."""

printable = st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters='"')
secrets = st.one_of(
    st.text(printable, min_size=8, max_size=24),
    st.text(string.ascii_letters + string.digits, min_size=8, max_size=40),
    st.text("abcXYZ0189/@:?#%&=+.-_", min_size=8, max_size=24),
).filter(lambda text: not text.isascii() or len(set(text)) > 3)


@fuzz.examples(1000)
@given(secret=secrets, shape=st.sampled_from(sorted(SHAPES)), log=st.sampled_from(["service", "qemu", "console"]))
def test_a_secret_that_a_log_quotes_is_not_sent(secret, shape, log):
    """Whoever's it is, where its place shows what it is."""
    prefix = "[    1.000000] " if log == "console" else ""
    assume(not any(form in SHAPES[shape]("").encode() + b"[removed]@" for form in all_forms(secret)))
    has_none(Redactor(())(prefix + SHAPES[shape](secret)).encode(), secret)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine")


def planted(secrets: list[str]) -> dict[str, Any]:
    """A secret in every setting that can hold a text."""
    one, two, three, four, five = secrets
    return {
        "environment": {"PLAIN": one, "HTTP_PROXY": f"http://me:{two}@proxy.example:3128"},
        "kernel_cmdline": f"quiet x={three}",
        "mounts": [f"/srv/{four}/data".replace(":", "_"), f"/srv/b:/mnt/{four}".replace(":", "_")],
        "ca_certificates": [f"/etc/{five}/ca.pem"],
        "image": f"/images/{five}",
        "hostname": "host" + "".join(c for c in one if c.isascii() and c.isalnum())[:20],
        "timezone": "Europe/" + "".join(c for c in two if c.isascii() and c.isalnum()) + "Z",
    }


def written(told: dict[str, Any]) -> str:
    import tomlkit

    return tomlkit.dumps(told)


ENCODED: list[Callable[[str], str]] = [
    str,
    quote,
    lambda text: quote(text, safe=""),
    quote_plus,
    json.dumps,
    lambda text: base64.b64encode(text.encode()).decode(),
    lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    lambda text: base64.b64encode(f"me:{text}".encode()).decode(),
]


@fuzz.examples(200)
@given(
    secrets=st.lists(secrets, min_size=5, max_size=5, unique=True),
    unknown=st.booleans(),
    damaged=st.booleans(),
    encode=st.sampled_from(ENCODED),
)
def test_no_secret_of_a_machine_is_sent(directory, secrets, unknown, damaged, encode):
    """Made-up ones in every setting, file and log, as they are and encoded: none is in a bundle in any form."""
    machine = Machine("default", directory)
    without = everything(filled(machine, ["12345678"] * 5, unknown=unknown, damaged=damaged, encode=encode))
    assume(not any(form in without for secret in secrets for form in all_forms(secret)))
    has_none(everything(filled(machine, secrets, unknown=unknown, damaged=damaged, encode=encode)), *secrets)


def filled(
    machine: Machine, secrets: list[str], *, unknown: bool, damaged: bool, encode: Callable[[str], str]
) -> Machine:
    """The machine with the secrets in every place."""
    settings = planted(secrets)
    if unknown:
        settings["no_such_setting"] = secrets[0]
    text = f"# {secrets[0]}\n{written(settings)}" + ("=\n" if damaged else "")
    logged = "".join(f"[    1.000000] it met {encode(secret)} there\n" for secret in secrets[:3])
    made(machine, text, service=logged, console=logged, gvproxy=logged, qemu=logged)
    pairs = {f"X{number}": secret for number, secret in enumerate(secrets)}
    (machine.target / "versions.json").write_text(json.dumps(pairs | dict.fromkeys(("kernel", "rootfs"), secrets[3])))
    machine.ended_record.write_text(
        json.dumps({"at": 1.0, "reason": secrets[0], "code": secrets[1], "message": f"x {secrets[2]}", **pairs})
    )
    return machine


@given(secret=secrets, before=st.sampled_from(["", "me:", ":", "me:x/"]), after=st.sampled_from(["", "/a", ":1/b?x=y"]))
@fuzz.examples(500)
def test_a_url_that_is_shown_has_no_secret(secret, before, after):
    """A user, a password with any character, and a query."""
    assume(not any(secret in text for text in ("https://host.example/a", "[removed]")))
    for url in (f"https://{before}{secret}@host.example{after}", f"https://host.example/a?{secret}"):
        has_none(shown_url(url).encode(), secret)
        assert shown_url(url).startswith("https://")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host.example/a.zip", "https://host.example/a.zip"),
        ("https://host.example/a.zip?x=1#y", "https://host.example/a.zip?[removed]"),
        ("https://token@host.example/a", "https://[removed]@host.example/a"),
        ("http://:pw@host.example", "http://[removed]@host.example"),
        ("http://me:pa/ss@word@host.example:1/a", "http://[removed]@host.example:1/a"),
        (f"http://me:{AWKWARD}@host.example:1/a", "http://[removed]"),
        ("me:pw@host.example", "[removed]@host.example"),
    ],
)
def test_a_url_is_shown(url, shown):
    """With its scheme, host and path."""
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    "line",
    [
        "a@b " + "://x" * 490,
        "pid=" * 490,
        "a:" * 490 + "@b",
        "x.y-" * 490,
        "Aa0+" * 490,
        "a" * 1900,
        "AAAA",
        "://" * 10**5 + "@",
        "-----BEGIN X-----",
        "AAAA\n-----END X-----",
    ],
    ids=lambda line: line[:8],
)
def test_a_log_of_a_hostile_guest_takes_no_time(line):
    """What costs a pattern most is done within seconds."""
    text = (line + "\n") * (support_bundle.LOG_MAX_BYTES // 8 // (len(line) + 1) + 1)
    began = time.process_time()
    Redactor(["hunter2" * number for number in range(1, 30)])(text)
    assert time.process_time() - began < SLOWEST_S


def test_the_machine_is_found_by_the_command(machine):
    """The fixture is the machine that ``ovm`` would find."""
    assert machines.find("default").directory == machine.directory
