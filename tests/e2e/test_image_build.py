"""The real build, done twice: the second time elsewhere, and without any privilege where that can be tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovm.image import load_image, verify_image

pytestmark = pytest.mark.build

MIB = 1 << 20
BUDGETS = {"initrd": 4 * MIB, "rootfs": 280 * MIB, "zip": 110 * MIB}


async def test_an_image_is_whole_and_within_its_budgets(image: Path, second_image: Path) -> None:
    """Small enough to be kept and sent around."""
    await verify_image(image)
    files = load_image(image).files
    assert files["initrd"].size <= BUDGETS["initrd"]
    assert files["rootfs"].data_bytes <= BUDGETS["rootfs"]
    assert files["rootfs"].size % 512 == 0
    assert (second_image / "rootfs.btrfs.zip").stat().st_size <= BUDGETS["zip"]


async def test_an_image_carries_an_engine_and_no_package_manager(image: Path) -> None:
    """It is an appliance: podman of the current series, and nothing that would install into memory."""
    packages = load_image(image).packages
    assert packages["podman"].startswith("5.")
    assert "apt" not in packages


async def test_the_same_packages_make_the_same_image(image: Path, second_image: Path) -> None:
    """Whoever builds it, and wherever: kernel, initrd and the rootfs's tree are the same."""
    one, other = load_image(image), load_image(second_image)
    if one.packages != other.packages:
        pytest.skip("Debian's archive has changed between the two builds")
    assert one.files["kernel"] == other.files["kernel"]
    assert one.files["initrd"] == other.files["initrd"]
    assert _differences(image, second_image) == []
    assert one.tree_sha256 == other.tree_sha256


def _differences(one: Path, other: Path) -> list[bytes]:
    records = [set((directory / "manifest").read_bytes().split(b"\0")) for directory in (one, other)]
    return sorted(records[0] ^ records[1])[:20]
