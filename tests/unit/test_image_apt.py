"""Where packages come from: the host's own apt configuration, in both its forms."""

from __future__ import annotations

import pytest

from ovm.image.apt import Source, guest_settings, guest_sources, host_sources, parse_deb822, parse_one_line

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"

DEB822 = f"""\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEYS}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Check-Valid-Until: no
"""


def test_one_line_sources():
    """Options in brackets, comments and source packages are understood."""
    text = """
# deb http://old.example/debian bookworm main
deb [arch=amd64 check-valid-until=no] http://mirror.example/debian bookworm main contrib # ours
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian bookworm-updates main
"""
    assert list(parse_one_line(text)) == [
        Source(
            "http://mirror.example/debian",
            ("bookworm",),
            ("main", "contrib"),
            {"arch": "amd64", "check-valid-until": "no"},
        ),
        Source("http://mirror.example/debian", ("bookworm-updates",), ("main",)),
    ]


def test_deb822_sources():
    """A stanza may name several suites; one without binary packages or disabled is left out."""
    text = DEB822 + "\nTypes: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: sid\nComponents: main\n"
    found = [(source.uri, source.suites) for source in parse_deb822(text)]
    assert found == [
        ("http://mirror.example/debian", ("bookworm", "bookworm-updates")),
        ("http://mirror.example/debian-security", ("bookworm-security",)),
    ]


def test_deb822_folded_fields():
    """A field may go on in the next line."""
    text = "Types: deb\nURIs: http://a.example/debian\n http://b.example/debian\nSuites: trixie\nComponents: main\n"
    assert [source.uri for source in parse_deb822(text)] == ["http://a.example/debian", "http://b.example/debian"]


def test_the_guests_sources_are_the_hosts_with_the_suite_replaced():
    """Updates and security come along where the host has them, and so does its tolerance for old archives."""
    assert guest_sources(parse_deb822(DEB822), "trixie") == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb [check-valid-until=no] http://mirror.example/debian-security trixie-security main",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "deb https://packages.vendor.example/apt bookworm main",
        "deb [signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/debian bookworm main",
        "deb https://vendor.example/linux/debian bookworm stable",
        "deb http://archive.example/ubuntu noble main",
        "deb cdrom:[Debian]/ bookworm main",
    ],
)
def test_third_parties_are_not_taken_for_debian(line):
    """A vendor's archive is no place to install Debian from, whatever its suite is called."""
    assert guest_sources(parse_one_line(line), "trixie") == []


def test_a_snapshot_is_debian():
    """Archives of one day end in its date."""
    line = "deb http://snapshot.example/archive/debian/20250520T000000Z bookworm main"
    assert guest_sources(parse_one_line(line), "trixie") == [
        "deb http://snapshot.example/archive/debian/20250520T000000Z trixie main"
    ]


def test_both_forms_are_read_from_a_host(tmp_path):
    """sources.list, *.list and *.sources; anything else in the directory is not apt's."""
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    (parts / "b.list").write_text("deb http://b.example/debian bookworm main\n")
    (parts / "c.sources").write_text(DEB822)
    (parts / "d.list.save").write_text("deb http://d.example/debian bookworm main\n")
    assert [source.uri for source in host_sources(tmp_path)] == [
        "http://a.example/debian",
        "http://b.example/debian",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    ]


def test_a_host_without_apt_has_no_sources(tmp_path):
    """Then mmdebstrap's own default applies."""
    assert host_sources(tmp_path / "nowhere") == []


def test_settings_that_lead_to_the_archive_are_carried():
    """Proxies, certificates and tolerance; not what concerns the host alone."""
    dump = """\
APT::Architecture "amd64";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::http::Proxy::local.example "DIRECT";
Acquire::https::CaInfo "/etc/ssl/corp.pem";
Acquire::Check-Valid-Until "false";
Acquire::http::Dl-Limit "70";
DPkg::Post-Invoke:: "rm -rf /";
"""
    assert guest_settings(dump, {"SSL_CERT_FILE": "/etc/ssl/other.pem"}) == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::http::Proxy::local.example "DIRECT";',
        'Acquire::https::CaInfo "/etc/ssl/corp.pem";',
        'Acquire::Check-Valid-Until "false";',
    ]


def test_the_environments_ca_is_used_where_apt_names_none():
    """apt itself does not look at these variables."""
    settings = guest_settings("", {"CURL_CA_BUNDLE": "/etc/ssl/corp.pem"})
    assert settings == ['Acquire::https::CaInfo "/etc/ssl/corp.pem";']
