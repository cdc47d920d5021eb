"""Fetching a released image: what comes, what must not, and who says where it is."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovm import cli
from ovm.errors import ImageError
from ovm.image import PullOptions, list_images, pull_image, verify_image
from ovm.image import download as downloading
from ovm.image.index import read_index, released_image
from ovm.image.release import MEMBERS
from ovm.registry import images as registry
from releases import (
    MIB,
    SOON_S,
    beside,
    entry,
    fetch,
    sha256,
    version,
)

ROOT = Path(__file__).parents[3]


async def test_what_was_packed_is_pulled(web, packed, target):
    """The image is the one that was packed, in place of the old one, and nothing else is there."""
    seen: list[tuple[str, int, int]] = []
    await fetch(web.url(), target, packed.sha256, lambda *told: seen.append(told))
    image = await verify_image(target)
    assert image.versions["podman"] == "5.4.2"
    for name in MEMBERS:
        assert (target / name).read_bytes() == (packed.path.parent / "image" / name).read_bytes()
    assert sorted(path.name for path in target.iterdir()) == sorted(MEMBERS)
    assert beside(target) == []
    assert [stage for stage, _, _ in seen] == sorted(stage for stage, _, _ in seen)  # download before unpack
    assert ("download", packed.size, packed.size) in seen
    assert seen[-1][0] == "unpack"
    assert seen[-1][1] == seen[-1][2]


async def test_the_first_image(web, tmp_path):
    """Directories are made; holes stay holes."""
    target = tmp_path / "home" / "images" / "default-amd64"
    await fetch(web.url(), target)
    assert [image.directory for image in list_images(target.parent)] == [target]
    rootfs = (target / "rootfs.btrfs").stat()
    assert rootfs.st_size == 4 * MIB
    assert rootfs.st_blocks * 512 < 4 * MIB


async def test_what_is_no_image_is_not_replaced(web, tmp_path):
    """Before anything is asked of the server."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").touch()
    with pytest.raises(ImageError, match="exists and is not a guest image"):
        await fetch(web.url(), tmp_path / "photos")
    assert web.requests == []


# Wrong


@pytest.mark.parametrize("progress", ["none", "cut"])
async def test_a_wrong_digest(web, target, progress):
    """Both are named, nothing stays, and the old image does."""
    web.cuts = [2 * MIB] if progress == "cut" else []
    with pytest.raises(ImageError, match=f"{sha256(web.content)} instead of {'0' * 64}"):
        await fetch(web.url(), target, "0" * 64)
    assert beside(target) == []
    assert version(target) == "old"


async def test_another_architecture(web, target):
    """An image is not put where machines of this one would look for it."""
    with pytest.raises(ImageError, match="for amd64 instead of arm64") as caught:
        await pull_image(PullOptions(url=web.url(), arch="arm64", output=target))
    assert "--arch amd64" in caught.value.hint
    assert version(target) == "old"


async def test_what_is_not_there(web, target):
    """404 is final."""
    web.statuses = [404]
    with pytest.raises(ImageError, match="404 Not Found"):
        await fetch(web.url(), target)
    assert len(web.requests) == 1
    assert beside(target) == []


async def test_a_server_in_trouble(web, target):
    """500 and 429 are tried again."""
    web.statuses = [500, 429]
    await fetch(web.url(), target)
    assert len(web.requests) == 3


async def test_nobody_there(target, unused_port):
    """A refused connection is tried again, a few times."""
    with pytest.raises(ImageError, match="cannot be fetched") as caught:
        await fetch(f"http://127.0.0.1:{unused_port}/image.zip", target)
    assert "network" in caught.value.hint
    assert beside(target) == []


async def test_a_silent_server(web, target, monkeypatch):
    """Its silence is ended, and the download resumed."""
    monkeypatch.setattr(downloading, "SILENCE_TIMEOUT_S", 0.1)
    web.hangs, web.cuts = True, [2 * MIB]
    await fetch(web.url(), target)
    assert web.asked("range") == [None, f"bytes={2 * MIB}-"]


