from __future__ import annotations

import pytest

from ovm.errors import OVMError, from_dict
from ovm.text.printable import LENGTH_MAX, GuestText, printable

HOSTILE = [
    pytest.param(b"\x1b]0;owned\x07\x1b[2J", id="escapes"),
    pytest.param(b"one\r\n2026-01-01 INFO ovm: forged", id="line ends"),
    pytest.param("\u202egnp.exe\u2066".encode(), id="bidirectional marks"),
    pytest.param(b"\xff\xfe\x80", id="invalid UTF-8"),
    pytest.param("\x9b31m\u2028\u2029\x85".encode(), id="C1 and other line ends"),
    pytest.param(b"\0\b\x7f", id="other controls"),
]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("shown", [str, repr, "{}".format, "{:>20}".format, lambda text: f"{text!s}"])
def test_the_words_of_a_guest_are_one_printable_line(hostile, shown):
    """However they are put into text, nothing is left that a terminal obeys or that a log takes for a line."""
    told = shown(GuestText(hostile))
    assert told.isprintable()


def test_the_words_of_a_guest_are_shown_up_to_a_length():
    """A megabyte makes one short line, and is kept for whoever parses it."""
    text = GuestText("ä".encode() * 500_000)
    assert len(str(text)) == LENGTH_MAX
    assert str(text).endswith("…")
    assert len(text.raw) == 1_000_000


def test_tabs_and_letters_of_any_language_stay():
    """The filter takes away what moves a cursor, and no more."""
    assert printable("größer\tελλ\t日本") == "größer\tελλ\t日本"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_error_is_printable_whatever_it_was_made_of(hostile):
    """Each part of it, also of one that another process told of."""
    words = hostile.decode(errors="replace")
    told = {"code": "guest-error", "message": words, "hint": words, "exit_reason": words, "log_tail": [words]}
    made = OVMError(words, hint=words, exit_reason=words, log_tail=(words,))
    for error in (made, from_dict(told)):
        assert all(line.isprintable() for line in str(error).split("\n"))
        assert len(str(error).split("\n")) == 4
