"""What a guest can use of the host's environment: proxies, certificate authorities, the ssh agent."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ovm import paths
from ovm.errors import FileError
from ovm.network.gvproxy import HOST_ALIAS
from ovm.process.probe import probe_output
from ovm.trust import directories
from ovm.trust.atomic import write_whole

log = logging.getLogger(__name__)

NEVER_PROXIED = (
    "localhost",
    "127.0.0.1",
    "::1",
    "192.168.127.0/24",  # guest, host and gateway, as they see each other
    "10.88.0.0/15",  # podman's own networks
    ".containers.internal",
    "host.docker.internal",
)
"""Hosts and networks that the guest reaches directly."""

KEYCHAIN_CERTIFICATES = "host-ca.pem"
"""File in ovm's cache with the authorities of a Mac's keychain."""

AGENT_TIMEOUT_S = 5.0

_SCHEMES = ("http", "https", "ftp", "all")
_ANCHORS = {
    "/usr/local/share/ca-certificates": "**/*.crt",  # Debian and relatives
    "/etc/pki/ca-trust/source/anchors": "*",  # Fedora and relatives
    "/etc/pki/trust/anchors": "*",  # SUSE
    "/etc/ca-certificates/trust-source/anchors": "*",  # Arch
}
"""Directories where users add trusted authorities to those of the distribution."""
_KEYCHAIN = ("/usr/bin/security", "find-certificate", "-a", "-p", "/Library/Keychains/System.keychain")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----\n", re.DOTALL)


def host_proxies() -> dict[str, str]:
    """Return the host's proxies as variables for a guest's ``environment``, in lower and upper case; may be empty.

    They come from ``http_proxy``, ``https_proxy``, ``ftp_proxy``, ``all_proxy`` and ``no_proxy``, where lower case
    overrides upper case, or on macOS, if none is set, from the system's settings. A proxy on the host's loopback gets
    the host's address in the guest. ``NEVER_PROXIED`` is added to ``no_proxy``.
    """
    from urllib.request import getproxies

    found = getproxies()
    proxies = {f"{scheme}_proxy": _seen_from_guest(found[scheme]) for scheme in _SCHEMES if found.get(scheme)}
    if not proxies:
        return {}
    exceptions = re.split(r"[,\s]+", found.get("no", ""))
    proxies["no_proxy"] = ",".join(filter(None, dict.fromkeys([*exceptions, *NEVER_PROXIED])))
    return proxies | {name.upper(): value for name, value in proxies.items()}


def _seen_from_guest(proxy: str) -> str:
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return proxy  # the program that uses it reports the error
    if not _is_loopback(parts.hostname or ""):
        return url
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}{HOST_ALIAS}{port}").geturl()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def host_ca_certificates() -> tuple[Path, ...]:
    """Return PEM files of the authorities that this host trusts besides the usual ones, for ``ca_certificates``.

    On Linux they are the files in the distribution's directory for added authorities; on macOS the authorities of the
    system's keychain, in one file of ovm's cache. Variables such as ``SSL_CERT_FILE`` are ignored, because they name a
    bundle with the usual ones.

    Raises:
        HelperError: the keychain cannot be queried.
        FileError: the cache cannot be written.
    """
    if sys.platform != "darwin":
        return await asyncio.to_thread(lambda: tuple(_anchors()))
    told = await probe_output(_KEYCHAIN)
    return await asyncio.to_thread(_keep, "".join(_authorities(told)))


def _anchors() -> Iterator[Path]:
    for directory, pattern in _ANCHORS.items():
        for path in sorted(Path(directory).glob(pattern)):
            try:
                if path.is_file() and b"-----BEGIN CERTIFICATE-----" in path.read_bytes():
                    yield path
            except OSError as error:
                log.warning("skipped the certificate authority %s: %s", path, error.strerror)


def _authorities(text: str) -> Iterator[str]:
    """Yield the authorities' certificates in ``text``, each once. A keychain also has certificates of its Mac alone."""
    import ssl

    for pem in dict.fromkeys(_PEM.findall(text)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=pem)
        except ssl.SSLError as error:
            log.warning("skipped a certificate of the keychain: %s", error)
            continue
        if context.get_ca_certs():
            yield pem


def _keep(pem: str) -> tuple[Path, ...]:
    if not pem:
        return ()
    path = paths.cache_dir() / KEYCHAIN_CERTIFICATES
    try:
        directories.make(path.parent)
        write_whole(path, pem.encode(), 0o600, durable=False)  # another machine's start may be reading it
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    return (path,)


def ssh_agent() -> Path:
    """Return the socket of the user's ssh agent, after a test connection.

    Raises:
        FileError: no agent is configured, or it does not accept connections.
    """
    hint = "start an agent (ssh-agent) and set SSH_AUTH_SOCK in ovm's environment, or leave ssh_agent out"
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        raise FileError("ssh_agent: SSH_AUTH_SOCK is not set, so there is no agent to forward", hint=hint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(AGENT_TIMEOUT_S)
        try:
            agent.connect(path)
        except OSError as error:
            raise FileError(f"ssh_agent: no agent answers at {path}: {error.strerror or error}", hint=hint) from error
    return Path(path).absolute()
