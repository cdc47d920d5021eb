"""Fetching a released image, from a web server on the loopback that does as the test likes."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import hashlib
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovm import cli, registry
from ovm.errors import FileError, ImageError, InUseError, OptionError, SpaceError
from ovm.image import PullOptions, list_images, pack_image, place, pull, pull_image, release, verify_image
from ovm.image import download as downloading
from ovm.image.index import Release, read_index, released_image
from ovm.image.release import MEMBERS, Packed
from webserver import Web, serving

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
SOON_S = 30.0
FILES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}


def make_image(directory: Path, *, rootfs: bytes = b"", **changes: object) -> Path:
    """A small image as the builder describes it."""
    directory.mkdir(parents=True)
    rootfs = rootfs or os.urandom(3 * MIB) + bytes(MIB)
    contents = {"kernel": b"kernel" * 999, "initrd": os.urandom(5000), "rootfs": rootfs}
    for name, content in contents.items():
        (directory / FILES[name]).write_bytes(content)
    (directory / "manifest").write_text("every file")
    description = {
        "format": 1,
        "guest": "ovm",
        "arch": "amd64",
        "suite": "trixie",
        "versions": {"podman": "5.4.2"},
        "tree_sha256": sha256(b"every file"),
        "packages": {"podman": "5.4.2"},
        "files": {name: {"sha256": sha256(content), "size": len(content)} for name, content in contents.items()},
    } | changes
    (directory / "image.json").write_text(json.dumps(description))
    return directory


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
async def packed(tmp_path_factory) -> Packed:
    """A release; the image it was made of lies beside it."""
    directory = tmp_path_factory.mktemp("made")
    return await pack_image(make_image(directory / "image"), directory)


@pytest.fixture
def web(packed) -> Iterator[Web]:
    """A server that has the release."""
    with serving(Web(packed.path.read_bytes())) as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No proxies but the tests' own, and no time for patience."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(downloading, "BACKOFF_S", 0.001)


@pytest.fixture
def target(tmp_path) -> Path:
    """Where the image is to be; another one is there already."""
    return make_image(tmp_path / "images" / "a", rootfs=b"old", versions={"podman": "old"})


async def fetch(url: str, target: Path, sha256: str = "", progress: pull.PullProgress | None = None) -> None:
    async with asyncio.timeout(SOON_S):
        await pull_image(PullOptions(url=url, arch="amd64", output=target, sha256=sha256), progress=progress)


def version(target: Path) -> str:
    return str(json.loads((target / "image.json").read_bytes())["versions"]["podman"])


def beside(target: Path) -> list[str]:
    """What is there but the image."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def kept(target: Path) -> list[str]:
    """What an interrupted pull leaves."""
    return sorted(path.name for path in (target.parent / f".{target.name}.pulling").iterdir())


def refusing(web: Web) -> pull.PullProgress:
    """From the first byte on the server is out of order."""

    def progress(_stage: str, _done: int, _total: int) -> None:
        web.statuses = [503] * (downloading.ATTEMPTS - 1)

    return progress


INTERRUPTED = ["download", "download.json", "ovm.lock"]


async def interrupted(web: Web, target: Path, sha256: str = "") -> None:
    """A pull that fails for good after the first 2 MiB."""
    web.cuts = [2 * MIB]
    with pytest.raises(ImageError, match="503") as caught:
        await fetch(web.url(), target, sha256, refusing(web))
    assert "pull again" in caught.value.hint
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    web.requests.clear()


# Whole


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
    with pytest.raises(ImageError, match="in the way"):
        await fetch(web.url(), tmp_path / "photos")
    assert web.requests == []


# Resumed


