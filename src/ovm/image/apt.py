"""The configuration of the host's apt: Debian's archives, and the proxies and certificates to reach them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CODENAMES = frozenset({"bullseye", "bookworm", "trixie", "forky", "duke", "sid"})
_CLASSES = frozenset({"oldoldstable", "oldstable", "stable", "testing", "unstable"})
RELEASES = CODENAMES | _CLASSES
"""Every name that a release of Debian's is known by."""

_CARRIED_OPTIONS = ("check-valid-until", "check-date", "by-hash")
"""Options of a source that control how apt reads the archive, not which keys or architectures it uses."""
_CARRIED_SETTINGS = re.compile(
    r"^(Acquire::(?:https?|ftp)::(?:Proxy|CaInfo|CaPath|Verify-Peer|Verify-Host|SslCert|SslKey)\S*"
    r"|Acquire::(?:Check-Valid-Until|Check-Date|Retries|ForceIPv4|ForceIPv6)) ",
    re.IGNORECASE,
)
_CA_VARIABLES = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True, slots=True)
class Source:
    """One archive with one or more suites: a line or a stanza of apt's configuration."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)


def parse_one_line(text: str) -> Iterator[Source]:
    """Parse the binary sources of a ``sources.list``."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)([^#]*)", line)
        if match:
            options, uri, suite, components = match.groups()
            pairs = (pair.split("=", 1) for pair in (options or "").split() if "=" in pair)
            yield Source(uri, (suite,), tuple(components.split()), {name.lower(): value for name, value in pairs})


def parse_deb822(text: str) -> Iterator[Source]:
    """Parse the binary sources of a ``*.sources`` file."""
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = fields.get(name, "") + " " + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in {"no", "false", "0"} or "deb" not in fields.get("types", "").split():
            continue
        suites, components = tuple(fields.get("suites", "").split()), tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            yield Source(uri, suites, components, fields)


def host_sources(etc_apt: Path) -> list[Source]:
    """Read all binary sources below ``/etc/apt``."""
    parts = etc_apt / "sources.list.d"
    one_line = [etc_apt / "sources.list", *sorted(parts.glob("*.list"))]
    sources = [source for path in one_line if path.is_file() for source in parse_one_line(_read(path))]
    return sources + [source for path in sorted(parts.glob("*.sources")) for source in parse_deb822(_read(path))]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def guest_sources(sources: Iterable[Source], suite: str) -> list[str]:
    """Return one-line sources of ``suite`` from the host's Debian archive; empty if the host has none."""
    debian = [source for source in sources if "main" in source.components and ":/" in source.uri]
    archives = [source for source in debian if RELEASES.intersection(source.suites) and _looks_like_debian(source)]
    if not archives:
        return []
    archive = archives[0]
    lines = [_line(archive, suite)]
    updates = {s for source in archives for s in source.suites} | {
        s for source in debian if source.uri == archive.uri for s in source.suites
    }
    if any(s.endswith("-updates") for s in updates):
        lines.append(_line(archive, f"{suite}-updates"))
    security = [source for source in debian if any(_is_security(s) for s in source.suites)]
    if security:
        lines.append(_line(security[0], f"{suite}-security"))
    return lines


def _looks_like_debian(source: Source) -> bool:
    """Tell Debian's archive by its keys and by a path that ends in /debian: third parties use its suite names too."""
    path = source.uri.rstrip("/")
    keys = source.options.get("signed-by", "debian-archive-keyring")
    return "debian-archive-keyring" in keys and bool(re.search(r"/debian(/\d{8}T\d{6}Z)?$", path))


def _is_security(suite: str) -> bool:
    codename = suite.removesuffix("-security").removesuffix("/updates")
    return codename != suite and codename in RELEASES


def _line(source: Source, suite: str) -> str:
    options = " ".join(f"{name}={source.options[name]}" for name in _CARRIED_OPTIONS if name in source.options)
    return f"deb {f'[{options}] ' if options else ''}{source.uri} {suite} main"


def guest_settings(apt_config_dump: str, environment: Mapping[str, str]) -> list[str]:
    """Return the settings with which the host's apt reaches its archives: proxies, certificates, expired archives."""
    settings = [line.strip() for line in apt_config_dump.splitlines() if _CARRIED_SETTINGS.match(line)]
    settings = [setting for setting in settings if not setting.endswith('"";')]
    bundle = next((environment[name] for name in _CA_VARIABLES if environment.get(name)), "")
    if bundle and not any(setting.lower().startswith("acquire::https::cainfo") for setting in settings):
        settings.append(f'Acquire::https::CaInfo "{bundle}";')
    return settings
