"""What is found around a machine: proxies, certificate authorities, the ssh agent."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ovm.errors import FileError, HelperError
from ovm.host import environment

NEAR = "localhost,127.0.0.1,::1,192.168.127.0/24,10.88.0.0/15,.containers.internal,host.docker.internal"


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host with neither proxies nor an agent nor authorities of its own."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name == "SSH_AUTH_SOCK":
            monkeypatch.delenv(name)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(environment, "_ANCHORS", {})
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("given", "in_the_guest"),
    [
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("proxy.example:3128", "http://proxy.example:3128"),
        ("http://127.0.0.1:3128", "http://192.168.127.254:3128"),
        ("127.0.0.1:3128", "http://192.168.127.254:3128"),
        ("http://localhost:3128/", "http://192.168.127.254:3128/"),
        ("http://LOCALHOST:3128", "http://192.168.127.254:3128"),
        ("web.localhost:3128", "http://192.168.127.254:3128"),
        ("http://[::1]:3128", "http://192.168.127.254:3128"),
        ("http://localhost", "http://192.168.127.254"),
        ("http://me:p%40ss@localhost:1", "http://me:p%40ss@192.168.127.254:1"),
        ("socks5h://127.0.0.1:1080", "socks5h://192.168.127.254:1080"),
        ("http://localhost.example:1", "http://localhost.example:1"),
        ("http://127.0.0.1:no", "http://127.0.0.1:no"),
        ("http://[::1", "http://[::1"),
    ],
)
def test_a_proxy_is_told_as_the_guest_reaches_it(given: str, in_the_guest: str, monkeypatch: pytest.MonkeyPatch):
    """The host's loopback has another address in the guest; all else stays, also what nobody can make sense of."""
    monkeypatch.setenv("http_proxy", given)
    assert environment.host_proxies()["http_proxy"] == in_the_guest


def test_lower_case_is_stronger_and_both_are_told(monkeypatch: pytest.MonkeyPatch):
    """Programs differ in which they look at."""
    monkeypatch.setenv("HTTP_PROXY", "http://upper:1")
    monkeypatch.setenv("http_proxy", "http://lower:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://secure:1")
    monkeypatch.setenv("ALL_PROXY", "http://any:1")
    monkeypatch.setenv("all_proxy", "")
    monkeypatch.setenv("rsync_proxy", "http://other:1")
    assert environment.host_proxies() == {
        "http_proxy": "http://lower:1",
        "https_proxy": "http://secure:1",
        "no_proxy": NEAR,
        "HTTP_PROXY": "http://lower:1",
        "HTTPS_PROXY": "http://secure:1",
        "NO_PROXY": NEAR,
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", NEAR),
        ("intranet.example, 10.1.2.3", f"intranet.example,10.1.2.3,{NEAR}"),
        ("a.example b.example", f"a.example,b.example,{NEAR}"),
        ("localhost,.example,localhost", f"localhost,.example,{NEAR.removeprefix('localhost,')}"),
        ("*", f"*,{NEAR}"),
    ],
)
def test_no_proxy_is_kept_and_what_is_near_is_added(given: str, told: str, monkeypatch: pytest.MonkeyPatch):
    """Each once, separated as every program understands."""
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    monkeypatch.setenv("no_proxy", given)
    assert environment.host_proxies()["no_proxy"] == told


def test_without_proxies_nothing_is_told(monkeypatch: pytest.MonkeyPatch):
    """Exceptions from no proxy are none."""
    monkeypatch.setenv("no_proxy", "intranet.example")
    assert environment.host_proxies() == {}


MakeCertificate = Callable[..., str]


@pytest.fixture
def make_certificate(tmp_path: Path) -> MakeCertificate:
    """Makes self-signed certificates, PEM, with openssl."""

    def make(name: str, *, may_sign: bool = True) -> str:
        # fmt: off
        return subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch",
             "-subj", f"/CN={name}", "-days", "2", "-keyout", tmp_path / "key",
             "-addext", f"basicConstraints=critical,CA:{str(may_sign).upper()}"],
            check=True, capture_output=True, text=True,
        ).stdout
        # fmt: on

    return make


async def test_authorities_are_found_where_distributions_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """PEM files by the distribution's pattern, in folders too where it looks there; what is no certificate is left."""
    debian, fedora = tmp_path / "debian", tmp_path / "fedora"
    anchors = {str(debian): "**/*.crt", str(fedora): "*", str(tmp_path / "missing"): "*"}
    monkeypatch.setattr(environment, "_ANCHORS", anchors)
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    for path in (debian / "b.crt", debian / "company/a.crt", debian / "c.pem", fedora / "any.name", fedora / "sub/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pem)
    (debian / "binary.crt").write_bytes(b"\x30\x82")
    (debian / "dangling.crt").symlink_to("nowhere")
    found = await environment.host_ca_certificates()
    assert found == (debian / "b.crt", debian / "company/a.crt", fedora / "any.name")


async def test_the_keychain_of_a_mac(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_certificate: MakeCertificate
):
    """Its authorities, each once; neither certificates of other kinds nor whatever else the program says."""
    monkeypatch.setattr("sys.platform", "darwin")
    company, other = make_certificate("company"), make_certificate("other")
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    told = tmp_path / "told"
    told.write_text(f"noise\n{company}{make_certificate('this mac', may_sign=False)}{broken}{other}{company}")
    monkeypatch.setattr(environment, "_KEYCHAIN", ("/bin/cat", str(told)))
    (path,) = await environment.host_ca_certificates()
    assert path.read_text() == company + other
    assert path == tmp_path / "home/cache/host-ca.pem"
    told.write_text(other)
    assert [p.read_text() for p in await environment.host_ca_certificates()] == [other]
    told.write_text("")
    assert await environment.host_ca_certificates() == ()
    monkeypatch.setattr(environment, "_KEYCHAIN", (str(tmp_path / "no such program"),))
    with pytest.raises(HelperError, match="cannot be run"):
        await environment.host_ca_certificates()


def test_an_agent_that_answers(short_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its socket is told; one that nobody listens at any more, and none at all, are said."""
    path = short_path / "agent.sock"
    with pytest.raises(FileError, match="SSH_AUTH_SOCK is not set") as refused:
        environment.ssh_agent()
    assert "leave ssh_agent out" in refused.value.hint
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    with pytest.raises(FileError, match=f"no agent answers at {path}: No such file"):
        environment.ssh_agent()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert environment.ssh_agent() == path
    with pytest.raises(FileError, match="Connection refused"):
        environment.ssh_agent()
