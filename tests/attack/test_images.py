"""Row B21: what an image, a release or the index says of itself is bounded and fit to print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from ovm import cli
from ovm.errors import ImageError, OVMError
from ovm.image import images, load_image, release
from ovm.image import index as releases
from ovm.registry import images as registry
from releases import make_image

DIGEST = "0" * 64
HUGE = 10**400
NOT_SIZES = [-1, -(2**63), 0, 2**41, 2**63, 2**64, HUGE, 1.5, "1", None, True, [], {}]
NOT_NUMBERS = ["NaN", "Infinity", "1e400", "-0.1"]
NOT_WORDS = [
    "\x1b[2J",
    "a\x1b]0;x\x07",
    "a\nb",
    "a\n",
    "a\rb",
    "a\x85b",
    "\u202eb",
    "\ud800",
    "..",
    "../a",
    "/a",
    "a/b",
    "",
    " a",
    "x" * 200,
    -1,
    None,
    [],
]
"""Escapes, ends of lines, bidirectional marks, paths, and what is no text."""

Change = Callable[[dict[str, Any]], object]


def described(size: int = 3, **changes: object) -> dict[str, Any]:
    files = {name: {"sha256": DIGEST, "size": size} for name in images.FILE_NAMES}
    return {
        "format": 1,
        "guest": "ovm",
        "arch": "amd64",
        "suite": "trixie",
        "versions": {"podman": "5.4.2"},
        "tree_sha256": DIGEST,
        "packages": {"podman": "5.4.2+ds1-1~deb13u1"},
        "files": files,
    } | changes


def refused(document: dict[str, Any]) -> str:
    """What is said of it, in one line that is not long."""
    with pytest.raises(ImageError) as caught:
        images.read_description(json.dumps(document).encode(), "image.json")
    return str(caught.value)


def test_what_is_described_well_is_taken():
    """Else nothing is shown by what is refused."""
    found = images.read_description(json.dumps(described()).encode(), "image.json")
    assert (found.versions["podman"], found.occupied) == ("5.4.2", 9)


@pytest.mark.parametrize("size", NOT_SIZES, ids=lambda size: str(size)[:12])
@pytest.mark.parametrize("field", ["size", "data_bytes"])
def test_a_size_is_a_size(field, size):
    """Whatever else is refused: it would pass for room, or be printed as a negative size."""
    if field == "data_bytes" and size == 0:  # which means that it is not sparse
        return
    document = described()
    document["files"]["rootfs"][field] = size
    refused(document)


@pytest.mark.parametrize("number", NOT_NUMBERS)
def test_a_size_is_a_number_of_json(number):
    """NaN, infinities and fractions are refused."""
    text = json.dumps(described(size=12345)).replace("12345", number, 1)
    with pytest.raises(ImageError):
        images.read_description(text.encode(), "image.json")


def test_a_file_occupies_no_more_than_its_size():
    """A sparse one occupies less."""
    document = described()
    document["files"]["rootfs"]["data_bytes"] = 4
    refused(document)


@pytest.mark.parametrize("word", NOT_WORDS, ids=repr)
@pytest.mark.parametrize(
    "put",
    [
        lambda document, word: document.update(suite=word),
        lambda document, word: document.update(guest=word),
        lambda document, word: document.update(arch=word),
        lambda document, word: document["versions"].update(podman=word),
        lambda document, word: document["versions"].update({f"{word}/": "1"}),
        lambda document, word: document["packages"].update(podman=word),
        lambda document, word: document["packages"].update({f"\n{word}": "1"}),
        lambda document, word: document["files"].update({f"/{word}": document["files"]["kernel"]}),
        lambda document, word: document["files"]["kernel"].update(sha256=word),
        lambda document, word: document["files"]["kernel"].update(sha256=f"{DIGEST}{word or chr(10)}"),
        lambda document, word: document.update(tree_sha256=f"{DIGEST}\n"),
    ],
    ids=range(11),
)
def test_a_word_is_a_word(put, word):
    """Names and versions have letters, digits and a few signs in them, and the message quotes none that has others."""
    document = described()
    put(document, word)
    said = refused(document)
    assert said.replace("\n  hint", "").isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize("size", NOT_SIZES, ids=lambda size: str(size)[:12])
@pytest.mark.parametrize("field", ["size", "unpacked"])
def test_a_release_of_the_index_has_sizes(field, size):
    """A negative one would pass every check for room."""
    known = {"url": "https://a.example/x.zip", "sha256": DIGEST, "size": 1, "unpacked": 1, "version": "1"}
    assert releases.read_index(json.dumps({"format": 1, "images": {"amd64": known}}).encode())
    with pytest.raises(ImageError):
        releases.read_index(json.dumps({"format": 1, "images": {"amd64": known | {field: size}}}).encode())


@pytest.mark.parametrize(
    "change",
    [
        *({"version": word} for word in NOT_WORDS),
        *(
            {"url": url}
            for url in ("file:///etc/passwd", "https://a\nb", "https://\x1b[2J", "https://" + "x" * 9999, 1)
        ),
        {"sha256": f"{DIGEST}\n"},
    ],
    ids=repr,
)
def test_a_release_of_the_index_has_words(change):
    """Its address and version are printed, too."""
    known = {"url": "https://a.example/x.zip", "sha256": DIGEST, "size": 1, "unpacked": 1, "version": "1"}
    with pytest.raises(ImageError):
        releases.read_index(json.dumps({"format": 1, "images": {"amd64": known | change}}).encode())


@pytest.mark.parametrize("size", NOT_SIZES, ids=lambda size: str(size)[:12])
def test_a_machine_is_made_of_an_image_with_sizes(tmp_path, size):
    """The reader that starts machines refuses the same."""
    image = make_image(tmp_path / "a", rootfs=b"x")
    document = json.loads((image / "image.json").read_text())
    assert registry.load_image(image).arch == "amd64"
    document["files"]["rootfs"]["size"] = size
    (image / "image.json").write_text(json.dumps(document))
    with pytest.raises(ImageError):
        registry.load_image(image)
    with pytest.raises(ImageError):
        load_image(image)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "images"


def ovm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err


HOSTILE = "a\x1b[2J\n\u202eb"


@pytest.mark.parametrize("how", [(), ("--format", "{name} {directory}"), ("--json",)], ids=str)
def test_image_ls_prints_no_escapes(home, capsys, how):
    """Nor line ends and bidirectional marks, which the name of an image's directory may have."""
    make_image(home / HOSTILE, rootfs=b"x")
    status, said = ovm(capsys, "image", "ls", *how)
    assert status == 0
    assert len(said.splitlines()) == 1
    assert said.strip().isprintable()


