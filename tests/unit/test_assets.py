"""Wrong inputs are refused before anything is touched, each with words of its own."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovm.disks import plan
from ovm.errors import ArchiveError, FileError, HelperError, InputError, UnsupportedError
from ovm.model.options import OriginPath


def kernel(arch: str) -> bytes:
    offset, magic = {"x86_64": (0x202, b"HdrS"), "arm64": (0x38, b"ARM\x64")}[arch]
    return b"MZ" + bytes(offset - 2) + magic + bytes(1024)


def btrfs(size: int = 0x11000, total: int = 0) -> bytes:
    image = bytearray(size)
    image[0x10040:0x10048] = b"_BHRfS_M"
    image[0x10070:0x10078] = total.to_bytes(8, "little")
    image[4096:4106] = b"super data"
    return bytes(image)


def zipped(content: bytes = btrfs()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("rootfs.btrfs", content)
    return buffer.getvalue()


@pytest.fixture
def origin(tmp_path: Path) -> OriginPath:
    """Origins no one can object to, on an x86_64 host."""
    contents = {"gvproxy": b"#!", "bzImage": kernel("x86_64"), "initrd": b"070701", "rootfs.btrfs": btrfs()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gvproxy").chmod(0o755)
    return OriginPath(
        gvproxy=tmp_path / "gvproxy",
        kernel=tmp_path / "bzImage",
        initrd=tmp_path / "initrd",
        rootfs=tmp_path / "rootfs.btrfs",
    )


def with_rootfs(origin: OriginPath, name: str, content: bytes) -> OriginPath:
    path = origin.rootfs.with_name(name)
    path.write_bytes(content)
    return OriginPath(gvproxy=origin.gvproxy, kernel=origin.kernel, initrd=origin.initrd, rootfs=path)


def refused(kind: type[InputError], words: str, origin: OriginPath, **options: bool) -> None:
    with pytest.raises(kind, match=words) as error:
        plan.check_origins(origin, arch="x86_64", **options)
    assert type(error.value) is kind
    assert error.value.hint


# --- which files to replace


@pytest.mark.parametrize(
    ("recorded", "there", "force", "reason"),
    [
        ({"kernel": "1"}, {"kernel"}, False, None),
        ({"kernel": "1"}, {"kernel"}, True, "forced"),
        ({"kernel": "1"}, set(), False, "missing"),
        ({"kernel": "0"}, {"kernel"}, False, "version"),
        ({"kernel": "1 "}, {"kernel"}, False, "version"),
        ({}, {"kernel"}, False, "version"),
        ({}, set(), False, "missing"),
        ({"initrd": "1"}, {"initrd"}, False, "missing"),
    ],
)
def test_a_file_is_replaced_when_forced_missing_or_of_another_version(recorded, there, force, reason):
    items = plan.plan({"kernel": Path("/o/bzImage")}, {"kernel": "1"}, recorded, there, force=force)
    assert [item.reason for item in items] == ([reason] if reason else [])
    assert all(item == plan.Item("kernel", Path("/o/bzImage"), "bzImage", reason) for item in items)


def test_each_file_is_decided_for_itself():
    origins = {name: Path(f"/o/{name}") for name in ("gvproxy", "kernel", "initrd")}
    items = plan.plan(origins, dict.fromkeys(origins, "2"), {"gvproxy": "2", "kernel": "1"}, {"gvproxy", "kernel"})
    assert [(item.name, item.reason) for item in items] == [("kernel", "version"), ("initrd", "missing")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"{",
        b"[]",
        b"null",
        b'"kernel"',
        b'{"kernel": 1}',
        b'{"kernel": "1", "rootfs": null}',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"kernel": ' + b"9" * 10_000 + b"}",
        b'{"kernel": "' + b"x" * plan.RECORD_MAX_BYTES + b'"}',
    ],
)
def test_a_hostile_record_records_nothing(content):
    assert plan.recorded_versions(content) == {}


texts = st.text('a\0é\ud800"', max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.binary() | st.recursive(st.none() | texts | st.floats(), lambda x: st.dictionaries(texts, x), max_leaves=4))
def test_no_record_can_raise(given_):
    content = given_ if isinstance(given_, bytes) else json.dumps(given_).encode()
    found = plan.recorded_versions(content)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in found.items())


def test_a_record_of_the_seed_is_read():
    versions = {"gvproxy": "1.0.0", "rootfs": "ä"}
    assert plan.recorded_versions(json.dumps(versions, indent=2).encode()) == versions


# --- files


def test_good_origins_pass(origin):
    plan.check_origins(origin, arch="x86_64")
    plan.check_origins(with_rootfs(origin, "rootfs.btrfs.ZIP", zipped()), arch="AMD64")


@pytest.mark.parametrize("name", ["gvproxy", "kernel", "initrd", "rootfs"])
def test_every_origin_must_be_a_file_with_content(origin, name, tmp_path):
    path: Path = getattr(origin, name)
    kind = HelperError if name == "gvproxy" else FileError

    def changed(to: Callable[[], object]) -> OriginPath:
        path.unlink()
        to()
        return origin

    refused(kind, f"{name}: .* is empty", changed(path.touch))
    refused(kind, f"{name}: .* is a dangling symbolic link", changed(lambda: path.symlink_to(tmp_path / "no")))
    refused(kind, f"{name}: .* is not a regular file", changed(lambda: os.mkfifo(path)))
    refused(kind, f"{name}: .* is a directory", changed(path.mkdir))
    path.rmdir()
    refused(kind, f"{name}: .* does not exist", origin)
    path.parent.joinpath("f").touch()
    beyond = OriginPath(**{**origin.named(), name: tmp_path / "f" / "x"})
    refused(kind, f"{name}: .* cannot be read: Not a directory", beyond)


def test_an_unreadable_origin_is_named(origin, monkeypatch):
    if os.geteuid():
        origin.initrd.chmod(0)
    else:  # root may read anything
        monkeypatch.setattr(os, "access", lambda path, mode: path != origin.initrd)
    refused(FileError, "initrd: .* is not readable for you", origin)


def test_a_program_must_be_executable(origin):
    origin.gvproxy.chmod(0o644)
    refused(HelperError, "gvproxy: .* is not executable", origin)


def test_two_origins_must_not_become_one_file(origin, tmp_path):
    (tmp_path / "b").mkdir()
    other = (tmp_path / "b" / "BZIMAGE").with_suffix(".zip")
    other.write_bytes(zipped())
    clash = OriginPath(gvproxy=origin.gvproxy, kernel=origin.kernel, initrd=origin.initrd, rootfs=other)
    refused(FileError, "kernel and rootfs would both become BZIMAGE", clash)


@pytest.mark.parametrize(
    "name",
    [
        *("data.img", "scratch.img", "versions.json", "digests.json", "machine.json.zip", "ovm.lock", ".ovm-new.x"),
        *("memory.suspended", "suspended.json", "SUSPENDED.json.zip"),
    ],
)
def test_an_origin_must_not_take_a_name_of_ours(origin, name):
    """An origin file that has the name of one of ovm's own files in ``target_dir`` is refused."""
    refused(FileError, "is a reserved file name", with_rootfs(origin, name, btrfs()))


