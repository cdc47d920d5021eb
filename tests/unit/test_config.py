"""Options: checked before anything is touched, each mistake with words of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import string
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovm.errors import OptionError
from ovm.model.options import Mount, Options, OriginPath, Versions
from ovm.model.validation import check_address, check_port

SEED = MappingProxyType(
    {
        "originPath": {
            "gvproxy": "/example/gvproxy",
            "vfkit": "/example/vfkit",
            "initrd": "/example/initrd",
            "kernel": "/example/bzImage",
            "rootfs": "/example/rootfs.btrfs",
        },
        "socketDir": "/example/socket",
        "logDir": "/example/log",
        "targetDir": "/example/target",
        "sshKeyDir": "/example/ssh",
        "versions": {"gvproxy": "1.0.0", "vfkit": "1.0.0", "initrd": "1.0.0", "kernel": "1.0.0", "rootfs": "1.0.0"},
    }
)
"""The example of the seed's README."""


def test_the_seeds_example_is_understood():
    """The seed's own example, camelCase keys and all, makes the options it describes."""
    options = Options.of(SEED)
    assert options.origin_path == OriginPath(
        gvproxy=Path("/example/gvproxy"),
        kernel=Path("/example/bzImage"),
        initrd=Path("/example/initrd"),
        rootfs=Path("/example/rootfs.btrfs"),
        vfkit=Path("/example/vfkit"),
    )
    assert options.versions == Versions(gvproxy="1.0.0", kernel="1.0.0", initrd="1.0.0", rootfs="1.0.0", vfkit="1.0.0")
    assert options.target_dir == Path("/example/target")
    assert options.socket_dir == Path("/example/socket")
    assert options.log_dir == Path("/example/log")
    assert options.ssh_key_dir == Path("/example/ssh")


def test_snake_case_and_keywords_say_the_same():
    """snake_case keys, camelCase keys and keywords can be mixed, and make the same options."""
    mixed = {k: SEED[k] for k in ("originPath", "socketDir", "logDir")} | {"target_dir": "/example/target"}
    assert Options.of(mixed, ssh_key_dir="/example/ssh", versions=SEED["versions"]) == Options.of(SEED)


def test_options_can_be_varied_by_keyword():
    """Keywords on top of an object are converted and checked as in a mapping."""
    options = Options.of(SEED)
    assert Options.of(options) == options
    varied = Options.of(options, targetDir="/other", mounts=[{"hostPath": "/home"}])
    assert varied.target_dir == Path("/other")
    assert varied.mounts == (Mount(Path("/home")),)
    assert dataclasses.replace(varied, target_dir=options.target_dir, mounts=()) == options


def test_paths_are_made_absolute(monkeypatch, tmp_path):
    """A relative path is taken from the working directory of the call, and ~ is the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    options = Options.of(SEED, target_dir="target", log_dir="~/log")
    assert options.target_dir == tmp_path / "target"
    assert options.log_dir == Path("/home/somebody/log")


def test_options_are_frozen():
    """Options cannot be changed behind the machine's back."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options.of(SEED).cpus = 3


