"""The real build, twice: as whoever runs the tests, and (as root) once more without any privilege."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import sys
import time
from pathlib import Path

import pytest

import ovm
from ovm.image import BuildOptions, build_image, load_image, verify_image

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
]

BUILD_S = 120
MIB = 1 << 20
BUDGETS = {"initrd": 4 * MIB, "rootfs": 280 * MIB, "zip": 110 * MIB}


@pytest.fixture(scope="module")
async def first(tmp_path_factory):
    begun = time.monotonic()
    image = await build_image(BuildOptions(output=tmp_path_factory.mktemp("first") / "image"))
    return image, time.monotonic() - begun


async def test_an_image_is_whole_and_within_its_budgets(first):
    """Small and quick enough to be built by everybody."""
    image, took = first
    await verify_image(image.directory)
    assert image.files["initrd"].size <= BUDGETS["initrd"]
    assert image.files["rootfs"].data_bytes <= BUDGETS["rootfs"]
    assert image.files["rootfs"].size % 512 == 0
    assert took <= BUILD_S
    assert image.packages["podman"].startswith("5.")
    assert "apt" not in image.packages


async def test_the_same_packages_make_the_same_image(first, tmp_path):
    """Whoever builds it, and wherever: kernel, initrd and the rootfs's tree are the same."""
    image, _ = first
    target = tmp_path / "public" / "image"
    target.parent.mkdir()
    if os.geteuid() == 0:
        await _build_unprivileged(target)
    else:
        await build_image(BuildOptions(output=target, zip=True))
    again = load_image(target)
    if again.packages != image.packages:
        pytest.skip("Debian's archive has changed between the two builds")
    assert again.files["kernel"] == image.files["kernel"]
    assert again.files["initrd"] == image.files["initrd"]
    assert _differences(image.directory, target) == []
    assert again.tree_sha256 == image.tree_sha256
    assert (target / "rootfs.btrfs.zip").stat().st_size <= BUDGETS["zip"]


def _differences(one: Path, other: Path) -> list[bytes]:
    records = [set((directory / "manifest").read_bytes().split(b"\0")) for directory in (one, other)]
    return sorted(records[0] ^ records[1])[:20]


async def _build_unprivileged(target: Path) -> None:
    """As a user who has nothing but subordinate ids."""
    user = next((u for u in pwd.getpwall() if 1000 <= u.pw_uid < 60000 and _has_ids(u.pw_name)), None)
    if user is None:
        await build_image(BuildOptions(output=target, zip=True))
        return
    for directory in (target.parent, *target.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):  # pytest's are its user's alone
            directory.chmod(directory.stat().st_mode | 0o011)
    os.chown(target.parent, user.pw_uid, user.pw_gid)
    code = (
        "import asyncio, sys; from pathlib import Path; from ovm.image import BuildOptions, build_image; "
        "asyncio.run(build_image(BuildOptions(output=Path(sys.argv[1]), zip=True)))"
    )
    where = os.pathsep.join(dict.fromkeys([str(Path(ovm.__file__).parents[1]), *(p for p in sys.path if p)]))
    # fmt: off
    process = await asyncio.create_subprocess_exec(
        "setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--init-groups",
        "env", "-i", "PATH=/usr/bin:/bin", f"HOME={target.parent}", f"PYTHONPATH={where}",
        *(f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy")),
        _python(user.pw_uid), "-c", code, os.fspath(target),
    )
    # fmt: on
    assert await process.wait() == 0


def _has_ids(name: str) -> bool:
    ids = Path("/etc/subuid")
    return ids.exists() and any(line.startswith(f"{name}:") for line in ids.read_text().splitlines())


def _python(uid: int) -> str:
    """This interpreter, if that user may run it."""
    for directory in Path(sys.executable).resolve().parents:
        status = directory.stat()
        if not status.st_mode & 0o001 and status.st_uid != uid:
            pytest.skip(f"{directory} is closed to other users, so they cannot run this Python")
    return sys.executable
