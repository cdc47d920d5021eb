"""Names of all files and sockets that ovm creates.

::

    target_dir/                    the machine's files; survives a stop
        <basename of each origin>  gvproxy, kernel, initrd, rootfs.btrfs (vfkit on macOS)
        versions.json              version of each file above, written after its rename
        digests.json               digest of each file above, for verification
        data.img                   the data disk; never replaced, only grown
        scratch.img                an ovm-core guest's writes to its root; recreated at each start
        machine.json               machine id, and whether the data disk was ever in use
        memory.suspended           saved state: the guest's memory, 0600, from a suspend to the next start
        suspended.json             configuration that the saved state requires, 0600, deleted with it
        ovm.lock                   held from start to stop
    socket_dir/                    0700; each start deletes the names below
        net/                       0700, gvproxy's own directory, the only one where it can create and remove sockets
            network.sock           its HTTP API
            net.sock               its end of the guest's network card
            podman.sock            podman's API
        network.sock               a link to net/network.sock
        net.sock                   a link to net/net.sock
        podman.sock                a link to net/podman.sock: podman's API for people and programs
        ovm.sock                   REST API of the machine's service, if it has one
        ready.sock                 receives the guest's boot messages
        command.sock               answers an ovm-core guest's query for boot commands
        vfkit.sock                 vfkit's REST API
        vfkit-PID-N.sock           vfkit's end of the guest's network card
        virtiofs-N.sock            virtiofsd's socket, one for each shared folder
        boot.initrd                initrd plus boot configuration, 0600, removed once ready
        helpers.json               identities of the helpers, 0600, in case manager and guard are both killed
        ovm.lock
    log_dir/
        NAME.log NAME.2.log NAME.3.log   of gvproxy, qemu or vfkit, virtiofsd-N, guard, and the guest's console
        ovm.lock
    ssh_key_dir/                   0700
        ovm  ovm.pub               the key that logs in as root in the guest
        host_key  host_key.pub     the guest's own host key, pinned by the manager
        ovm.lock                   held only while keys are created
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ovm.errors import OptionError, SocketPathError

SOCKET_PATH_MAX_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a unix socket, without its final NUL (sun_path holds 104 and 108 bytes)."""

LOG_GENERATIONS = 3
"""Number of starts whose logs are kept: NAME.log, NAME.2.log, NAME.3.log."""

KEY_MAX_BYTES = 64 << 10
"""Size limit of an ssh key file; an ed25519 key has less than 1 KiB."""

LOCK = "ovm.lock"
VERSIONS = "versions.json"
DIGESTS = "digests.json"
DATA_DISK = "data.img"
SCRATCH_DISK = "scratch.img"
MACHINE = "machine.json"
MEMORY = "memory.suspended"
SUSPENDED = "suspended.json"

SOCKET_NAMES = ("network.sock", "net.sock", "podman.sock", "ready.sock", "command.sock", "vfkit.sock")
_NO_LINE = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that a line must not contain: controls, surrogates (not UTF-8), line separators."""
_LONGEST_SOCKETS = ("virtiofs-99.sock", "net/network.sock")
_VFKITS_OWN = re.compile(r"vfkit-[0-9a-f]+-[0-9a-f]+\.sock")


@dataclass(frozen=True, slots=True)
class TargetPaths:
    """The names below ``target_dir`` that do not depend on an origin file's name."""

    directory: Path

    @property
    def versions(self) -> Path:
        """Versions of the files beside it."""
        return self.directory / VERSIONS

    @property
    def digests(self) -> Path:
        """Digest of each file when it was created."""
        return self.directory / DIGESTS

    @property
    def data_disk(self) -> Path:
        """The sparse data disk."""
        return self.directory / DATA_DISK

    @property
    def scratch_disk(self) -> Path:
        """Disk for an ovm-core guest's writes to its root."""
        return self.directory / SCRATCH_DISK

    @property
    def machine(self) -> Path:
        """Machine id, and whether the data disk was ever in use."""
        return self.directory / MACHINE

    @property
    def memory(self) -> Path:
        """The guest's memory in the saved state."""
        return self.directory / MEMORY

    @property
    def suspended(self) -> Path:
        """Configuration that the saved state requires."""
        return self.directory / SUSPENDED

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return all of these names and the lock's; an origin file must not have one of them."""
        properties = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return frozenset({LOCK, *(getattr(cls(Path()), name).name for name in properties)})