WRONG = [
    ({"cpus": 0}, "cpus=0 is not a whole number from 1 to 255"),
    ({"cpus": 256}, "cpus=256"),
    ({"cpus": True}, "cpus=True"),
    ({"cpus": "2"}, "cpus='2'"),
    ({"cpus": 2.0}, "cpus=2.0"),
    ({"cpus": None}, "cpus=None"),
    ({"memory_mib": 255}, "memory_mib=255 is not a whole number from 256"),
    ({"data_disk_mib": 1}, "data_disk_mib=1 is not a whole number from 256"),
    ({"accelerator": "warp"}, "accelerator='warp' is unknown"),
    ({"accelerator": None}, "accelerator=None is unknown"),
    ({"guest": "windows"}, "guest='windows' is unknown"),
    ({"hostname": "-x"}, "hostname='-x' is not a host name"),
    ({"hostname": "a.b"}, "hostname='a.b' is not a host name"),
    ({"hostname": "a\n"}, "is not a host name"),
    ({"hostname": ""}, "is not a host name"),
    ({"hostname": "x" * 64}, "is not a host name"),
    ({"hostname": None}, "hostname=None is not text"),
    ({"publish_address": "localhost"}, "publish_address='localhost' is not an IP address"),
    ({"publish_address": ""}, "publish_address='' is not an IP address"),
    ({"publish_address": 0}, "publish_address=0 is not an IP address"),
    ({"kernel_cmdline": "a\nb"}, "kernel_cmdline must be one line"),
    ({"kernel_cmdline": None}, "kernel_cmdline=None is not text"),
    ({"environment": {"A B": "x"}}, "environment: 'A B' is not a variable"),
    ({"environment": {"1A": "x"}}, "environment: '1A' is not a variable"),
    ({"environment": {"A": "x\ny"}}, "environment: 'A' is not a variable name with a one-line value"),
    ({"environment": {"A": "x\0"}}, "environment: 'A' is not a variable name with a one-line value"),
    ({"environment": ["A=1"]}, "environment=['A=1'] is not a mapping"),
    ({"timezone": "Europe/Berlin\n"}, "is not the name of a time zone"),
    ({"timezone": 3j}, "timezone=3j is not the name"),
    ({"ssh_agent": 1}, "ssh_agent=1 is not True or False"),
    ({"foreign_arch": "arm64"}, "foreign_arch='arm64' is not True or False"),
    ({"podman_tcp": "no"}, "podman_tcp='no' is not True or False"),
    ({"mounts": [{"host_path": "/a"}, {"host_path": "/b", "guest_path": "/a/"}]}, "mounts: /a is mounted twice"),
    ({"mounts": ["/a"]}, "Mount cannot be made from str"),
    ({"mounts": "/a"}, "mounts='/a' is not a list"),
    ({"mounts": [{}]}, "Mount: host_path must be given"),
    ({"mounts": [{"hostPth": "/a"}]}, "there is no option 'hostPth'"),
    ({"ca_certificates": "/a.pem"}, "ca_certificates='/a.pem' is not a list"),
    ({"ca_certificates": [5]}, "ca_certificates=5 is not a path"),
    ({"dns": "192.0.2.1"}, "dns='192.0.2.1' is not a list"),
    ({"dns": ["192.0.2.1", "dns.example"]}, "dns: 'dns.example' is not an IPv4 address"),
    ({"dns": [53]}, "dns: 53 is not an IPv4 address"),
    ({"dns": ["2001:db8::1"]}, "dns: '2001:db8::1' is not an IPv4 address"),
    ({"dns": ["127.0.0.53"]}, "dns: 127.0.0.53 is the guest itself"),
    ({"dns": ["192.0.2.1"] * 4}, "dns: 4 name servers are more than the 3"),
    ({"target_dir": 5}, "target_dir=5 is not a path"),
    ({"target_dir": ""}, "target_dir='' is not a path"),
    ({"log_dir": "a\0b"}, "is not a path"),
    ({"origin_path": "/x"}, "origin_path='/x' is not an OriginPath"),
    ({"origin_path": {"gvproxy": "/g"}}, "OriginPath: kernel, initrd, rootfs must be given"),
    ({"versions": ["1"]}, "versions=['1'] is not a Versions"),
    ({"versions": {**SEED["versions"], "kernel": 6}}, "versions: kernel is not a string"),
    ({"versions": {k: v for k, v in SEED["versions"].items() if k != "vfkit"}}, "versions lacks vfkit"),
    ({"versions": {**SEED["versions"], "qemu": "1"}}, "there is no option 'qemu'"),
    ({"sha256": "0" * 64}, "is not a mapping"),
    ({"sha256": {"qemu": "0" * 64}}, "sha256: there is no origin 'qemu'"),
    ({"sha256": {"kernel": "0" * 63}}, "is not a SHA-256"),
    ({"sha256": {"kernel": "A" * 64}}, "is not a SHA-256"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_every_wrong_option_is_told_by_name(wrong, words):
    """A wrong option is an OptionError whose message names it and what is wrong with it."""
    with pytest.raises(OptionError) as caught:
        Options.of(SEED, **wrong)
    assert words in caught.value.message


@pytest.mark.parametrize("key", ["originPath", "targetDir", "socketDir", "logDir", "sshKeyDir", "versions"])
def test_what_has_no_default_must_be_given(key):
    """Leaving out one of the six is an OptionError that names it."""
    with pytest.raises(OptionError, match="must be given"):
        Options.of({k: v for k, v in SEED.items() if k != key})


@pytest.mark.parametrize(
    ("key", "meant"), [("memory", "memory_mib"), ("targetdir", "target_dir"), ("mount", "mounts"), ("cpu", "cpus")]
)
def test_an_unknown_option_suggests_the_one_meant(key, meant):
    """A misspelt option is refused with the nearest real one as a hint."""
    with pytest.raises(OptionError, match=f"there is no option '{key}'") as caught:
        Options.of(SEED, **{key: 1})
    assert caught.value.hint == f"did you mean {meant}?"


def test_an_option_like_no_other_gets_the_whole_list():
    """Where nothing is near, the hint lists what there is."""
    with pytest.raises(OptionError) as caught:
        Options.of(SEED, zzzz=1)
    assert "target_dir" in caught.value.hint


def test_options_are_no_list():
    """Something that is no mapping at all is refused by its type."""
    with pytest.raises(OptionError, match="Options cannot be made from list"):
        Options.of([1])


def test_defaults_make_sense():
    """By default nothing listens beyond loopback, and there is at least one CPU."""
    options = Options.of(SEED)
    assert options.publish_address == "127.0.0.1"
    assert options.cpus >= 1
    assert options.mounts == ()


# -- mounts


def test_a_mount_lies_where_it_does_on_the_host():
    """Without a guest path, a folder has the same path in the guest."""
    assert Mount(Path("/home/me/src")).guest_path == "/home/me/src"


@pytest.mark.parametrize(
    ("given", "used"), [("/data", "/data"), ("/data/", "/data"), ("//data//x/./", "/data/x"), ("/päth x", "/päth x")]
)
def test_a_guest_path_has_one_spelling(given, used):
    """Different spellings of one path are one path."""
    assert Mount(Path("/h"), given).guest_path == used


@pytest.mark.parametrize(
    "guest",
    ["/", "//", "/.", "/etc", "/etc/", "//etc", "/./usr", "/var/lib/containers/", "/a/../etc", "/..", "data", "../x"],
)
def test_the_guests_own_directories_cannot_be_mounted_over(guest):
    """A guest path that would hide the guest's own files, in any spelling, is refused."""
    with pytest.raises(OptionError, match="cannot be a mount point"):
        Mount(Path("/h"), guest)


@pytest.mark.parametrize("host", ["src", "./src", ""])
def test_a_host_path_is_absolute(host):
    """A relative host folder is refused where it is written down, not at the start."""
    with pytest.raises(OptionError, match="not absolute"):
        Mount(Path(host), "/data")


@pytest.mark.parametrize(("host", "guest"), [("/h\0", ""), ("/h", "/g\0")])
def test_no_path_has_a_nul(host, guest):
    """A NUL in a mount's path is an OptionError."""
    with pytest.raises(OptionError, match="NUL"):
        Mount(Path(host), guest)


def test_a_mount_of_no_path_is_refused():
    """A host path that is none is an OptionError."""
    with pytest.raises(OptionError, match="host_path=5 is not a path"):
        Mount(5)


# -- whatever comes


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + "-", min_size=1, max_size=70))
def test_host_names_are_those_of_the_rfc(name):
    """A host name is taken exactly if it is 1 to 63 letters, digits and inner dashes."""
    legal = len(name) <= 63 and not name.startswith("-") and not name.endswith("-")
    try:
        Options.of(SEED, hostname=name)
    except OptionError:
        assert not legal
    else:
        assert legal


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.none() | st.integers() | st.text(max_size=20), max_size=4))
def test_whatever_is_given_the_error_is_ours(options):
    """No mapping, however odd, makes anything but options or an OptionError."""
    with contextlib.suppress(OptionError):
        Options.of({**SEED, **options})


FIELDS = st.sampled_from([field.name for field in dataclasses.fields(Options)])
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=2)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(FIELDS, VALUES | st.dictionaries(st.text(max_size=9), VALUES, max_size=2), max_size=2))
def test_whatever_value_an_option_has_the_error_is_ours(options):
    """No value of a known option makes anything but options or an OptionError."""
    with contextlib.suppress(OptionError):
        Options.of(SEED, **options)


@pytest.mark.parametrize("port", [0, 65536, -1, True, "80", 80.0, None])
def test_what_is_no_port_is_refused(port):
    """A port is a whole number from 1 to 65535."""
    with pytest.raises(OptionError, match=r"p=.* is not a whole number from 1 to 65535"):
        check_port("p", port)


def test_ports_and_addresses_pass():
    """Real ports and addresses of both families are taken."""
    assert [check_port("p", n, lowest=0) for n in (0, 1, 65535)] == [0, 1, 65535]
    for address in ("127.0.0.1", "0.0.0.0", "::1", "::"):
        check_address("a", address)
