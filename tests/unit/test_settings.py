"""A machine's settings: what is taken, what is refused and with which line, and changes that keep what people wrote."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from ovm import errors
from ovm.cli.init import TEMPLATE
from ovm.model.options import Mount, Options
from ovm.registry import settings
from ovm.registry.settings import KINDS, RESTART_KEYS, PortSetting, Settings, changed, parse

FILE = Path("machine.toml")

WRITTEN = """\
# mine
cpus = 4       # of eight
memory = "3G"

mounts = [
  "/srv/data:/mnt/data:ro",
  "/opt",      # as it is called here
]
ports = ["8080:80", "0.0.0.0:5353:53/udp", "[::1]:2222:22"]
proxy = "none"

[environment]
TZ = "UTC"
"""


def test_what_is_written_is_understood():
    told = parse(WRITTEN, FILE)
    assert (told.cpus, told.memory, told.proxy, told.environment) == (4, 3072, "none", {"TZ": "UTC"})
    assert told.mounts == (Mount(Path("/srv/data"), "/mnt/data", read_only=True), Mount(Path("/opt")))
    assert told.ports == (
        PortSetting(8080, 80),
        PortSetting(5353, 53, "udp", "0.0.0.0"),
        PortSetting(2222, 22, "tcp", "::1"),
    )
    assert [str(port) for port in told.ports] == ["127.0.0.1:8080:80/tcp", "0.0.0.0:5353:53/udp", "[::1]:2222:22/tcp"]
    assert tuple(map(settings.port, map(str, told.ports))) == told.ports


def test_nothing_written_leaves_all_to_the_defaults():
    assert parse("", FILE) == Settings()
    assert Settings().options() == {
        "environment": {},
        "ca_certificates": (),
        "dns": (),
        "podman_tcp": False,
        "ssh_agent": False,
        "foreign_arch": False,
        "rosetta": False,
        "pause_on_sleep": True,
    }


def test_no_mounts_are_not_the_same_as_nothing_said_of_them():
    """On macOS some folders are shown unless others are chosen."""
    assert parse("mounts = []", FILE).options()["mounts"] == ()
    assert "mounts" not in parse("", FILE).options()


def test_settings_become_options():
    """By the names they have there; what is no option is left out."""
    told = parse('memory = "2G"\ndisk = "1T"\nports = ["1:2"]\nregister = true\nautostart = true\nhost_ca = true', FILE)
    assert {"memory_mib": 2048, "data_disk_mib": 1024 * 1024}.items() <= told.options().items()
    there = {field.name for field in dataclasses.fields(Options)} | {"image"}
    every = dict.fromkeys(KINDS, "x")
    assert set(Settings(**every).options()) <= there  # type: ignore[arg-type]


def test_each_setting_is_described():
    """docs/machines.md describes it in its table, or names it where it points to the option of the same name."""
    docs = Path(__file__).parents[2] / "docs"
    machines, options = ((docs / name).read_text("utf-8") for name in ("machines.md", "configuration.md"))
    described = re.findall(r"^\| `(\w+)` \|", machines, re.MULTILINE)
    (pointing,) = re.findall(r"These settings are the \[options\].* The others:", machines)
    pointed_to = re.findall(r"`(\w+)`", pointing)
    assert sorted(described + pointed_to) == sorted(TEMPLATE)
    assert set(pointed_to) <= set(re.findall(r"^\| `(\w+)` \|", options, re.MULTILINE))


def test_each_setting_has_a_kind():
    assert set(KINDS) == {field.name for field in dataclasses.fields(Settings)}
    assert set(KINDS) - RESTART_KEYS == {"autostart"}


@pytest.mark.parametrize(
    ("written", "mib"), [("2048", 2048), ('"2048"', 2048), ('"2048M"', 2048), ('"2 GiB"', 2048), ('"1t"', 1 << 20)]
)
def test_sizes(written, mib):
    assert parse(f"memory = {written}", FILE).memory == mib


def test_a_home_directory_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    told = parse('mounts = ["~/src:/src"]\nca_certificates = ["~/ca.pem"]\nimage = "~/image"', FILE)
    assert told.mounts == (Mount(Path("/home/you/src"), "/src"),)
    assert (told.ca_certificates, told.image) == ((Path("/home/you/ca.pem"),), "/home/you/image")


WRONG = [
    ("cpus = 0", 1, "not a whole number above 0"),
    ("\n\ncpus = 256", 3, "cpus=256 is not a whole number from 1 to 255"),
    ("cpus = true", 1, "cpus = True is not a whole number"),
    ('memory = "1.5G"', 1, "is not a size"),
    ("memory = 1", 1, "memory=1 is not a whole number from 256"),
    ("disk = 1", 1, "disk=1 is not a whole number from 256"),
    ("[[mounts]]\nhost = 1", 1, "is not like"),
    ('mounts = [\n  "/a",\n  "src",\n]', 3, "'src' is not an absolute path"),
    ('mounts = ["/a:/b:/c"]', 1, "is not like"),
    ('mounts = ["/a:/etc"]', 1, "cannot be a mount point"),
    ('mounts = ["/a", "/a"]', 1, "/a is mounted twice"),
    ('mounts = ["~no-such-user/x"]', 1, "there is no such home directory"),
    ('cpus = 1\nports = [\n  "80:80",\n  # web\n  "web",\n]', 5, "ports: 'web' is not like"),
    ('ports = ["99999:1"]', 1, "ports: host=99999 is not a whole number from 1 to 65535"),
    ('ports = ["1.2.3:1:1"]', 1, "is not an IP address"),
    ('ports = "80:80"', 1, "is not a list"),
    ('podman_tcp = "yes"', 1, "is not true or false"),
    ('publish_address = "here"', 1, "is not an IP address"),
    ('hostname = "a b"', 1, "is not a host name"),
    ('timezone = "a b"', 1, "is not the name of a time zone"),
    ("environment = 1", 1, "is not a table"),
    ('cpus = 1\n[environment]\nOK = "1"\n"a b" = "c"', 4, "'a b' is not a variable"),
    ('proxy = "mine"', 1, 'is not one of "host", "none"'),
    ('ca_certificates = ["ca.pem"]', 1, "is not an absolute path"),
    ('dns = ["9.9.9.9", "::1"]', 1, "'::1' is not an IPv4 address"),
    ('accelerator = ["kvm"]', 1, "is not one of"),
    ('kernel_cmdline = "a\\nb"', 1, "is not a string of one line"),
    ('image = "./mine"', 1, "is not an absolute path"),
    ('image = ""', 1, "is not the name of an image"),
    ("cpus = = 1", 1, "Invalid value"),
    ('cpus = 1\nmemory = """', 2, "Unterminated"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG, ids=[f"{n}" for n in range(len(WRONG))])
