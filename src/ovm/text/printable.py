"""Text that somebody else chose, made fit to print and to log: the one filter, and a type that always passes it.

A terminal obeys escape sequences, a log believes line ends, and a reader believes the order that bidirectional marks
give. So whatever came from a guest, a helper or a server is shown without any of them.
"""

from __future__ import annotations

REPLACEMENT = "·"
"""Stands for each character that is not printed."""
LENGTH_MAX = 1000
"""Characters of a :class:`GuestText` that are shown."""


def printable(text: str) -> str:
    """``text`` as one line without control characters, bidirectional marks and lone surrogates; tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else REPLACEMENT for c in text)


def printable_lines(text: str) -> str:
    """The same for text of several lines, whose line ends stay."""
    return "\n".join(printable(line) for line in text.split("\n"))


class ForeignError(Exception):
    """Stands for an exception whose words somebody else may have chosen; :func:`tamed` makes one."""


def tamed(error: BaseException) -> BaseException:
    """``error`` as the cause of one of ours: same traceback, printable words, and so on for its own causes.

    Python prints the causes of an exception as they are, with the words of the server in them. What the operating
    system raised stays as it is.
    """
    if isinstance(error, OSError):
        return error
    stand_in = ForeignError(f"{type(error).__name__}: {GuestText.of(error)}").with_traceback(error.__traceback__)
    cause = error.__cause__ or error.__context__
    stand_in.__cause__ = None if cause is None else tamed(cause)
    return stand_in


class GuestText:
    """Words of a guest, or of a server that answers in its name.

    ``str()``, ``repr()`` and every format give one printable line of at most ``LENGTH_MAX`` characters, so it can be
    put into a message, a log line or an exception. :attr:`raw` is what was sent, for programs that parse it.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: bytes | str) -> None:
        self.raw = raw if isinstance(raw, bytes) else raw.encode(errors="surrogatepass")

    @classmethod
    def of(cls, error: BaseException) -> GuestText:
        """What a foreign exception says; a hostile server may have chosen its words."""
        return cls(str(error) or type(error).__name__)

    def __str__(self) -> str:
        # no more than can be shown is decoded, and no character is cut in two where it is
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
