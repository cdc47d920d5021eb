"""The way to a release: URLs, redirects, proxies, certificates."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovm.errors import ImageError, OptionError
from ovm.image import PullOptions, verify_image
from releases import (
    MIB,
    beside,
    fetch,
    refusing,
)
from webserver import Web, serving


@pytest.mark.parametrize(
    ("url", "sha256", "usable"),
    [
        ("https://images.example/a.zip", "", True),
        ("http://images.example/a.zip", "", False),
        ("http://images.example/a.zip", "0" * 64, True),
        ("http://127.0.0.1:8000/a.zip", "", True),
        ("http://127.9.9.9/a.zip", "", False),
        ("http://[::1]:8000/a.zip", "", True),
        ("http://localhost/a.zip", "", True),
        ("http://localhost.example/a.zip", "", False),
        ("http://127.0.0.1.example/a.zip", "", False),
        ("ftp://images.example/a.zip", "0" * 64, False),
        ("file:///a.zip", "", False),
        ("https:///a.zip", "", False),
        ("a.zip", "", False),
        ("https://[::1/a.zip", "", False),
        ("", "0" * 64, False),
        ("https://images.example/a.zip", "abc", False),
        ("https://images.example/a.zip", "A" * 64, False),
    ],
)
def test_urls(url, sha256, usable):
    """Plain http only on the loopback, or with a digest."""
    if usable:
        PullOptions(url=url, sha256=sha256)
    else:
        with pytest.raises(OptionError):
            PullOptions(url=url, sha256=sha256)


async def test_a_url_that_is_none(target):
    """As far as its port."""
    with pytest.raises(ImageError, match="is not a URL"):
        await fetch("https://images.example:70000x/a.zip", target)


async def test_redirects(web, target):
    """They are followed, and what has come is resumed behind them."""
    web.redirects = {"/latest.zip": "/v1/image.zip", "/v1/image.zip": web.url("/image.zip")}
    web.cuts = [2 * MIB]
    await fetch(web.url("/latest.zip"), target)
    await verify_image(target)
    assert [path for path, _ in web.requests] == ["/latest.zip", "/v1/image.zip", "/image.zip"] * 2


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("/image.zip", "more than 10 times"),
        ("http://images.example/a.zip?token=secret", r"to http://images.example/a.zip\?\[removed\]: .*plain http"),
        ("file:///etc/passwd", "not an http"),
    ],
)
async def test_redirects_that_are_not_followed(web, target, location, complaint):
    """In circles, or to where no URL would be taken from."""
    web.redirects = {"/image.zip": location}
    with pytest.raises(ImageError, match=complaint) as caught:
        await fetch(web.url(), target)
    assert "secret" not in str(caught.value)


async def test_secrets_in_a_url_are_not_told(web, target):
    """Neither in the message nor in what stays."""
    web.cuts, web.validator = [2 * MIB], ("ETag", '"one"')
    with pytest.raises(ImageError) as caught:
        await fetch(web.url("/image.zip?token=secret", host="me:secret@127.0.0.1"), target, progress=refusing(web))
    assert "secret" not in str(caught.value)
    assert b"secret" not in (target.parent / ".a.pulling" / "download.json").read_bytes()


async def test_proxy(web, packed, target, monkeypatch):
    """Of the environment; it is asked for the whole URL."""
    monkeypatch.setenv("http_proxy", web.url(""))
    await fetch("http://images.example/a.zip", target, packed.sha256)
    await verify_image(target)
    assert [path for path, _ in web.requests] == ["http://images.example/a.zip"]


@pytest.mark.parametrize(("host", "spared"), [("127.0.0.1", ""), ("localhost", ""), ("127.1", "127.1")])
async def test_no_proxy(web, packed, target, monkeypatch, unused_port, host, spared):
    """For what the environment spares, nor for the loopback, which is trusted because nobody is in between."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port}")
    monkeypatch.setenv("no_proxy", spared)
    await fetch(web.url(host=host), target, packed.sha256)
    await verify_image(target)


@pytest.mark.parametrize(("name", "value"), [("http_proxy", "gopher://x.example"), ("SSL_CERT_FILE", "/nowhere")])
async def test_an_environment_that_cannot_be_used(web, target, monkeypatch, name, value):
    """The message says what to look at."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ImageError, match="environment") as caught:
        await fetch(web.url(), target)
    assert name in caught.value.hint
    assert beside(target) == []


@pytest.fixture
def secure(packed, tmp_path) -> Iterator[tuple[Web, Path]]:
    """A server with TLS, and the certificate of its authority."""
    key, certificate = self_signed()
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "ca.pem").write_bytes(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    with serving(Web(packed.path.read_bytes()), context) as running:
        yield running, tmp_path / "ca.pem"


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate for 127.0.0.1, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


async def test_a_certificate_of_ones_own(secure, target, monkeypatch):
    """It is refused at once, unless SSL_CERT_FILE names it."""
    web, authority = secure
    with pytest.raises(ImageError, match="certificate is not trusted") as caught:
        await fetch(web.url(), target)
    assert "SSL_CERT_FILE" in caught.value.hint
    monkeypatch.setenv("SSL_CERT_FILE", os.fspath(authority))
    await fetch(web.url(), target)
    await verify_image(target)
