"""Images on disk: described, verified, listed, removed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from importlib import resources

import pytest

from ovm.errors import ImageError
from ovm.image import list_images, load_image, remove_image, verify_image
from ovm.image.build import guest_files, guest_lines


def make_image(directory, **changes):
    directory.mkdir(parents=True)
    files = {}
    for name, file in {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}.items():
        content = name.encode() * 100
        (directory / file).write_bytes(content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    description = {
        "format": 1,
        "guest": "ovm",
        "arch": "amd64",
        "suite": "trixie",
        "versions": {"podman": "5.4.2"},
        "tree_sha256": "0" * 64,
        "packages": {"podman": "5.4.2"},
        "files": files,
    } | changes
    (directory / "image.json").write_text(json.dumps(description))
    return directory


def test_load(tmp_path):
    """An image knows where it is and what is in it."""
    image = load_image(make_image(tmp_path / "a"))
    assert image.versions["podman"] == "5.4.2"
    assert image.path("rootfs") == tmp_path / "a" / "rootfs.btrfs"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "another kind"),
        ({"guest": "other"}, "another kind"),
        ({"arch": "mips"}, "arch"),
        ({"tree_sha256": "short"}, "tree_sha256"),
        ({"files": {}}, "does not list the kernel"),
        ({"packages": ["podman"]}, "packages"),
    ],
)
def test_descriptions_that_are_refused(tmp_path, changes, complaint):
    """The error names what is wrong with it."""
    with pytest.raises(ImageError, match=complaint):
        load_image(make_image(tmp_path / "a", **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_description_that_is_none(tmp_path, text):
    """A cut file is not an image."""
    (make_image(tmp_path / "a") / "image.json").write_text(text)
    with pytest.raises(ImageError):
        load_image(tmp_path / "a")


def test_a_missing_and_a_cut_file(tmp_path):
    """Both are noticed without reading the files."""
    image = make_image(tmp_path / "a")
    os.truncate(image / "initrd", 10)
    with pytest.raises(ImageError, match="initrd has 10 bytes"):
        load_image(image)
    (image / "initrd").unlink()
    with pytest.raises(ImageError, match="initrd is missing"):
        load_image(image)


async def test_verify_names_the_flipped_file(tmp_path):
    """One byte is enough."""
    image = make_image(tmp_path / "a")
    await verify_image(image)
    with (image / "rootfs.btrfs").open("r+b") as file:
        file.write(b"R")
    with pytest.raises(ImageError, match=r"rootfs\.btrfs is damaged"):
        await verify_image(image)


def test_list_leaves_out_what_is_no_image(tmp_path):
    """Builds under way, damaged images and other directories are not offered."""
    make_image(tmp_path / "b")
    make_image(tmp_path / "a")
    make_image(tmp_path / ".a.building-x")
    make_image(tmp_path / "broken", format=9)
    (tmp_path / "else").mkdir()
    assert [image.directory.name for image in list_images(tmp_path)] == ["a", "b"]
    assert list_images(tmp_path / "nowhere") == []


def test_remove(tmp_path):
    """A damaged image of ours can be removed too."""
    image = make_image(tmp_path / "a")
    (image / "kernel").unlink()
    remove_image(image)
    assert not image.exists()


@pytest.mark.parametrize("guest", [None, "other"])
def test_remove_spares_what_is_not_ours(tmp_path, guest):
    """A wrong name must not cost a directory."""
    directory = tmp_path / "precious"
    if guest:
        make_image(directory, guest=guest)
    else:
        directory.mkdir()
    (directory / "file").write_text("kept")
    with pytest.raises(ImageError, match="left alone"):
        remove_image(directory)
    assert (directory / "file").read_text() == "kept"


# The tree's digest


@pytest.fixture
def tree(tmp_path):
    directory = tmp_path / "tree"
    (directory / "etc").mkdir(parents=True)
    (directory / "etc" / "b c\nd").write_text("content")
    (directory / "etc" / "a").symlink_to("b c")
    for path in (directory / "etc" / "b c\nd", directory / "etc", directory):
        os.utime(path, (1000, 1000))
    os.utime(directory / "etc" / "a", (1000, 1000), follow_symlinks=False)
    return directory


def manifest(tree):
    script = os.fspath(resources.files("ovm.image") / "guest" / "manifest")
    return subprocess.run(["sh", script, os.fspath(tree)], check=True, capture_output=True).stdout


def test_the_manifest_is_the_same_twice(tree):
    """It depends on the tree alone, not on where that is or when it is read."""
    first = manifest(tree)
    assert b"b c\nd" in first
    moved = tree.rename(tree.with_name("elsewhere"))
    assert manifest(moved) == first


@pytest.mark.parametrize("change", ["content", "mode", "time", "link", "name", "new"])
def test_the_manifest_tells_every_change(tree, change):
    """Nothing that makes a difference in the guest goes unnoticed."""
    before = manifest(tree)
    file, link = tree / "etc" / "b c\nd", tree / "etc" / "a"
    match change:
        case "content":
            file.write_text("contenT")
            os.utime(file, (1000, 1000))
        case "mode":
            file.chmod(0o755)
        case "time":
            os.utime(file, (1001, 1001))
        case "link":
            link.unlink()
            link.symlink_to("elsewhere")
        case "name":
            link.rename(tree / "etc" / "z")
        case "new":
            (tree / "etc" / "new").mkdir()
    assert manifest(tree) != before


# The guest's own files


def test_the_lists_name_nothing_twice():
    """A second entry would be a mistake of ours."""
    for name in ("packages", "packages.drop", "paths.drop", "modules.keep", "units"):
        lines = guest_lines(name)
        assert lines
        assert len(lines) == len(set(lines)), name


def test_every_unit_of_ours_that_is_started_is_there():
    """The list of units cannot name one that was renamed."""
    there = {name.rpartition("/")[2] for name, _ in guest_files()}
    started = {line.split()[1] for line in guest_lines("units")}
    assert {unit for unit in started if unit.startswith("ovm-")} <= there


def test_shell_scripts_parse():
    """Each of them, with the shell that runs it."""
    scripts = [content for _, content in guest_files() if content.startswith(b"#!/bin/sh")]
    assert len(scripts) >= 6
    for content in scripts:
        subprocess.run(["sh", "-n"], input=content, check=True)
