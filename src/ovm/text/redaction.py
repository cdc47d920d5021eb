"""Removes secrets from URLs in messages and from text in bug reports.

Known secret values are removed everywhere, in every common encoding. Other secrets are recognized by their place (in a
URL, after a name such as ``password``, in a key block) or by their form, as of a long token. A password alone in a
sentence is not recognized unless its value is known.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

REMOVED = "[removed]"
SECRET_MIN_CHARS = 4
"""Minimum length of a known secret; a shorter one is part of too many harmless words."""
LINE_MAX_CHARS = 2000
"""A longer line is removed completely: the time to redact it grows with the square of its length."""

_HARMLESS_KEYS = frozenset(
    {
        *(
            "audit",
            "bits",
            "bogomips",
            "bytes",
            "code",
            "comm",
            "console",
            "count",
            "cpu",
            "cpus",
            "earlycon",
            "entries",
        ),
        *(
            "error",
            "exit",
            "fd",
            "gid",
            "index",
            "init",
            "inode",
            "irq",
            "level",
            "lpj",
            "major",
            "mem",
            "minor",
            "mode",
        ),
        *("msg", "mtu", "nr_cpu_ids", "nr_cpus", "order", "panic", "pid", "port", "ppid", "quiet", "reboot", "result"),
        *("ro", "root", "rootflags", "rootfstype", "rw", "size", "status", "time", "tsc", "type", "uid", "vcpus"),
    }
)
"""Names with harmless values after ``=``, from the logs of the kernel, systemd and helper processes."""
_NAMED_SECRET = re.compile(
    r"passw|passphrase|passcode|\bpass\b|\bpw\b|\bpwd\b|secret|token|credential|(?:api|access|private|signing).?key"
    r"|authorization|\bauth\b|bearer|\bbasic\s|cookie|session.?id|(?:\b|_)pat\b|signature|webhook",
    re.IGNORECASE,
)
_PAIR = re.compile(r"(?:(?<![\w.-])([\w.-]++)\s*+)?=")
_UNSPACED = re.compile(r"\S*")
_CREDENTIALS_ALONE = re.compile(r"(?<![^\s\"'=(\[<:/@])([^\s\"'=(\[<:/@]++:(?!//)\S*)@([\w\[]\S*)")
_UNQUOTED = re.compile(r"[^\s\"'<>]+")
_QUERY = re.compile("[?#]")
_PEM = re.compile(r"-----BEGIN [^-\n]*-----.*?(?:-----END [^-\n]*-----|\Z)", re.DOTALL)
_PEM_END = "-----END "
_PEM_LINE = re.compile(r"[A-Za-z0-9+/=]+\r?")
_WORD = re.compile(r"[^\s\"'<>(){}\[\],;]+")
_TOKEN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]{20,}")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+=_-][A-Za-z0-9+/=_-]{31,}")


def shown_url(url: str) -> str:
    """Return ``url`` without its user, password, query and fragment.

    A password may contain ``/``, ``@``, ``?`` and ``#``, so the host begins after the last ``@``. If that ``@`` may be
    part of a query, only the scheme is left.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    credentials, at, rest = rest.rpartition("@")
    if _is_ambiguous(credentials):
        return f"{scheme}{separator}{REMOVED}"
    place = re.split(r"[?#]", rest, maxsplit=1)
    marker = f"{REMOVED}@" if at and credentials else ""
    return f"{scheme}{separator}{marker}{place[0]}" + (f"?{REMOVED}" if len(place) > 1 else "")


def _is_ambiguous(before_at: str) -> bool:
    """Return whether text before an ``@`` may be either a password or a host with the start of a query."""
    return "?" in before_at or "#" in before_at


def credentials_of(url: str) -> Iterator[str]:
    """Yield the user and password in ``url``, together and each alone, both as written and decoded."""
    rest = url.partition("://")[2] or url
    together, at, _ = rest.rpartition("@")
    if not at:
        return
    for part in (together, *together.split(":", 1)):
        yield part
        yield unquote(part)


