"""Guest images built as somebody without privileges."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import sys
import tempfile
from pathlib import Path

import built
import ovm
from ovm.image import BuildOptions, build_image


async def unprivileged(target: Path) -> None:
    """Build ``target``, with its zip, as a user who has only subordinate ids, if we are root and there is one."""
    user = next((u for u in pwd.getpwall() if 1000 <= u.pw_uid < 60000 and _has_ids(u.pw_name)), None)
    if os.geteuid() != 0 or user is None or not _may_run(user.pw_uid):
        await build_image(BuildOptions(output=target, zip=True))
        return
    public = Path(tempfile.mkdtemp(prefix="ovm-build-", dir="/var/tmp"))
    try:
        os.chown(public, user.pw_uid, user.pw_gid)
        code = (
            "import asyncio, sys; from pathlib import Path; from ovm.image import BuildOptions, build_image; "
            "asyncio.run(build_image(BuildOptions(output=Path(sys.argv[1]), zip=True)))"
        )
        where = os.pathsep.join(dict.fromkeys([str(Path(ovm.__file__).parents[1]), *(p for p in sys.path if p)]))
        # fmt: off
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--init-groups",
            "env", "-i", "PATH=/usr/bin:/bin", f"HOME={public}", f"PYTHONPATH={where}",
            *(f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy")),
            sys.executable, "-c", code, os.fspath(public / "image"),
        )
        # fmt: on
        assert await process.wait() == 0
        with built.whole(target) as new:  # it may come from another file system
            await asyncio.to_thread(shutil.move, public / "image", new)
    finally:
        await asyncio.to_thread(shutil.rmtree, public)


def _has_ids(name: str) -> bool:
    ids = Path("/etc/subuid")
    return ids.exists() and any(line.startswith(f"{name}:") for line in ids.read_text().splitlines())


def _may_run(uid: int) -> bool:
    """Whether that user may run this very Python with these packages."""
    inside = [*Path(sys.executable).absolute().parents, *Path(sys.executable).resolve().parents]
    inside += Path(ovm.__file__).resolve().parents
    return all(d.stat().st_mode & 0o001 or d.stat().st_uid == uid for d in inside)