@dataclass(frozen=True, slots=True)
class SocketPaths:
    """The names below ``socket_dir``.

    Root in the guest can create and remove sockets wherever gvproxy can. So gvproxy has its own directory, and clients
    connect through a link outside it.
    """

    directory: Path

    @property
    def gvproxy(self) -> Path:
        """Gvproxy's own directory."""
        return self.directory / "net"

    @property
    def network_api(self) -> Path:
        """A link to gvproxy's HTTP API."""
        return self.directory / "network.sock"

    @property
    def network_card(self) -> Path:
        """A link to the socket that takes the guest's Ethernet frames from the hypervisor."""
        return self.directory / "net.sock"

    @property
    def podman(self) -> Path:
        """A link to podman's API."""
        return self.directory / "podman.sock"

    def made_by_gvproxy(self, link: Path) -> Path:
        """Return the target of one of the links above: the socket that gvproxy creates in its own directory."""
        return self.gvproxy / link.name

    @property
    def boot_initrd(self) -> Path:
        """The initrd with the boot configuration appended."""
        return self.directory / "boot.initrd"

    @property
    def ready(self) -> Path:
        """Socket that receives the guest's boot messages."""
        return self.directory / "ready.sock"

    @property
    def command(self) -> Path:
        """Socket that answers an ovm-core guest's query for boot commands."""
        return self.directory / "command.sock"

    @property
    def control(self) -> Path:
        """Vfkit's REST API."""
        return self.directory / "vfkit.sock"

    @property
    def service(self) -> Path:
        """REST API of the machine's service, which creates and removes it; a start leaves it alone."""
        return self.directory / "ovm.sock"

    @property
    def helpers(self) -> Path:
        """Identities of the helpers."""
        return self.directory / "helpers.json"

    def share(self, index: int) -> Path:
        """Return virtiofsd's socket for the shared folder number ``index``."""
        return self.directory / f"virtiofs-{index}.sock"

    def stale(self) -> list[Path]:
        """List what an earlier run may have left: only ovm's names, nothing else in the directory."""
        fixed = [self.directory / name for name in SOCKET_NAMES]
        shares = [
            p for p in sorted(self.directory.glob("virtiofs-*.sock")) if p.stem.removeprefix("virtiofs-").isdigit()
        ]
        vfkits = [p for p in sorted(self.directory.glob("vfkit-*-*.sock")) if _VFKITS_OWN.fullmatch(p.name)]
        ours = [path for path in (*fixed, self.boot_initrd, *shares, *vfkits) if path.exists() or path.is_symlink()]
        return [*ours, *self.left_by_gvproxy()]

    def left_by_gvproxy(self) -> list[Path]:
        """List the sockets in gvproxy's directory. Root in the guest may have chosen their names."""
        if self.gvproxy.is_symlink() or not self.gvproxy.is_dir():
            return []
        return [path for path in sorted(self.gvproxy.iterdir()) if path.is_socket()]


@dataclass(frozen=True, slots=True)
class KeyPaths:
    """The names below ``ssh_key_dir``."""

    directory: Path

    @property
    def user_key(self) -> Path:
        """Private key that logs in as root in the guest."""
        return self.directory / "ovm"

    @property
    def host_key(self) -> Path:
        """Private host key of the guest, which the manager pins."""
        return self.directory / "host_key"


def public(private_key: Path) -> Path:
    """Return the path of the public key beside ``private_key``."""
    return private_key.with_name(private_key.name + ".pub")