def without_credentials(line: str) -> str:
    """Return a line of text without the users and passwords of its URLs."""
    if "@" not in line:
        return line
    begin, at = line.find("://") + len("://"), line.rfind("@")
    if len("://") <= begin <= at:
        line = line[:begin] + _credentials_cut(line[begin:at], line[at + 1 :])
    return _CREDENTIALS_ALONE.sub(lambda found: _credentials_cut(found[1], found[2]), line)


def _credentials_cut(before_at: str, after: str) -> str:
    if _is_ambiguous(before_at):
        return REMOVED + _UNSPACED.sub("", after, count=1)
    return f"{REMOVED}@{after}"


class Redactor:
    """Removes the known ``secrets``, and everything that looks like a secret, from text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        known = {secret for secret in secrets if len(secret) >= SECRET_MIN_CHARS}
        forms = {form for secret in known for form in _forms(secret) if len(form) >= SECRET_MIN_CHARS}
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return ``text`` without secrets; its line ends stay."""
        for form in self._forms:
            text = text.replace(form, REMOVED)
        lines = _without_rest_of_key(_PEM.sub(REMOVED, text).split("\n"))
        return "\n".join(map(_clean_line, lines))


def _forms(secret: str) -> Iterator[str]:
    """Yield the encodings in which programs write a value."""
    yield secret
    for escaped in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        yield escaped[1:-1]
    for encoded in (quote(secret, safe="", errors="replace"), quote(secret, errors="replace")):
        yield encoded
        yield re.sub("%..", lambda found: found[0].lower(), encoded)
    yield quote_plus(secret, errors="replace")
    raw = secret.encode(errors="surrogatepass")
    yield raw.hex()
    yield raw.hex().upper()
    yield from _base64_forms(raw)


def _base64_forms(raw: bytes) -> Iterator[str]:
    """Yield the base64 characters that depend only on ``raw``, for each of its three alignments in a longer text."""
    for before in range(3):
        whole = base64.b64encode(b"\0" * before + raw).decode()
        mixed = 1 if (before + len(raw)) % 3 else 0
        found = whole.rstrip("=")[(0, 2, 3)[before] :]
        found = found[: len(found) - mixed]
        yield found
        yield found.translate(str.maketrans("+/", "-_"))


def _without_rest_of_key(lines: Iterable[str]) -> list[str]:
    """Return the lines without those of a key block whose beginning is missing."""
    kept: list[str] = []
    for line in lines:
        if _PEM_END in line:
            while kept and _PEM_LINE.fullmatch(kept[-1]):
                kept.pop()
            line = REMOVED  # noqa: PLW2901
        kept.append(line)
    return kept


def _clean_line(line: str) -> str:
    if len(line) > LINE_MAX_CHARS:
        return f"[removed: a line of {len(line)} characters]"
    line = _UNQUOTED.sub(_without_query, without_credentials(line))
    return _WORD.sub(_clean_word, _cut_at_names(line))


def _without_query(found: re.Match[str]) -> str:
    word = found[0]
    query = _QUERY.search(word, word.find("://")) if "://" in word else None
    return f"{word[: query.start()]}?{REMOVED}" if query else word


def _cut_at_names(line: str) -> str:
    """Return ``line`` up to the first name that may precede a secret: an unknown ``name=``, or ``password``."""
    end = len(line)
    if found := _NAMED_SECRET.search(line):
        end = found.end()
        if name := re.match(r"\w*", line[end:]):
            end += name.end()
    for pair in _PAIR.finditer(line, 0, end):
        if (pair[1] or "").lower() not in _HARMLESS_KEYS:
            end = pair.end()
            break
    return line if not line[end:].strip(" \t\r.,:;)\"'") else f"{line[:end]} {REMOVED}"


def _clean_word(found: re.Match[str]) -> str:
    word = found[0]
    return REMOVED if any(map(_is_token, _TOKEN.findall(word))) or any(map(_is_base64, _BASE64.findall(word))) else word


def _is_token(run: str) -> bool:
    return not (run.isalpha() or run.isdigit() or run.startswith("0x"))


def _is_base64(run: str) -> bool:
    return any(c.isupper() for c in run) and any(c.islower() for c in run) and any(c.isdigit() for c in run)
