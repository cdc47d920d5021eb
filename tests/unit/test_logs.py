"""Logs: three generations, and a tail fit to print."""

from __future__ import annotations

import pytest

from ovm.process import logs


def test_three_generations_are_kept(tmp_path):
    """Of five starts the last three logs are there, the newest without a number."""
    for start in range(1, 6):
        path = logs.rotate(tmp_path, "gvproxy")
        assert path.read_bytes() == b""
        path.write_text(f"start {start}")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"gvproxy.log": "start 5", "gvproxy.2.log": "start 4", "gvproxy.3.log": "start 3"}


def test_logs_are_private(tmp_path):
    """A log is for its owner's eyes."""
    assert logs.rotate(tmp_path, "qemu").stat().st_mode & 0o777 == 0o600


def test_one_name_does_not_move_another(tmp_path):
    """Rotating one log leaves those of other helpers where they are."""
    logs.rotate(tmp_path, "qemu").write_text("qemu's")
    logs.rotate(tmp_path, "qemu-2").write_text("the other's")
    logs.rotate(tmp_path, "qemu-2")
    assert (tmp_path / "qemu.log").read_text() == "qemu's"


def test_a_gap_does_no_harm(tmp_path):
    """A generation that somebody removed is no error, and nothing is lost by it."""
    for text in ("1", "2", "3"):
        logs.rotate(tmp_path, "x").write_text(text)
    (tmp_path / "x.2.log").unlink()
    logs.rotate(tmp_path, "x").write_text("4")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.log": "4", "x.2.log": "3", "x.3.log": "1"}


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", ()),
        (b"\n\n \n", ()),
        (b"one\ntwo", ("one", "two")),
        (b"one\r\ntwo \n", ("one", "two")),
        (b"\x1b[31mred\x1b[0m\n", ("·[31mred·[0m",)),
        (b"\xff\xfe\n", ("\ufffd\ufffd",)),
        ("grün\ttab\n".encode(), ("grün\ttab",)),
        (b"a\0b\x07\n", ("a·b·",)),
    ],
)
def test_the_tail_is_fit_to_print(tmp_path, content, lines):
    """The tail of any bytes is lines of text that cannot harm a terminal, without empty ones."""
    path = tmp_path / "log"
    path.write_bytes(content)
    assert logs.tail(path) == lines


def test_the_tail_is_the_last_lines(tmp_path):
    """Of a log of any size the last fifteen lines are shown, and no more."""
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(50_000)))
    assert logs.tail(path) == tuple(f"line {n}" for n in range(49_985, 50_000))
    assert logs.tail(path, 2) == ("line 49998", "line 49999")


def test_one_endless_line_is_cut(tmp_path):
    """A log without line ends does not fill the screen with all it has."""
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1_000_000)
    assert len("".join(logs.tail(path))) <= 16 * 1024


def test_no_log_has_no_tail(tmp_path):
    """A log that is not there is empty, not an error on top of an error."""
    assert logs.tail(tmp_path / "missing") == ()


def test_a_reader_follows_a_log_over_starts(tmp_path):
    """The last lines, blank ones too; then whole lines as they are added; then the next start's log."""
    path = logs.rotate(tmp_path, "x")
    path.write_text("one\n\ntwo\r\nthr", newline="")
    with logs.Reader(path, 3) as reader:
        assert reader.more() == ["", "two"]
        assert reader.more() == []
        with path.open("a") as log:
            log.write("ee\n\x1b[2Jfour\nfi")
        assert reader.more() == ["three", "·[2Jfour"]
        with path.open("a") as log:
            log.write("ve\n")
        logs.rotate(tmp_path, "x").write_text("of the next start\n")
        assert reader.more() == ["five"]
        assert reader.more() == ["of the next start"]
        path.unlink()
        assert reader.more() == []


def test_a_reader_tells_the_unfinished_line_at_the_end(tmp_path):
    (tmp_path / "x.log").write_text("one\ntwo")
    with logs.Reader(tmp_path / "x.log", 100) as reader:
        assert (reader.more(), reader.rest(), reader.rest()) == (["one"], ["two"], [])