async def test_a_cut_is_resumed(web, packed, target):
    """Within one pull, from where it was cut, and only if it is still the same file."""
    web.cuts = [2 * MIB, MIB // 2]
    await fetch(web.url(), target, packed.sha256)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={2 * MIB}-", f"bytes={2 * MIB + MIB // 2}-"]
    assert web.asked("if-range") == [None, '"one"', '"one"']


@pytest.mark.parametrize("known", [True, False])
async def test_the_next_pull_resumes(web, packed, target, known):
    """With a digest or by the server's validator."""
    digest = packed.sha256 if known else ""
    await interrupted(web, target, digest)
    await fetch(web.url(), target, digest)
    await verify_image(target)
    assert web.asked("range") == [f"bytes={2 * MIB}-"]
    assert beside(target) == []


async def test_last_modified_will_do(web, target):
    """For servers without tags."""
    web.validator = ("Last-Modified", "Sun, 22 Nov 2026 21:34:00 GMT")
    await interrupted(web, target)
    await fetch(web.url(), target)
    assert web.asked("if-range") == [web.validator[1]]


@pytest.mark.parametrize("validator", [None, ("ETag", 'W/"one"')])
async def test_a_digest_is_validator_enough(web, packed, target, validator):
    """What was begun may be another file only if nothing tells which it was."""
    web.validator = validator
    await interrupted(web, target, packed.sha256)
    await fetch(web.url(), target, packed.sha256)
    assert web.asked("range") == [f"bytes={2 * MIB}-"]
    assert web.asked("if-range") == [None]


async def test_without_digest_and_validator_it_begins_anew(web, target):
    """Nothing tells whether it is still the same file."""
    web.validator = None
    await interrupted(web, target)
    await fetch(web.url(), target)
    assert web.asked("range") == [None]


async def test_a_server_that_cannot_resume(web, packed, target):
    """It sends all of it again, and that is taken."""
    web.resumes = False
    web.cuts = [2 * MIB]
    await fetch(web.url(), target, packed.sha256)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={2 * MIB}-"]


async def test_a_server_that_never_gets_further(web, target):
    """Attempts that bring nothing new are counted, even if each of them brings something."""
    web.resumes = False
    web.cuts = [2 * MIB] * 100
    with pytest.raises(ImageError, match="peer closed"):
        await fetch(web.url(), target)
    assert len(web.requests) == downloading.ATTEMPTS


async def test_another_file_meanwhile(web, target, tmp_path):
    """What had come is thrown away."""
    await interrupted(web, target)
    newer = await pack_image(make_image(tmp_path / "newer", versions={"podman": "6"}), tmp_path)
    web.content, web.validator = newer.path.read_bytes(), ("ETag", '"two"')
    await fetch(web.url(), target)
    await verify_image(target)
    assert version(target) == "6"


async def test_the_beginning_of_another_download(web, packed, target):
    """What another URL had brought is not taken for the beginning of this one."""
    await interrupted(web, target)
    await fetch(web.url("/other.zip"), target)
    assert web.asked("range") == [None]


async def test_a_resumed_range_that_is_another(web, packed, target):
    """An answer from elsewhere in the file is not appended."""
    await interrupted(web, target)
    note = target.parent / ".a.pulling" / "download.json"
    note.write_text(note.read_text().replace(str(packed.size), str(packed.size + 1)))
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("range") == [f"bytes={2 * MIB}-", None]


@pytest.mark.parametrize("note", ["", "{", '{"key": 1}', "\xff"])
async def test_a_damaged_note(web, target, note):
    """It is as if nothing had come."""
    await interrupted(web, target)
    (target.parent / ".a.pulling" / "download.json").write_bytes(note.encode("latin-1"))
    await fetch(web.url(), target)
    assert web.asked("range") == [None]


async def test_a_whole_download_is_not_fetched_again(web, target, monkeypatch):
    """No room to unpack: the next pull asks the server only whether it is still the same."""
    with monkeypatch.context() as patched:
        patched.setattr(release, "check_space", lambda *_: (_ for _ in ()).throw(SpaceError("full")))
        with pytest.raises(SpaceError):
            await fetch(web.url(), target)
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("if-none-match") == [None, '"one"']


# Wrong


@pytest.mark.parametrize("progress", ["none", "cut"])
async def test_a_wrong_digest(web, target, progress):
    """Both are named, nothing stays, and the old image does."""
    web.cuts = [2 * MIB] if progress == "cut" else []
    with pytest.raises(ImageError, match=f"{sha256(web.content)} instead of {'0' * 64}"):
        await fetch(web.url(), target, "0" * 64)
    assert beside(target) == []
    assert version(target) == "old"


async def test_an_archive_that_is_cut(web, target):
    """The server has no more of it, and says so."""
    web.content = web.content[:-1000]
    with pytest.raises(ImageError, match="no whole zip"):
        await fetch(web.url(), target)
    assert beside(target) == []
    assert version(target) == "old"


async def test_a_flipped_byte(web, target):
    """The sum of the file it is in is wrong."""
    content = bytearray(web.content)
    content[len(content) // 2] ^= 1
    web.content = bytes(content)
    with pytest.raises(ImageError, match="no whole zip"):
        await fetch(web.url(), target)
    assert beside(target) == []


def repack(packed: Packed, path: Path, entries: dict[str, str | bytes]) -> bytes:
    """A zip of these names; content that is a string is the image's file of that name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            source = packed.path.parent / "image"
            archive.writestr(name, (source / content).read_bytes() if isinstance(content, str) else content)
    return path.read_bytes()


WHOLE: dict[str, str | bytes] = {name: name for name in MEMBERS}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"../evil": b"x"}, r"'\.\./evil'"),
        ({"/etc/passwd": b"x"}, "holds"),
        ({"sub/kernel": b"x"}, "holds"),
        ({"a\\b": b"x"}, "holds"),
        ({"extra": b""}, "holds"),
        ({"kernel": None}, "holds"),
        ({"image.json": None}, "holds"),
        ({"kernel": b"kernel"}, "kernel .* has 6 bytes instead of 5994"),
        ({"kernel": b"K" + b"kernel" * 998 + b"ernel"}, "kernel .* is damaged"),
        ({"manifest": b"other file"}, "manifest .* is damaged"),
        ({"image.json": b"{}"}, r"image\.json .* cannot be understood"),
        ({"image.json": b'{"format": 2, "guest": "ovm"}'}, "another kind"),
        ({"image.json": b" " * (MIB + 1)}, "declares"),
    ],
)
async def test_archives_that_are_refused(web, packed, target, tmp_path, changes, complaint):
    """Whatever is in them, nothing of it is written outside, or stays."""
    entries = {name: content for name, content in (WHOLE | changes).items() if content is not None}
    web.content = repack(packed, tmp_path / "odd.zip", entries)
    with pytest.raises(ImageError, match=complaint):
        await fetch(web.url(), target)
    assert beside(target) == []
    assert version(target) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "odd.zip"]


async def test_a_name_twice(web, packed, target, tmp_path):
    """Whoever looks at it would see one kernel and run the other."""
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in MEMBERS:
            archive.write(packed.path.parent / "image" / name, name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("kernel", b"another")
    web.content = (tmp_path / "odd.zip").read_bytes()
    with pytest.raises(ImageError, match="'kernel', 'kernel'"):
        await fetch(web.url(), target)


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


def entry(packed: Packed, url: str, **changes: object) -> Release:
    known = {"sha256": packed.sha256, "size": packed.size, "unpacked": packed.unpacked, "version": "1"}
    return Release(url=url, **known | changes)  # type: ignore[arg-type]


@pytest.fixture
def released(monkeypatch):
    """Makes a release the package's own."""
    return lambda made: monkeypatch.setattr(pull, "released_image", lambda _arch: made)


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
    with pytest.raises(ImageError, match="how large"):
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
    monkeypatch.setattr(registry, "_is_released", lambda _arch: True)
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


# The URL and the way there


@pytest.mark.parametrize(
    ("url", "sha256", "usable"),
    [
        ("https://images.example/a.zip", "", True),
        ("http://images.example/a.zip", "", False),
        ("http://images.example/a.zip", "0" * 64, True),
        ("http://127.0.0.1:8000/a.zip", "", True),
        ("http://127.9.9.9/a.zip", "", False),
        ("http://[::1]:8000/a.zip", "", True),
        ("http://localhost/a.zip", "", True),
        ("http://localhost.example/a.zip", "", False),
        ("http://127.0.0.1.example/a.zip", "", False),
        ("ftp://images.example/a.zip", "0" * 64, False),
        ("file:///a.zip", "", False),
        ("https:///a.zip", "", False),
        ("a.zip", "", False),
        ("https://[::1/a.zip", "", False),
        ("", "0" * 64, False),
        ("https://images.example/a.zip", "abc", False),
        ("https://images.example/a.zip", "A" * 64, False),
    ],
)
def test_urls(url, sha256, usable):
    """Plain http only on the loopback, or with a digest."""
    if usable:
        PullOptions(url=url, sha256=sha256)
    else:
        with pytest.raises(OptionError):
            PullOptions(url=url, sha256=sha256)


async def test_a_url_that_is_none(target):
    """As far as its port."""
    with pytest.raises(ImageError, match="no URL"):
        await fetch("https://images.example:70000x/a.zip", target)


async def test_redirects(web, target):
    """They are followed, and what has come is resumed behind them."""
    web.redirects = {"/latest.zip": "/v1/image.zip", "/v1/image.zip": web.url("/image.zip")}
    web.cuts = [2 * MIB]
    await fetch(web.url("/latest.zip"), target)
    await verify_image(target)
    assert [path for path, _ in web.requests] == ["/latest.zip", "/v1/image.zip", "/image.zip"] * 2


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("/image.zip", "more than 10 times"),
        ("http://images.example/a.zip?token=secret", "to http://images.example/a.zip: .*plain http"),
        ("file:///etc/passwd", "no http"),
    ],
)
async def test_redirects_that_are_not_followed(web, target, location, complaint):
    """In circles, or to where no URL would be taken from."""
    web.redirects = {"/image.zip": location}
    with pytest.raises(ImageError, match=complaint) as caught:
        await fetch(web.url(), target)
    assert "secret" not in str(caught.value)


async def test_secrets_in_a_url_are_not_told(web, target):
    """Neither in the message nor in what stays."""
    web.cuts, web.validator = [2 * MIB], ("ETag", '"one"')
    with pytest.raises(ImageError) as caught:
        await fetch(web.url("/image.zip?token=secret", host="me:secret@127.0.0.1"), target, progress=refusing(web))
    assert "secret" not in str(caught.value)
    assert b"secret" not in (target.parent / ".a.pulling" / "download.json").read_bytes()


async def test_proxy(web, packed, target, monkeypatch):
    """Of the environment; it is asked for the whole URL."""
    monkeypatch.setenv("http_proxy", web.url(""))
    await fetch("http://images.example/a.zip", target, packed.sha256)
    await verify_image(target)
    assert [path for path, _ in web.requests] == ["http://images.example/a.zip"]


@pytest.mark.parametrize(("host", "spared"), [("127.0.0.1", ""), ("localhost", ""), ("127.1", "127.1")])
async def test_no_proxy(web, packed, target, monkeypatch, unused_port, host, spared):
    """For what the environment spares, nor for the loopback, which is trusted because nobody is in between."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("no_proxy", spared)
    await fetch(web.url(host=host), target, packed.sha256)
    await verify_image(target)


@pytest.mark.parametrize(("name", "value"), [("http_proxy", "gopher://x.example"), ("SSL_CERT_FILE", "/nowhere")])
async def test_an_environment_that_cannot_be_used(web, target, monkeypatch, name, value):
    """The message says what to look at."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ImageError, match="environment") as caught:
        await fetch(web.url(), target)
    assert name in caught.value.hint
    assert beside(target) == []


@pytest.fixture
def secure(packed, tmp_path) -> Iterator[tuple[Web, Path]]:
    """A server with TLS, and the certificate of its authority."""
    key, certificate = self_signed()
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "ca.pem").write_bytes(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    with serving(Web(packed.path.read_bytes()), context) as running:
        yield running, tmp_path / "ca.pem"


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate for 127.0.0.1, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


async def test_a_certificate_of_ones_own(secure, target, monkeypatch):
    """It is refused at once, unless SSL_CERT_FILE names it."""
    web, authority = secure
    with pytest.raises(ImageError, match="certificate is not trusted") as caught:
        await fetch(web.url(), target)
    assert "SSL_CERT_FILE" in caught.value.hint
    monkeypatch.setenv("SSL_CERT_FILE", os.fspath(authority))
    await fetch(web.url(), target)
    await verify_image(target)


# Room


async def test_no_room(web, packed, target, released, monkeypatch):
    """It is known before the first byte has come, for the download and what is unpacked of it."""
    released(entry(packed, web.url()))
    free = packed.size + packed.unpacked - 1
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": free}))
    seen: list[str] = []
    with pytest.raises(SpaceError, match="MiB free"):
        await pull_image(PullOptions(arch="amd64", output=target), progress=lambda stage, *_: seen.append(stage))
    assert seen == []
    assert beside(target) == []
    assert version(target) == "old"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, SpaceError), (errno.EIO, FileError)])