def test_image_ls_passes_over_an_image_that_lies(home, capsys):
    """One with a negative size is none."""
    image = make_image(home / "a", rootfs=b"x")
    text = (image / "image.json").read_text()
    (image / "image.json").write_text(text.replace('"size": 5000', '"size": 5000, "data_bytes": -9999999999'))
    assert "no image" in ovm(capsys, "image", "ls")[1]


@pytest.mark.parametrize("name", ["..", ".", ".a.pulling", "../images/a"])
def test_an_image_is_removed_by_its_name_alone(home, capsys, name):
    """The directory above the images, or a hidden one, is not what such a name means."""
    image = make_image(home / "a", rootfs=b"x")
    (home / "image.json").write_text((image / "image.json").read_text())
    (home.parent / "image.json").write_text((image / "image.json").read_text())
    assert ovm(capsys, "image", "rm", name)[0] != 0
    assert (image / "image.json").exists()


async def unpacked(tmp_path: Path, change: Change) -> None:
    image = make_image(tmp_path / "made", rootfs=b"x" * 4096)
    packed = await release.pack_image(image, tmp_path)
    import zipfile

    rewritten = tmp_path / "hostile.zip"
    with zipfile.ZipFile(packed.path) as source, zipfile.ZipFile(rewritten, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "image.json":
                document = json.loads(content)
                change(document)
                content = json.dumps(document).encode()
            target.writestr(name, content)
    release.unpack_release(rewritten, tmp_path / "image", "amd64", lambda _done, _total: None)


async def test_a_release_with_negative_sizes_is_refused(tmp_path):
    """It passed the check for room, whatever it held."""
    with pytest.raises(ImageError):
        await unpacked(tmp_path, lambda document: document["files"]["rootfs"].update(data_bytes=-(2**60)))
    assert not (tmp_path / "image").exists()


@fuzz.examples(1000)
@given(data=st.data())
def test_whatever_a_description_says(data):
    """It is refused by a typed error, or every number and word of it is bounded and printable."""
    document = data.draw(fuzz.documents(described()))
    try:
        found = images.read_description(document, "image.json")
    except OVMError:
        return
    words = [found.guest, found.suite, *found.versions, *found.versions.values(), *found.packages, *found.files]
    assert all(word.isascii() and word.isprintable() and "/" not in word for word in words)
    assert all(0 < file.occupied <= file.size <= images.SIZE_MAX_BYTES for file in found.files.values())