# --- kernels


@pytest.mark.parametrize(
    ("content", "arch", "words"),
    [
        (kernel("arm64"), "x86_64", "is an arm64 kernel, this host is x86_64"),
        (kernel("x86_64"), "aarch64", "is an x86_64 kernel, this host is arm64"),
        (gzip.compress(kernel("arm64"), mtime=0), "x86_64", "is an arm64 kernel, this host is x86_64"),
        (gzip.compress(kernel("x86_64"), mtime=0), "aarch64", "is an x86_64 kernel, this host is arm64"),
        (gzip.compress(kernel("x86_64"), mtime=0), "x86_64", "is a kernel compressed with gzip"),
        (gzip.compress(bytes(4096), mtime=0), "arm64", r"\(gzip\) is damaged, or is not a kernel"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "arm64", r"\(zstd\) is damaged, or is not a kernel"),
        (b"MZ\0\0zimg" + bytes(600), "arm64", "compressed file .zboot"),
        (b"MZ\0\0zimg\0\x10\0\0\0\x10\0\0" + bytes(600), "arm64", "is truncated: 616 bytes of 8192"),
        (b"\xfd7zXZ\0" + bytes(600), "arm64", "compressed file .xz"),
        (b"\x1f\x8b\xff", "x86_64", "compressed file .gzip"),
        (b"\x7fELF" + bytes(600), "x86_64", "ELF file"),
        (b"short", "x86_64", "is not a Linux kernel for x86_64"),
        (bytes(4096), "arm64", "is not a Linux kernel for arm64"),
    ],
)
def test_a_kernel_that_cannot_boot_is_refused(tmp_path, content, arch, words):
    path = tmp_path / "kernel"
    path.write_bytes(content)
    with pytest.raises(FileError, match=words) as error:
        plan.check_kernel(path, arch)
    assert error.value.hint