async def test_a_disk_that_refuses(web, target, monkeypatch, number, kind):
    """While the download is written."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(downloading, "write_at", refuse)
    with pytest.raises(kind):
        await fetch(web.url(), target)
    assert version(target) == "old"


# Interrupted


async def test_cancelled_in_the_download(web, target):
    """What has come stays, even what was not yet written; the next pull goes on from there."""
    web.hangs, web.cuts = True, [2 * MIB + 5]
    come = asyncio.Event()

    def progress(_stage: str, done: int, _total: int) -> None:
        if done == 2 * MIB + 5:
            come.set()

    task = asyncio.create_task(fetch(web.url(), target, progress=progress))
    async with asyncio.timeout(SOON_S):
        await come.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"
    await fetch(web.url(), target)
    assert web.asked("range") == [None, f"bytes={2 * MIB + 5}-"]
    assert beside(target) == []


async def test_cancelled_while_unpacking(web, target):
    """What was unpacked goes, the download stays."""
    unpacking = asyncio.Event()
    task = asyncio.create_task(
        fetch(web.url(), target, progress=lambda stage, *_: unpacking.set() if stage == "unpack" else None)
    )
    async with asyncio.timeout(SOON_S):
        await unpacking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert kept(target) == INTERRUPTED
    assert version(target) == "old"


async def test_killed(web, target):
    """SIGKILL in the middle of a download: the next pull goes on from there."""
    web.hangs, web.cuts = True, [2 * MIB + 5]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from ovm.cli import main; main()"),
        *("image", "pull", web.url(), "--arch", "amd64", "-o", target),
    )
    partial = target.parent / ".a.pulling" / "download"
    try:
        async with asyncio.timeout(SOON_S):
            while not partial.exists() or not partial.stat().st_size:
                await asyncio.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    had = partial.stat().st_size
    await fetch(web.url(), target)
    await verify_image(target)
    assert web.asked("range") == [None, f"bytes={had}-"]
    assert beside(target) == []


async def test_killed_while_unpacking(web, target):
    """What it had unpacked is swept away."""
    left = target.parent / ".a.pulling" / "image"
    left.mkdir(parents=True)
    (left / "kernel").write_bytes(b"half")
    await fetch(web.url(), target)
    await verify_image(target)
    assert beside(target) == []


async def test_killed_between_two_renames(web, target):
    """Where directories cannot be exchanged the old image is for a moment elsewhere: it comes back."""
    work = target.parent / ".a.pulling"
    work.mkdir()
    target.rename(work / "old")
    web.statuses = [404]
    with pytest.raises(ImageError, match="404"):
        await fetch(web.url(), target)
    assert version(target) == "old"


async def test_a_file_system_that_cannot_exchange(web, target, monkeypatch):
    """Two steps instead of one lead to the same."""
    monkeypatch.setattr(place, "_exchange", lambda *_: False)
    await fetch(web.url(), target)
    await verify_image(target)
    assert beside(target) == []


async def test_two_at_once(web, target):
    """The second one is told so; the first one is not disturbed."""
    web.hangs, web.cuts = True, [2 * MIB]
    begun = asyncio.Event()
    task = asyncio.create_task(fetch(web.url(), target, progress=lambda *_: begun.set()))
    async with asyncio.timeout(SOON_S):
        await begun.wait()
    with pytest.raises(InUseError, match="another pull"):
        await fetch(web.url(), target)
    web.over.set()
    await task
    await verify_image(target)
    assert beside(target) == []


# Packing


async def test_packing_twice_is_the_same(packed, tmp_path):
    """The same image, the same bytes; the name says what it is."""
    again = await pack_image(packed.path.parent / "image", tmp_path / "new" / "directory")
    assert again.sha256 == packed.sha256
    assert again.path.name == packed.path.name
    assert [path.name for path in again.path.parent.iterdir()] == [packed.path.name]


@pytest.mark.parametrize("name", ["kernel", "manifest"])
async def test_a_damaged_image_is_not_packed(tmp_path, name):
    """What was released could not be trusted."""
    image = make_image(tmp_path / "image")
    (image / name).write_bytes(b"\0" * (image / name).stat().st_size)
    with pytest.raises(ImageError, match=name):
        await pack_image(image, tmp_path)
    assert list(tmp_path.iterdir()) == [image]


async def test_ordinary_tools_unpack_it(packed, tmp_path):
    """What they make of it is an image."""
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "by-hand")
    await verify_image(tmp_path / "by-hand")


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