def test_what_is_wrong_is_told_with_its_line(text, line, message):
    with pytest.raises(errors.SettingsError) as wrong:
        parse(text, FILE)
    assert wrong.value.message.startswith(f"machine.toml:{line}: ")
    assert message in wrong.value.message


def test_each_setting_can_be_wrong():
    """The table above leaves none out whose kind could fail."""
    named = {key for text, _, _ in WRONG for key in KINDS if re.search(rf"^\[*{key}\b", text, re.MULTILINE)}
    switches = {key for key, kind in KINDS.items() if kind is KINDS["podman_tcp"]}
    assert named | switches == set(KINDS)


def test_a_slip_of_the_pen_is_recognised():
    with pytest.raises(errors.SettingsError, match=r"^machine.toml:2: there is no setting 'cpu'") as wrong:
        parse('memory = "2G"\ncpu = 2', FILE)
    assert wrong.value.hint == "did you mean cpus?"
    with pytest.raises(errors.SettingsError) as wrong:
        parse("zzz = 2", FILE)
    assert "cpus, memory" in wrong.value.hint


def test_no_variable_is_shown():
    """It may be a proxy's password."""
    for text in ("[environment]\nSECRET = 12345", '[environment]\nSECRET = "12345\\n"\nOTHER = "12345"'):
        with pytest.raises(errors.SettingsError, match="SECRET is not a string") as wrong:
            parse(text, FILE)
        assert "12345" not in str(wrong.value)


