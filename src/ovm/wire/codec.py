"""JSON of structs with paths and errors: a path is a string, an error the dict of :meth:`OVMError.as_dict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ovm.errors import OVMError, from_dict

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Return ``value`` as JSON."""
    return msgspec.json.encode(value, enc_hook=_plain)


def builtins(value: Any) -> Any:
    """Return ``value`` as the dicts, lists and strings that :func:`encode` would write."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def decode(content: bytes | str, kind: type[T]) -> T:
    """Return the ``kind`` that :func:`encode` wrote.

    Raises:
        msgspec.DecodeError: ``content`` is not JSON, or not a ``kind``.
        UnicodeDecodeError: ``content`` is not UTF-8.
        RecursionError: ``content`` is nested too deeply.
    """
    return msgspec.json.decode(content, type=kind, dec_hook=_made)


def schema(kind: type) -> dict[str, Any]:
    """Return the JSON schema of a type that msgspec does not support."""
    if issubclass(kind, Path):
        return {"type": "string"}
    if issubclass(kind, OVMError):
        return {"type": "object"}
    raise NotImplementedError(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, OVMError):
        return value.as_dict()
    raise NotImplementedError(type(value))


def _made(kind: type, value: Any) -> Any:
    """Return ``value`` as a ``kind``; msgspec converts a TypeError to a ValidationError."""
    if issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    if issubclass(kind, OVMError) and isinstance(value, dict):
        return from_dict(value)
    raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