@pytest.mark.parametrize(("arch", "host"), [("x86_64", "x86_64"), ("arm64", "arm64"), ("arm64", "aarch64")])
def test_a_kernel_of_the_hosts_architecture_passes(tmp_path, arch, host):
    path = tmp_path / "kernel"
    path.write_bytes(kernel(arch))
    plan.check_kernel(path, host)


@pytest.mark.parametrize("host", ["arm64", "aarch64"])
def test_a_packed_arm64_kernel_passes(tmp_path, host):
    path = tmp_path / "vmlinuz"
    path.write_bytes(gzip.compress(kernel("arm64")))
    plan.check_kernel(path, host)


@pytest.mark.parametrize(
    ("name", "path", "target"),
    [
        ("kernel", "/o/Image.gz", "Image"),
        ("kernel", "/o/vmlinuz-6.12.ZST", "vmlinuz-6.12"),
        ("kernel", "/o/vmlinuz-6.12.43", "vmlinuz-6.12.43"),
        ("kernel", "/o/.gz", ".gz"),
        ("initrd", "/o/initrd.gz", "initrd.gz"),
        ("rootfs", "/o/rootfs.btrfs.zip", "rootfs.btrfs"),
    ],
)
def test_what_is_unpacked_loses_the_end_of_its_name(name, path, target):
    assert plan.target_name(name, Path(path)) == target


def test_an_architecture_without_machines_is_named(tmp_path):
    with pytest.raises(UnsupportedError, match="ovm does not support riscv64 guests"):
        plan.check_kernel(tmp_path, "riscv64")


# --- initrds


@pytest.mark.parametrize("magic", ["1f8b", "28b52ffd", "fd377a585a00", "02214c18", "303730373031", "303730373032"])
def test_what_the_kernel_unpacks_is_an_initrd(origin, magic):
    origin.initrd.write_bytes(bytes.fromhex(magic) + bytes(32))
    plan.check_origins(origin, arch="x86_64")


@pytest.mark.parametrize(
    ("content", "words"), [(b"hello", "is not an initrd"), (bytes.fromhex("04224d18"), "uses an lz4 format")]
)
def test_anything_else_is_not(origin, content, words):
    origin.initrd.write_bytes(content)
    refused(FileError, words, origin)


# --- root file systems


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(0x11000), "rootfs.btrfs is not a btrfs file system"),
        (b"x" * 512, "is not a btrfs file system"),
        (btrfs(0x11001), "is 69633 bytes long, not a multiple of 512"),
        (btrfs(total=1 << 30), "is truncated: 69632 of 1073741824 bytes"),
        (zipped(), "is a zip archive"),
    ],
)
def test_a_rootfs_must_be_a_whole_btrfs(origin, content, words):
    refused(FileError, words, with_rootfs(origin, "rootfs.btrfs", content))
    if not content.startswith(b"PK"):
        refused(ArchiveError, "the file in .*" + words.removeprefix("rootfs.btrfs"), with_zip(origin, zipped(content)))


def with_zip(origin: OriginPath, content: bytes) -> OriginPath:
    return with_rootfs(origin, "rootfs.btrfs.zip", content)


def test_a_bare_guest_takes_any_disk(origin):
    plan.check_origins(with_rootfs(origin, "disk", b"x" * 512), arch="x86_64", rootfs_must_be_btrfs=False)
    plan.check_origins(with_zip(origin, zipped(b"x" * 512)), arch="x86_64", rootfs_must_be_btrfs=False)
    refused(FileError, "not a multiple of 512", with_rootfs(origin, "disk", b"x"), rootfs_must_be_btrfs=False)
    refused(FileError, "is empty", with_rootfs(origin, "disk", b""), rootfs_must_be_btrfs=False)


def test_a_hostile_archive_is_refused_before_anything_is_unpacked(origin):
    refused(ArchiveError, "not a complete zip", with_zip(origin, zipped()[:-30]))


# --- directories


def test_directories_that_can_be_made_or_used_pass(tmp_path):
    plan.check_directories({"target_dir": tmp_path, "log_dir": tmp_path / "not" / "yet"})
    assert not (tmp_path / "not").exists()


def test_a_file_in_a_directorys_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(FileError, match=r"socket_dir: .* is not a directory"):
            plan.check_directories({"socket_dir": path})


def test_a_directory_must_be_writable(tmp_path, monkeypatch):
    if os.geteuid():
        tmp_path.chmod(0o500)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FileError, match=r"ssh_key_dir: .* cannot be written to"):
        plan.check_directories({"ssh_key_dir": tmp_path})
    with pytest.raises(FileError, match=r"ssh_key_dir: .* cannot be created: .* is not writable"):
        plan.check_directories({"ssh_key_dir": tmp_path / "new"})
    tmp_path.chmod(0o700)
