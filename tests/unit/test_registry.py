"""Named machines and guest images: what is refused, and what the defaults are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ovm.errors import ImageError, OptionError
from ovm.machine import create
from ovm.model.options import Options
from ovm.registry import images, machines
from ovm.registry.create import create_ovm


def put_image(directory: Path, **changes: object) -> Path:
    """A guest image whose files hold their own names."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for role, name in (("kernel", "kernel"), ("initrd", "initrd"), ("rootfs", "rootfs.btrfs")):
        (directory / name).write_text(name)
        files[role] = {"size": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
    manifest = {"format": 1, "guest": "ovm", "arch": "amd64", "files": files, "versions": {"kernel": "6.12"}} | changes
    (directory / "image.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize("name", ["default", "a", "ci-3", "x_1.2", "A" * 32])
def test_ordinary_names_are_taken(name):
    """A name people would choose is taken as it is."""
    assert machines.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", "A" * 33])
def test_names_that_are_no_directory_are_refused(name):
    """A name that would lead elsewhere, hide, or not fit is refused."""
    with pytest.raises(OptionError, match="not a valid machine name"):
        machines.check_name(name)


def test_whole_image_is_loaded(tmp_path: Path):
    """A whole image gives its files and a version of each that follows its content."""
    image = images.load_image(put_image(tmp_path / "image"))
    assert image.arch == "amd64"
    assert image.path("rootfs") == tmp_path / "image" / "rootfs.btrfs"
    assert image.version("kernel") == "sha256:" + hashlib.sha256(b"kernel").hexdigest()


def test_missing_image_says_how_to_build_one(tmp_path: Path):
    """Without an image the error names the command that builds it."""
    with pytest.raises(ImageError, match="there is no guest image") as caught:
        images.load_image(tmp_path / "none")
    assert "ovm image build" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 99}, "format 99"),
        ({"guest": "other"}, "unknown kind: other"),
        ({"files": {}}, "lacks its kernel"),
        ({"format": "x"}, "cannot be read"),
    ],
)
def test_unknown_image_is_refused(tmp_path: Path, changes, said):
    """An image of another format, or without a file, is refused with what is wrong."""
    with pytest.raises(ImageError, match=said):
        images.load_image(put_image(tmp_path, **changes))


def test_cut_image_is_refused(tmp_path: Path):
    """A file shorter than its manifest says is never booted."""
    put_image(tmp_path)
    (tmp_path / "initrd").write_text("ini")
    with pytest.raises(ImageError, match="has 3 bytes instead of 6"):
        images.load_image(tmp_path)
    (tmp_path / "initrd").unlink()
    with pytest.raises(ImageError, match="initrd"):
        images.load_image(tmp_path)


async def test_origin_cannot_be_given_beside_an_image():
    """Files of one's own belong to create_linux_ovm; silently ignoring them would boot something else."""
    with pytest.raises(OptionError, match="origin_path"):
        await create_ovm(origin_path={})


async def test_everything_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name alone makes a machine: the default image, the helpers found here, directories of its own, no TCP."""
    asked: list[Options] = []

    async def fake(options: Options, **_more: object) -> Options:
        asked.append(options)
        return options

    monkeypatch.setenv("OVM_HOME", str(tmp_path))
    monkeypatch.setattr(create, "create_linux_ovm", fake)
    image = put_image(images.default_image_dir(images.host_arch()))
    await create_ovm("box", cpus=3, memoryMib=512)
    (options,) = asked
    assert options.origin_path.kernel == image / "kernel"
    assert options.origin_path.gvproxy is None
    assert options.versions.initrd == "sha256:" + hashlib.sha256(b"initrd").hexdigest()
    assert {options.target_dir.parent, options.log_dir.parent, options.ssh_key_dir.parent} == {
        tmp_path / "machines" / "box"
    }
    assert (options.cpus, options.memory_mib, options.podman_tcp) == (3, 512, False)