def check_socket_paths(socket_dir: Path, *names: str) -> None:
    """Refuse a directory whose longest socket path, ovm's own or one of ``names``, exceeds the kernel's limit.

    Raises:
        SocketPathError: a path would exceed the limit.
    """
    name = max((*_LONGEST_SOCKETS, *names), key=len)
    longest = socket_dir / name
    length = len(os.fsencode(longest))
    if length > SOCKET_PATH_MAX_BYTES:
        raise SocketPathError(
            f"{longest} is {length} bytes long; this system's limit for a socket path is {SOCKET_PATH_MAX_BYTES}",
            hint=f"choose a socket_dir of at most {SOCKET_PATH_MAX_BYTES - len(name) - 1} bytes",
        )


def user_home() -> Path:
    """Return the user's home directory.

    Raises:
        OptionError: the user has none.
    """
    return expanded("~")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` with the home directory in place of ``~``.

    Raises:
        OptionError: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(
            f"{path}: there is no such home directory", hint="set HOME, and give the user an account"
        ) from error


def is_line(text: str) -> bool:
    """Return whether ``text`` is one line of UTF-8 without control characters; a tab is one."""
    return not any(unicodedata.category(character) in _NO_LINE for character in text)


def usable(path: Path, variable: str) -> Path:
    """Return ``path`` if it can stand in other programs' units, scripts and configuration files: one line of text.

    Raises:
        OptionError: it contains a control character or line separator, is not UTF-8, or is not absolute.
    """
    if not is_line(str(path)):
        raise OptionError(
            f"{path} cannot be used: it contains a control character or is not UTF-8",
            hint=f"choose another directory with {variable}",
        )
    if not path.is_absolute():
        raise OptionError(f"{path} is not an absolute path", hint=f"set HOME or {variable}")
    return path


def _of_the_user(directory: Callable[[str], Path]) -> Path:
    try:
        return directory("ovm")
    except RuntimeError as error:  # some versions of platformdirs return a relative path instead
        raise OptionError(f"there is no home directory: {error}", hint="set HOME or OVM_HOME") from error


def home() -> Path:
    """Return the directory of images and machines: ``$OVM_HOME``, else the user's data directory.

    Raises:
        OptionError: it cannot be used, or there is no home directory.
    """
    if chosen := os.environ.get("OVM_HOME"):
        return usable(expanded(chosen).absolute(), "OVM_HOME")
    import platformdirs

    return usable(_of_the_user(platformdirs.user_data_path), "OVM_HOME")


def images_dir() -> Path:
    """Return the directory of guest images."""
    return home() / "images"


def machines_dir() -> Path:
    """Return the directory of machines."""
    return home() / "machines"


def machine_dir(name: str) -> Path:
    """Return the directory of the machine ``name``."""
    return machines_dir() / name


def cache_dir() -> Path:
    """Return the directory of files that can be recreated: downloads, the result of the accelerator probe.

    Raises:
        OptionError: it cannot be used, or there is no home directory.
    """
    if os.environ.get("OVM_HOME"):
        return home() / "cache"
    import platformdirs

    return usable(_of_the_user(platformdirs.user_cache_path), "XDG_CACHE_HOME")


def default_socket_dir(name: str) -> Path:
    """Return a short private directory for the sockets of the machine ``name``.

    It is below ``$XDG_RUNTIME_DIR`` if that is set, else in the user's own directory below the system's temporary
    directory. On macOS the temporary directory is long, but private and within the limit.

    Raises:
        OptionError: it cannot be used.
    """
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        base = usable(Path(runtime).absolute(), "XDG_RUNTIME_DIR") / "ovm"
    else:
        import tempfile

        base = usable(Path(tempfile.gettempdir()), "TMPDIR") / f"ovm-{os.getuid()}"
    if os.environ.get("OVM_HOME"):  # two homes must not share the sockets of "default"
        import hashlib

        base /= hashlib.sha256(os.fsencode(home())).hexdigest()[:8]
    return base / name
