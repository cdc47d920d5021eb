"""What nobody would write on purpose: generated JSON, damaged documents, and whether anything was changed by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

import soak

_T = TypeVar("_T", bound=Callable[..., Any])

LONGEST = timedelta(seconds=60)
"""For one example, on a machine with other things to do."""


def examples(full: int) -> Callable[[_T], _T]:
    """How a test is generated: ``full`` examples in ``make soak``, a tenth of them else, from $OVM_SEED."""
    times = soak.times(full)
    # without explaining, which would trace every line
    how = settings(
        max_examples=times,
        deadline=LONGEST,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.soak(pytest.mark.generated(times)(seed(soak.SEED)(how(test))))


texts = st.text(st.characters(), max_size=12) | st.text(st.characters(categories=["Cs", "Cc"]), max_size=3)
"""Lone surrogates, NULs and other control characters included."""

numbers = (
    st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**31, 2**32, 2**53, 2**63, 2**64, 10**400])
    | st.floats()
)

values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Anything JSON can hold, and some that it cannot."""

DEEP = 20_000


@st.composite
def documents(draw: st.DrawFn, *valid: object) -> bytes:
    """What may be where one of these documents is expected: it, something like it, or something else altogether."""
    document = draw(st.sampled_from(valid)) if valid else None
    match draw(st.sampled_from(["same", "field", "field", "field", "text", "text", "any", "deep", "bytes", "twice"])):
        case "same":
            return written(draw, document)
        case "field":
            return written(draw, _changed(draw, document))
        case "text":
            return mutated(draw, written(draw, document))
        case "any":
            return written(draw, draw(values))
        case "deep":
            return _deep(draw, written(draw, document))
        case "twice":
            text = json.dumps(document)
            return (text[:-1] + "," + text[1:]).encode() if isinstance(document, dict) and document else text.encode()
        case _:
            return draw(st.binary(max_size=64))


def written(draw: st.DrawFn, document: object) -> bytes:
    """As text, in one of the ways in which people's programs do it; mostly the usual one."""
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 2])))
    coding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32"]))
    return text.encode(coding, "surrogatepass")


def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """With some bytes changed, cut out, put in, or the end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from(["flip", "cut", "put in", "end", "again"])):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del changed[at : at + draw(st.integers(1, 16))]
            case "put in":
                changed[at:at] = draw(
                    st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\xff", b"[", b"9" * 5000])
                )
            case "end":
                del changed[at:]
            case "again":
                changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
    return bytes(changed)


def _changed(draw: st.DrawFn, document: object) -> object:
    """One field, at any depth, taken away or another."""
    if isinstance(document, dict) and document:
        key = draw(st.sampled_from(sorted(document)))
        match draw(st.sampled_from(["value", "inside", "inside", "gone", "renamed", "more"])):
            case "value":
                return document | {key: draw(values)}
            case "inside":
                return document | {key: _changed(draw, document[key])}
            case "gone":
                return {name: value for name, value in document.items() if name != key}
            case "renamed":
                return {draw(texts) if name == key else name: value for name, value in document.items()}
            case _:
                return document | {draw(texts): draw(values)}
    if isinstance(document, list) and document:
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], _changed(draw, document[at]), *document[at + 1 :]]
    return draw(values)


def _deep(draw: st.DrawFn, content: bytes) -> bytes:
    """Nested deeper than any reader can follow by calling itself: by itself, or in a field that nobody asked for."""
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"":', b"}]")]))
    nested = opening * DEEP + (b"1" + closing * DEEP if draw(st.booleans()) else b"")
    if content[:1] == b"{" and draw(st.booleans()):
        return b'{"nobody asked": ' + nested + b", " + content[1:]
    return nested


Snapshot = dict[str, tuple[object, ...]]


def snapshot(directory: Path) -> Snapshot:
    """All that is below: kinds, modes, sizes, times, contents."""
    found: Snapshot = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found[str(path)] = (status.st_ino, status.st_mode, status.st_size, *times, content)
    return found


@contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Nothing below is any different afterwards; not even written anew as it was."""
    before = snapshot(directory)
    yield
    after = snapshot(directory)
    assert after == before, {name for name in before | after if before.get(name) != after.get(name)}
