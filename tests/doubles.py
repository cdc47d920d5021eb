"""The doubles of programs that exist on other systems only, built once for each state of their sources.

They are written in Go and need a Go that can build vfkit's own packages; a test that wants one is skipped without it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import built
from built import TOOLS

SOURCES = Path(__file__).parent / "doubles"

VFKIT_VERSION = "v0.6.4"
VHOST_VSOCK = TOOLS / "bin" / "vhost-device-vsock"
VHOST_VSOCK_VERSION = "0.3.0"
OLDEST_GO = (1, 25, 6)
BUILD_TIMEOUT_S = 1200.0


def vfkit() -> Path:
    """The double of vfkit; what it is to do wrong is ordered by a file ``double.json`` beside a copy of it."""
    vhost_vsock()
    return _built()["vfkit"]


def oracle() -> Path:
    """Tells what vfkit's own parsers make of command lines: a JSON array of them in, one of answers out."""
    return _built()["oracle"]


@functools.cache
def vhost_vsock() -> Path:
    """The crate vhost-device-vsock, which is the host's side of a vsock device without the kernel's help."""
    with locked():
        if not VHOST_VSOCK.exists():
            cargo = _find("cargo", Path.home() / ".cargo/bin/cargo")
            what = [VHOST_VSOCK.name, "--version", VHOST_VSOCK_VERSION, "--locked", "--root", os.fspath(TOOLS)]
            run([cargo, "install", *what])
    return VHOST_VSOCK


@functools.cache
def _built() -> dict[str, Path]:
    environment = os.environ | {"GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto"}
    # asked in the module: an older Go fetches the one that the module wants
    version = run([go(), "-C", os.fspath(SOURCES), "env", "GOVERSION"], env=environment).strip()
    if tuple(int(number) for number in re.findall(r"\d+", version)) < OLDEST_GO:
        pytest.skip(f"{go()} is {version}; vfkit's packages want {'.'.join(map(str, OLDEST_GO))}")
    directory = TOOLS / f"doubles-{_digest(version, os.fspath(VHOST_VSOCK))}"
    with built.once(directory, "doubles") as missing:
        if missing:
            symbols = f"-s -w -X github.com/crc-org/vfkit/pkg/cmdline.gitVersion={VFKIT_VERSION}"
            symbols += f" -X main.vsockDaemon={VHOST_VSOCK}"  # what starts the double may give it any environment
            with built.whole(directory) as new:
                new.mkdir()
                where = ["-C", os.fspath(SOURCES), "-trimpath", "-ldflags", symbols, "-o", os.fspath(new)]
                run([go(), "build", *where, "./vfkit", "./oracle"], env=environment)
    return {name: directory / name for name in ("vfkit", "oracle")}


@functools.cache
def go() -> str:
    """The Go to build with."""
    return os.environ.get("GO") or _find("go", Path("/usr/local/go/bin/go"))


def _digest(*more: str) -> str:
    digest = hashlib.sha256("\n".join(more).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in {".go", ".mod", ".sum"}):
        digest.update(f"\n{path.relative_to(SOURCES)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _find(name: str, elsewhere: Path) -> str:
    found = shutil.which(name) or shutil.which(elsewhere)
    return found or pytest.skip(f"there is no {name}, on PATH or at {elsewhere}")


def run(argv: Sequence[str], **how: dict[str, str]) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False, **how)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


@contextmanager
def locked() -> Iterator[None]:
    """Parallel runs wait for one build."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