# The index


async def pull_released(target: Path) -> None:
    async with asyncio.timeout(SOON_S):
        await pull_image(PullOptions(arch="amd64", output=target))


async def test_the_packages_own_release(web, packed, target, released):
    """Without a URL it is the index that says where, how large, and what digest."""
    released(entry(packed, web.url()))
    web.tells_length = False
    await pull_released(target)
    await verify_image(target)


@pytest.mark.parametrize("tells_length", [True, False])
async def test_larger_than_the_index_says(web, packed, target, released, tells_length):
    """No more is read than that, whether the server announces it or not."""
    web.tells_length = tells_length
    released(entry(packed, web.url(), size=packed.size - 1))
    with pytest.raises(ImageError, match=r"instead of|more than"):
        await pull_released(target)
    assert beside(target) == []


async def test_a_size_that_nobody_knows(web, target):
    """It could be anything."""
    web.tells_length = False
    with pytest.raises(ImageError, match="does not report the size"):
        await fetch(web.url(), target)


async def test_a_source_checkout_has_no_release(target):
    """The hint says how to come by an image."""
    with pytest.raises(ImageError, match="no image for amd64 was released") as caught:
        await pull_image(PullOptions(arch="amd64", output=target))
    assert caught.value.hint == "build it: ovm image build"


def test_hint_on_a_mac(monkeypatch):
    """There, images cannot be built."""
    monkeypatch.setattr(registry, "host_arch", lambda: "arm64")
    monkeypatch.setattr(registry.sys, "platform", "darwin")
    hint = registry.image_hint()
    assert "on Linux with `ovm image build --arch arm64`" in hint
    assert "images/default-arm64" in hint
    assert "ovm image pull URL" in hint


def test_hint_with_a_release(monkeypatch):
    """What can be fetched need not be built."""
    monkeypatch.setattr(registry, "is_released", lambda _arch: True)
    assert registry.image_hint() == "fetch it: ovm image pull"


def test_the_script_writes_the_index(packed, tmp_path):
    """What the release job writes is what the package reads."""
    written = tmp_path / "index.json"
    script = [sys.executable, ROOT / "scripts" / "image_index.py", "https://releases.example/v1/", packed.path]
    subprocess.run([*script, "--index", written], check=True, capture_output=True)
    (made,) = read_index(written.read_bytes()).values()
    assert made.url == f"https://releases.example/v1/{packed.path.name}"
    assert (made.sha256, made.size, made.unpacked) == (packed.sha256, packed.size, packed.unpacked)
    assert packed.sha256 == sha256(packed.path.read_bytes())


def test_the_index_in_the_repository_is_empty():
    """A checkout does not pass for a release; the format is the one that is read."""
    with pytest.raises(ImageError):
        released_image("amd64")
    with pytest.raises(ImageError, match="format 2"):
        read_index(b'{"format": 2, "images": {}}')


# The command


def test_the_commands(web, packed, tmp_path, capsys):
    """Packed, then pulled, with JSON for programs and lines for people."""
    image = os.fspath(packed.path.parent / "image")
    status, said, _ = run(capsys, "image", "pack", image, "-o", os.fspath(tmp_path), "--json")
    assert status == 0
    assert json.loads(said) == {
        "path": os.fspath(tmp_path / packed.path.name),
        "arch": "amd64",
        "sha256": packed.sha256,
        "size": packed.size,
        "unpacked": packed.unpacked,
    }
    pulled = ("image", "pull", web.url(), "--arch", "amd64", "--sha256", packed.sha256, "-o", os.fspath(tmp_path / "a"))
    status, said, shown = run(capsys, "--progress", "plain", *pulled, "--json")
    assert status == 0
    assert json.loads(said)["directory"] == os.fspath(tmp_path / "a")
    assert [line.split(":")[0] for line in shown.splitlines()] == ["download", "unpack"]
    web.statuses = [404]
    status, said, _ = run(capsys, *pulled, "--json")
    assert status == 1
    assert json.loads(said)["error"]["code"] == "image"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err