def test_a_change_keeps_what_people_wrote():
    after = changed(changed(WRITTEN, "cpus", "2"), "disk", "128G")
    assert "cpus = 2       # of eight\n" in after
    assert [line for line in WRITTEN.splitlines() if line not in after.splitlines()] == ["cpus = 4       # of eight"]
    assert parse(after, FILE) == dataclasses.replace(parse(WRITTEN, FILE), cpus=2, disk=128 * 1024)


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("hostname", "box", "box"),
        ("hostname", '"box"', "box"),
        ("kernel_cmdline", "quiet # x", "quiet # x"),
        ("hostname", "5", "5"),
        ("register", "true", True),
        ("ports", "1:2,3:4", ["1:2", "3:4"]),
        ("ports", '["1:2", "3:4"]', ["1:2", "3:4"]),
        ("mounts", '["/a,b"]', ["/a,b"]),
        ("dns", "", []),
        ("environment", '{ A = "b" }', {"A": "b"}),
        ("environment.HTTP_PROXY", "http://proxy.example:3128", {"HTTP_PROXY": "http://proxy.example:3128"}),
        ("environment.A", "true", {"A": "true"}),
    ],
)
def test_what_is_typed_on_a_command_line(key, value, meant):
    assert tomllib.loads(changed("", key, value)) == {key.partition(".")[0]: meant}


@pytest.mark.parametrize(
    "written", ['[environment]\nA = "1"\n', 'environment = { A = "1" }\n', 'environment.A = "1"\n']
)
def test_one_variable_however_they_are_written(written):
    text = changed(f"cpus = 1\n{written}", "environment.B", "2")
    assert parse(text, FILE).environment == {"A": "1", "B": "2"}
    assert parse(changed(text, "environment.A", None), FILE).environment == {"B": "2"}
    assert tomllib.loads(changed(changed(text, "environment.A", None), "environment.B", None)) == {"cpus": 1}
    assert parse(changed(text, "memory", "2G"), FILE).memory == 2048


def test_a_setting_taken_away():
    assert tomllib.loads(changed(WRITTEN, "environment", None)).keys() == tomllib.loads(WRITTEN).keys() - {
        "environment"
    }
    assert changed("", "cpus", None) == ""
    assert changed("", "environment.A", None) == ""


@pytest.mark.parametrize(
    ("text", "key", "value", "message"),
    [
        ("", "cpu", "2", "there is no setting 'cpu'"),
        ("", "cpus.x", "2", "there is no setting 'cpus.x'"),
        ("", "cpu", None, "there is no setting 'cpu'"),
        ("", "cpus", "many", "cpus = 'many' is not"),
        ("", "environment.a b", "x", "'a b' is not a variable"),
        ("cpus = = 1", "memory", "2G", "machine.toml:1: "),
        ("\ncpu = 1", "memory", "2G", "machine.toml:2: there is no setting 'cpu'"),
    ],
)
def test_a_change_that_cannot_be(text, key, value, message):
    with pytest.raises(errors.SettingsError) as wrong:
        changed(text, key, value, FILE)
    assert wrong.value.message.startswith(message) or message in wrong.value.message


def test_what_was_wrong_can_be_set_right():
    assert parse(changed("cpus = 0", "cpus", "1"), FILE).cpus == 1
    assert parse(changed("environment = 5", "environment.A", "1"), FILE).environment == {"A": "1"}


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "cpus": st.integers(1, 255).map(str),
    "memory": st.integers(256, 1 << 20).map(lambda mib: f"{mib}M"),
    "ports": st.lists(st.integers(1, 65535).map(lambda port: f"{port}:80"), max_size=3).map(",".join),
    "kernel_cmdline": st.text(st.characters(codec="utf-8"), max_size=20).filter(str.isprintable),
    "environment.A": st.text(st.characters(codec="utf-8"), max_size=20).filter(str.isprintable),
    "register": st.sampled_from(["true", "false"]),
}


@fuzz.examples(500)
@given(st.lists(st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.tuples(st.just(key), VALUES[key] | st.none()))))
def test_any_changes_touch_nothing_else(changes):
    """Whatever was set before, a change leaves every other setting, and the comments."""
    text = WRITTEN
    for key, value in changes:
        before, after = parse(text, FILE), parse(text := changed(text, key, value), FILE)
        name = key.partition(".")[0]
        assert dataclasses.replace(after, **{name: getattr(before, name)}) == before
        assert "# mine" in text
