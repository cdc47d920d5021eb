"""A registry on the host's loopback, filled with the images; the guest reaches it at gvproxy's address of the host."""

from __future__ import annotations

import contextlib
import http.client
import platform
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from suites.images import IMAGES, MANIFEST_TYPE, Blob, compressed, packed, root_file_system

LOOPBACK = "127.0.0.1"
HOST_IN_GUEST = "192.168.127.254"
SERVED = ("docker.io", "quay.io")
"""Whose names the guest looks for here."""
READY_S = 30.0
REQUEST_S = 30.0
PROGRAMS = ("docker-registry", "registry")
"""Debian's name, and its authors'."""


def certified(work: Path) -> Path:
    """A certificate for the host as guests call it, ``registry.pem`` and its key; signed by itself, so its own CA.

    Without TLS podman-py cannot pull: it asks for verification whatever the guest's configuration says of the registry.
    """
    certificate = work / "registry.pem"
    # fmt: off
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-batch", "-days", "2",
            "-subj", "/CN=registry", "-addext", f"subjectAltName=IP:{HOST_IN_GUEST},IP:{LOOPBACK}",
            "-keyout", work / "registry.key", "-out", certificate,
        ],
        check=True, capture_output=True,
    )
    # fmt: on
    return certificate


@contextlib.contextmanager
def serving(work: Path, path: str, certificate: Path) -> Iterator[int]:
    """Debian's docker-registry with every image in it; yields its port."""
    program = next(filter(None, (shutil.which(name, path=path) for name in PROGRAMS)), None)
    if program is None:
        raise SystemExit("docker-registry is missing: scripts/setup test")
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
    config = work / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {work / 'registry'}}}, delete: {{enabled: true}}}}\n"
        f"http:\n  addr: {LOOPBACK}:{port}\n"
        f"  tls: {{certificate: {certificate}, key: {certificate.with_suffix('.key')}}}\n"
    )
    with (work / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", config], stdout=log, stderr=log)
    try:
        _wait(process, port)
        _fill(port, certificate)
        yield port
    finally:
        process.terminate()
        process.wait()


def guest_config(port: int) -> str:
    """A file for registries.conf.d in the guest."""
    return "".join(f'[[registry]]\nprefix = "{name}"\nlocation = "{HOST_IN_GUEST}:{port}"\n' for name in SERVED)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            socket.create_connection((LOOPBACK, port)).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _fill(port: int, certificate: Path) -> None:
    trust = ssl.create_default_context(cafile=certificate)
    root = root_file_system()
    layer = compressed(root)
    with contextlib.closing(
        http.client.HTTPSConnection(LOOPBACK, port, timeout=REQUEST_S, context=trust)
    ) as connection:
        for image in IMAGES:
            config, manifest = packed(image, root, layer, platform.machine())
            for blob in (layer, config):
                _upload(connection, image.repository, blob)
            for tag in image.tags:
                where = f"/v2/{image.repository}/manifests/{tag}"
                _request(connection, "PUT", where, manifest.content, MANIFEST_TYPE)


def _upload(connection: http.client.HTTPConnection, repository: str, blob: Blob) -> None:
    begun = _request(connection, "POST", f"/v2/{repository}/blobs/uploads/")
    location = begun.removeprefix(f"https://{LOOPBACK}:{connection.port}")
    joint = "&" if "?" in location else "?"
    _request(connection, "PUT", f"{location}{joint}digest={blob.digest}", blob.content, "application/octet-stream")


def _request(
    connection: http.client.HTTPConnection, method: str, where: str, body: bytes = b"", media_type: str = ""
) -> str:
    """Where the answer says that the thing is."""
    headers = {"Content-Type": media_type} if media_type else {}
    connection.request(method, where, body, headers)
    answer = connection.getresponse()
    said = answer.read()
    if answer.status not in {201, 202}:
        raise SystemExit(f"the registry answered {method} {where} with {answer.status}: {said.decode()}")
    return answer.getheader("Location", "")
