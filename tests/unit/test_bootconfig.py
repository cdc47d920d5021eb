"""The boot configuration, read back by the real cpio."""

from __future__ import annotations

import subprocess

import pytest

from ovm.guest import bootconfig
from ovm.guest.bootconfig import BootConfig, cpio, fstab_escape

LEAST = BootConfig(
    authorized_key="ssh-ed25519 AAAA ovm\n",
    host_key="-----BEGIN OPENSSH PRIVATE KEY-----\nx\n-----END OPENSSH PRIVATE KEY-----\n",
    host_key_public="ssh-ed25519 BBBB\n",
    hostname="ovm",
    machine_id="0123456789abcdef" * 2,
)
EVERYTHING = BootConfig(
    **{name: getattr(LEAST, name) for name in ("authorized_key", "host_key", "host_key_public", "hostname")},
    machine_id=LEAST.machine_id,
    timezone="Europe/Berlin",
    name_servers=("192.0.2.1", "192.0.2.2"),
    search_domains=("example.org", "example.net"),
    environment={"HTTP_PROXY": "http://ü:1", "NO_PROXY": ""},
    ca_certificates={"00-a.crt": b"PEM\r\n\xff", "01-ü b.crt": b""},
    mounts=(("share0", "/a b\\c\td", False), ("share1", "/ro", True)),
    blocked_host_ports=(2223, 58125),
    foreign_arch=True,
    format_data=True,
)


def listing(archive: bytes) -> list[list[str]]:
    done = subprocess.run(["cpio", "-itvn", "--quiet"], input=archive, capture_output=True, check=True)
    return [line.split(maxsplit=8) for line in done.stdout.decode().splitlines()]


def unpacked(archive: bytes, where) -> dict[str, bytes]:
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=where, check=True, capture_output=True)
    return {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}


def test_cpio_reads_every_file_back(tmp_path):
    """The real cpio unpacks exactly the files of the contract, with their content."""
    assert unpacked(cpio(EVERYTHING.files()), tmp_path) == {
        "ovm/authorized_keys": b"ssh-ed25519 AAAA ovm\n",
        "ovm/ssh_host_ed25519_key": LEAST.host_key.encode(),
        "ovm/ssh_host_ed25519_key.pub": b"ssh-ed25519 BBBB\n",
        "ovm/hostname": b"ovm\n",
        "ovm/machine-id": LEAST.machine_id.encode() + b"\n",
        "ovm/timezone": b"Europe/Berlin\n",
        "ovm/dns": b"192.0.2.1\n192.0.2.2\n",
        "ovm/search": b"example.org example.net\n",
        "ovm/environment": "HTTP_PROXY=http://ü:1\nNO_PROXY=\n".encode(),
        "ovm/ca/00-a.crt": b"PEM\r\n\xff",
        "ovm/ca/01-ü b.crt": b"",
        "ovm/mounts": b"share0\t/a\\040b\\134c\\011d\trw\nshare1\t/ro\tro\n",
        "ovm/blocked-host-ports": b"2223\n58125\n",
        "ovm/foreign-arch": b"yes\n",
        "ovm/format-data": b"yes\n",
    }


def test_what_is_not_given_is_left_out():
    """Without a time zone, mounts and the like there is no such file, least of all leave to format."""
    wanted = {"authorized_keys", "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub", "hostname", "machine-id"}
    assert set(LEAST.files()) == wanted


def test_everything_is_roots_alone():
    """Directories are 0700, files 0600, all of root."""
    entries = listing(cpio(EVERYTHING.files()))
    assert {(entry[0], entry[2], entry[3]) for entry in entries} == {
        ("drwx------", "0", "0"),
        ("-rw-------", "0", "0"),
    }


def test_directories_come_before_what_is_in_them():
    """The kernel makes no directories of itself, so each comes before its files."""
    names = [entry[-1] for entry in listing(cpio(EVERYTHING.files()))]
    assert names[:2] == ["ovm", "ovm/ca"]
    assert names.count("ovm") == names.count("ovm/ca") == 1


@pytest.mark.parametrize("size", range(5))
def test_the_archive_begins_where_the_kernel_looks(tmp_path, size):
    """Behind an initrd of any length the archive begins at a multiple of four, and its own length is one."""
    initrd, destination = tmp_path / "initrd", tmp_path / "boot.initrd"
    initrd.write_bytes(b"I" * size)
    bootconfig.write_initrd(initrd, LEAST, destination)
    content = destination.read_bytes()
    begin = content.index(b"070701")
    assert content[:begin] == b"I" * size + bytes(-size % 4)
    assert begin % 4 == 0
    assert len(content) % 4 == 0
    assert content[begin:] == cpio(LEAST.files())


def test_cpio_reads_both_archives_of_one_file(tmp_path):
    """An initrd that is an archive itself and the one behind it are both read, as the kernel does it."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(cpio({"x": b"1"}))
    bootconfig.write_initrd(initrd, LEAST, tmp_path / "boot")
    boot = (tmp_path / "boot").read_bytes()
    second = boot[len(initrd.read_bytes()) :]
    assert [entry[-1] for entry in listing(boot)] == ["ovm", "ovm/x"]
    assert "ovm/hostname" in [entry[-1] for entry in listing(second)]


def test_the_initrd_of_a_boot_is_private(tmp_path):
    """The file that carries the private key is 0600, even where an open one lay before."""
    initrd, destination = tmp_path / "initrd", tmp_path / "boot.initrd"
    initrd.write_bytes(b"I")
    destination.write_bytes(b"old")
    destination.chmod(0o666)
    bootconfig.write_initrd(initrd, LEAST, destination)
    assert destination.stat().st_mode & 0o777 == 0o600


def test_a_link_in_its_place_is_not_followed(tmp_path):
    """The private key is not written through a link that somebody left."""
    initrd, destination, victim = tmp_path / "initrd", tmp_path / "boot.initrd", tmp_path / "victim"
    initrd.write_bytes(b"I")
    victim.write_text("precious")
    destination.symlink_to(victim)
    bootconfig.write_initrd(initrd, LEAST, destination)
    assert victim.read_text() == "precious"
    assert not destination.is_symlink()


@pytest.mark.parametrize(
    ("path", "escaped"),
    [("/a", "/a"), ("/a b", "/a\\040b"), ("\t", "\\011"), ("\n", "\\012"), ("\\", "\\134"), ("/ü,", "/ü,")],
)
def test_paths_are_escaped_as_in_fstab(path, escaped):
    """White space and backslashes of a path are written as fstab(5) wants them, the rest as it is."""
    assert fstab_escape(path) == escaped
