"""The project's prose is plain: phrases that read as if translated stay out, and the pages stay short.

``PLAIN`` says what to write instead. What ``scripts/docs.py`` generates is checked where it comes from, in src/ovm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRONT = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = sorted((ROOT / "docs" / "commands").glob("*.md"))
SOURCES = sorted(path for path in (ROOT / "src" / "ovm").rglob("*") if path.suffix in {".py", ".sh", ".toml"})

WORDS_MAX = 25_000
"""Words of prose in README.md, SECURITY.md and docs/: neither code nor names in backticks nor generated text."""

PLAIN = {
    r"(answers?|ready|boots?) [\d.]+ times as soon": "3.4x sooner than ...",
    r"\bas that of Debian's own packages": "than with Debian's stock packages",
    r"\bin some hundred boots": "about once in a few hundred boots",
    r"\banybody's\b": "any kernel, any user",
    r"\bnor runs on\b|\bafter Ctrl-C neither\b": "Nothing is left behind, even after Ctrl-C",
    r"\bnobody's failures\b|\bholds? nobody's\b": "Per-source penalties are off",
    r"\b[Ww]ho(ever)? uses it holds\b": "Each user holds ...",
    r"\btakes? back from the dead\b": "released by the kernel when the process dies",
    r"\b[Aa] memory that\b|\b[Aa] memory has\b|\b(from|there was|loads?|no) a memory\b": "a saved state",
    r"\bdoes not go with the machine\b": "no longer matches the machine",
    r"\b(go|goes|going|gone|went) on from\b": "resume",
    r"\bIt was booted, for\b": "Could not resume (...); booted instead",
    r"\bcounts? from the next (start|one)\b|\bfrom the next start on\b": "Takes effect at the next start",
    r"^\s*(help=)?\"?Whose\b|\bWhose (words|machine)\b": "name the thing: Machine to configure. Shell syntax to print.",
    r"\bOf what is at\b": "Expected SHA-256 of the download.",
    r"\b[Tt]ake the setting away\b|\bso that the default counts\b": "Remove the setting and use the default",
    r"\bsomebody who is to help\b": "Collect diagnostics for a bug report",
    r"\bwhat is called (a )?(token|secret)": "Values named token or secret are redacted",
    r"\bit goes behind\b": "missing command; put it after --",
    r"\bmade it for itself\b|\bend it there\b": "in use by process 7 through the library; stop it there",
    r"\bkernel fell\b|\bfell before\b|\bits first word\b": "kernel crashed before its first boot message",
    r"\bwho was to be told\b": "progress callback raised",
    r"\bsomebody in the guest\b|\bspeaks to us\b|\bhas not (its|the) key\b": "a connection without the channel key",
    r"\bwho works ahead\b|\bhands over all\b": "the read-ahead thread drains its queue",
    r"\b(made|make|makes|making) anew\b|\bbegins? anew\b": "recreate, replace, start over",
    r"\bst(and|ands|anding|ood) still\b": "pause, be paused, hang",
    r"\bwhat ails\b": "health problem",
    r"\bput there whole\b": "written atomically",
}
"""A phrase, as a regular expression, and the better words."""

EXAMPLES = (
    "podman answers 3.4 times as soon as that of Debian's own packages",
    "A kernel hangs or panics once in some hundred boots, anybody's",
    "nothing else stays, nor runs on, after Ctrl-C neither",
    "It holds nobody's failures against his address",
    "Who uses it holds a kernel lock, which the system takes back from the dead",
    "A memory that does not go with the machine any more is removed",
    "It was booted, for its memory could not be gone on from: a reason",
    "it counts from the next start on: ovm restart dev",
    "Whose.",
    "Whose words to use.",
    "Of what is at URL.",
    "Take the setting away, so that the default counts",
    "Pack what somebody who is to help needs to know",
    "what is called token or secret is taken out",
    "there is no command; it goes behind --",
    "held by process 7, which made it for itself; end it there",
    "the kernel fell before its first word, so it is started once more",
    "who was to be told of the progress failed",
    "somebody in the guest who has not its key speaks to us",
    "Test that who works ahead hands over all and ends; tell users",
    "The file is made anew",
    "the virtual CPUs stand still",
    "what ails it",
    "It is put there whole",
)
"""Sentences as this project once had them."""

GENERATED = re.compile(
    r"<!-- from the code: .*?<!-- as written -->|<!-- make clients: begin.*?make clients: end -->", re.DOTALL
)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def blanked(pattern: re.Pattern[str], text: str) -> str:
    """``text`` without what matches, its lines still where they were."""
    return pattern.sub(lambda found: "\n" * found[0].count("\n"), text)


def as_written(pattern: str) -> str:
    """A pattern that also matches where a line, or a comment's line, ends within the phrase."""
    return pattern.replace(" ", r"[ \n#]+")


def prose(text: str) -> str:
    """A page without code and what is generated; tables that people write count."""
    return re.sub(r"`[^`\n]+`", "", blanked(CODE, blanked(GENERATED, text)))


def words(text: str) -> int:
    """How many words have a letter or a digit in them; a table's rules and bars have none."""
    return sum(1 for word in prose(text).split() if re.search(r"\w", word))


def words_of_prose() -> dict[str, int]:
    """The words of each page that counts. The changelog and CONTRIBUTING.md do not."""
    pages = [*FRONT[:2], *PAGES, *COMMANDS]
    return {str(page.relative_to(ROOT)): words(page.read_text("utf-8")) for page in pages}


def phrases(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, phrase and better words of each hit."""
    for pattern, better in PLAIN.items():
        for found in re.finditer(as_written(pattern), text, re.MULTILINE):
            yield text.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), better


def told(path: Path, text: str) -> list[str]:
    """Each hit as a line that says where it is and what to write."""
    return [f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {better}" for line, phrase, better in phrases(text)]


@pytest.mark.parametrize("page", [*FRONT, *PAGES, *COMMANDS], ids=lambda page: page.name)
def test_a_page_is_plain(page):
    """No page has a phrase that the table replaces."""
    assert "\n".join(told(page, blanked(GENERATED, page.read_text("utf-8")))) == ""


def test_the_source_is_plain():
    """No docstring, message or comment below src/ovm has such a phrase."""
    hits = [hit for path in SOURCES for hit in told(path, path.read_text("utf-8"))]
    assert "\n".join(hits) == ""


@pytest.mark.parametrize("sentence", EXAMPLES)
def test_a_translated_sentence_is_found(sentence):
    """Each example has a phrase of the table."""
    assert list(phrases(sentence))


@pytest.mark.parametrize("pattern", PLAIN)
def test_each_pattern_finds_an_example(pattern):
    """A pattern that no example has would never be missed."""
    assert any(re.search(as_written(pattern), sentence, re.MULTILINE) for sentence in EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_its_reader(page):
    """The first sentence below the title says whom the page is for."""
    title, _, rest = page.read_text("utf-8").partition("\n\n")
    assert title.startswith("# ")
    assert re.match(r"For [^\n]{20,}", rest), rest.partition("\n")[0]


def test_the_pages_stay_short():
    """Whoever adds a paragraph looks for one that can go."""
    counts = words_of_prose()
    longest = sorted(counts.items(), key=lambda item: -item[1])[:8]
    assert sum(counts.values()) <= WORDS_MAX, f"{sum(counts.values())} words; the longest: {longest}"
