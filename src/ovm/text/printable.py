"""Makes untrusted text safe to print and to log: a filter, and a type that always applies it.

Escape sequences control a terminal, line ends forge log lines, and bidirectional marks reorder text. Text from a guest,
a helper process or a server is shown without any of them.
"""

from __future__ import annotations

REPLACEMENT = "·"
"""Replaces each character that is not printable."""
LENGTH_MAX = 1000
"""Maximum shown length of a :class:`GuestText`."""


def printable(text: str) -> str:
    """Return ``text`` as one line without control characters, bidirectional marks or lone surrogates; tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else REPLACEMENT for c in text)


def printable_lines(text: str) -> str:
    """Return ``text`` of several lines, each made printable."""
    return "\n".join(printable(line) for line in text.split("\n"))


class ForeignError(Exception):
    """Replaces an exception whose message is untrusted; :func:`tamed` creates it."""


def tamed(error: BaseException) -> BaseException:
    """Return a copy of ``error`` to use as the cause of another: same traceback, printable message and causes.

    Python prints an exception's causes unfiltered, including text from a server. An ``OSError`` is returned unchanged.
    """
    if isinstance(error, OSError):
        return error
    stand_in = ForeignError(f"{type(error).__name__}: {GuestText.of(error)}").with_traceback(error.__traceback__)
    cause = error.__cause__ or error.__context__
    stand_in.__cause__ = None if cause is None else tamed(cause)
    return stand_in


class GuestText:
    """Text from a guest, or from a server that answers in its name.

    ``str()``, ``repr()`` and every format return one printable line of at most ``LENGTH_MAX`` characters, safe in a
    message, a log line or an exception. :attr:`raw` is the received text, for programs that parse it.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: bytes | str) -> None:
        self.raw = raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")

    @classmethod
    def of(cls, error: BaseException) -> GuestText:
        """Return the message of a foreign exception, which a hostile server may control."""
        return cls(str(error) or type(error).__name__)

    def __str__(self) -> str:
        # decode only what can be shown: 4 bytes for each character, and 4 more so that the cut splits none of them
        text = self.raw[: 4 * LENGTH_MAX + 4].decode(errors="replace").strip()
        line = printable(text[: LENGTH_MAX + 1])
        return line if len(line) <= LENGTH_MAX else line[: LENGTH_MAX - 1] + "…"

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestText) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)
