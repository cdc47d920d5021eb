"""Every file and socket ovm makes, by name.

::

    target_dir/                    what a machine is made of; survives a stop
        <basename of each origin>  gvproxy, kernel, initrd, rootfs.btrfs (vfkit on macOS)
        versions.json              which version of each lies there, written after its rename
        digests.json               what each of them holds, so that it can be verified
        data.img                   the data disk; never replaced, only grown
        scratch.img                what an ovm-core guest writes to its root; recreated at each start
        machine.json               machine id, and whether the data disk was ever in use
        memory.suspended           the guest's memory, 0600, from a suspend to the next start
        suspended.json             what that memory goes with, 0600, as long as it is there
        ovm.lock                   held from start to stop
    socket_dir/                    0700, emptied of the names below at each start
        net/                       0700, gvproxy's own directory: it can make and remove sockets here alone
            network.sock           its HTTP API
            net.sock               its end of the guest's network card
            podman.sock            podman's API
        network.sock               a link to net/network.sock
        net.sock                   a link to net/net.sock
        podman.sock                a link to net/podman.sock: podman's API for people and programs
        ovm.sock                   the REST of the machine's service, where it has one
        ready.sock                 where the guest's words about its boot arrive
        command.sock               where an ovm-core guest asks what to do at boot
        vfkit.sock                 vfkit's REST
        vfkit-PID-N.sock           vfkit's end of the guest's network card
        virtiofs-N.sock            virtiofsd's, one for each shared folder
        boot.initrd                initrd plus boot configuration, 0600, removed once ready
        helpers.json               who the helpers are, 0600, should manager and guard be killed together
        ovm.lock
    log_dir/
        NAME.log NAME.2.log NAME.3.log   of gvproxy, qemu or vfkit, virtiofsd-N, guard, and the guest's console
        ovm.lock
    ssh_key_dir/                   0700
        ovm  ovm.pub               the key that root in the guest accepts
        host_key  host_key.pub     the guest's own host key, pinned by the manager
        ovm.lock                   held during create alone
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
"""How many starts' logs are kept: NAME.log, NAME.2.log, NAME.3.log."""

KEY_MAX_BYTES = 64 << 10
"""Of an ssh key's file; an ed25519 key has less than 1 KiB."""

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
"""Unicode's categories of what is no part of a line: controls, halves of characters (no UTF-8), separators of lines."""
_LONGEST_SOCKETS = ("virtiofs-99.sock", "net/network.sock")
_VFKITS_OWN = re.compile(r"vfkit-[0-9a-f]+-[0-9a-f]+\.sock")


@dataclass(frozen=True, slots=True)
class TargetPaths:
    """The names below ``target_dir`` that do not depend on the origin's."""

    directory: Path

    @property
    def versions(self) -> Path:
        """Which version of each file lies beside it."""
        return self.directory / VERSIONS

    @property
    def digests(self) -> Path:
        """The digest that each file had when it was made."""
        return self.directory / DIGESTS

    @property
    def data_disk(self) -> Path:
        """The sparse data disk."""
        return self.directory / DATA_DISK

    @property
    def scratch_disk(self) -> Path:
        """What an ovm-core guest writes to its root."""
        return self.directory / SCRATCH_DISK

    @property
    def machine(self) -> Path:
        """What must be remembered about the machine itself."""
        return self.directory / MACHINE

    @property
    def memory(self) -> Path:
        """The memory of a suspended machine."""
        return self.directory / MEMORY

    @property
    def suspended(self) -> Path:
        """What a suspended machine's memory goes with."""
        return self.directory / SUSPENDED

    @classmethod
    def names(cls) -> frozenset[str]:
        """All of these names, and that of the lock: no origin file may have one of them."""
        properties = [name for name, value in vars(cls).items() if isinstance(value, property)]
        return frozenset({LOCK, *(getattr(cls(Path()), name).name for name in properties)})


@dataclass(frozen=True, slots=True)
class SocketPaths:
    """The names below ``socket_dir``.

    Root in the guest can make and remove sockets wherever gvproxy can. So gvproxy has a directory of its own, and each
    of its sockets has a link outside, to connect to.
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
        """A link to where the hypervisor sends the guest's Ethernet frames."""
        return self.directory / "net.sock"

    @property
    def podman(self) -> Path:
        """A link to podman's API."""
        return self.directory / "podman.sock"

    def made_by_gvproxy(self, link: Path) -> Path:
        """The socket that one of the links above leads to: gvproxy makes it in its own directory."""
        return self.gvproxy / link.name

    @property
    def boot_initrd(self) -> Path:
        """The initrd with the boot configuration behind it."""
        return self.directory / "boot.initrd"

    @property
    def ready(self) -> Path:
        """Where the guest's words about its boot arrive."""
        return self.directory / "ready.sock"

    @property
    def command(self) -> Path:
        """Where an ovm-core guest asks what to do at boot."""
        return self.directory / "command.sock"

    @property
    def control(self) -> Path:
        """Vfkit's REST."""
        return self.directory / "vfkit.sock"

    @property
    def service(self) -> Path:
        """The REST of the machine's service; made and removed by that, at no start."""
        return self.directory / "ovm.sock"

    @property
    def helpers(self) -> Path:
        """Who the helpers are."""
        return self.directory / "helpers.json"

    def share(self, index: int) -> Path:
        """Virtiofsd's socket for the shared folder number ``index``."""
        return self.directory / f"virtiofs-{index}.sock"

    def stale(self) -> list[Path]:
        """What an earlier run may have left: only names of ours, nothing else in the directory."""
        fixed = [self.directory / name for name in SOCKET_NAMES]
        shares = [
            p for p in sorted(self.directory.glob("virtiofs-*.sock")) if p.stem.removeprefix("virtiofs-").isdigit()
        ]
        vfkits = [p for p in sorted(self.directory.glob("vfkit-*-*.sock")) if _VFKITS_OWN.fullmatch(p.name)]
        ours = [path for path in (*fixed, self.boot_initrd, *shares, *vfkits) if path.exists() or path.is_symlink()]
        return [*ours, *self.left_by_gvproxy()]

    def left_by_gvproxy(self) -> list[Path]:
        """The sockets in gvproxy's directory. Root in the guest may have chosen their names."""
        if self.gvproxy.is_symlink() or not self.gvproxy.is_dir():
            return []
        return [path for path in sorted(self.gvproxy.iterdir()) if path.is_socket()]


@dataclass(frozen=True, slots=True)
class KeyPaths:
    """The names below ``ssh_key_dir``."""

    directory: Path

    @property
    def user_key(self) -> Path:
        """Private key that root in the guest accepts."""
        return self.directory / "ovm"

    @property
    def host_key(self) -> Path:
        """Private host key given to the guest, so that it can be pinned."""
        return self.directory / "host_key"


def public(private_key: Path) -> Path:
    """The public half beside ``private_key``."""
    return private_key.with_name(private_key.name + ".pub")


def check_socket_paths(socket_dir: Path, *names: str) -> None:
    """Refuse a directory whose longest socket, ours or one of ``names``, would not fit.

    Raises:
        SocketPathError: the kernel's limit on a socket's path would be passed.
    """
    name = max((*_LONGEST_SOCKETS, *names), key=len)
    longest = socket_dir / name
    length = len(os.fsencode(longest))
    if length > SOCKET_PATH_MAX_BYTES:
        raise SocketPathError(
            f"{longest} is {length} bytes long; a socket's path may have {SOCKET_PATH_MAX_BYTES} on this system",
            hint=f"choose a socket_dir of at most {SOCKET_PATH_MAX_BYTES - len(name) - 1} bytes",
        )


def user_home() -> Path:
    """The user's home directory.

    Raises:
        OptionError: the user has none.
    """
    return expanded("~")


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the home directory in place of ``~``.

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
    """Whether ``text`` is one line of UTF-8, and will be one in any file: without control characters, tabs included."""
    return not any(unicodedata.category(character) in _NO_LINE for character in text)


def usable(path: Path, variable: str) -> Path:
    """``path`` if it can be written into units, scripts and configuration files of other programs: a line of text.

    Raises:
        OptionError: it has a control character or line separator in it, or is neither UTF-8 nor absolute.
    """
    if not is_line(str(path)):
        raise OptionError(
            f"{path} cannot be used: it has a control character in it, or is not UTF-8",
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
    """Where images and machines live: ``$OVM_HOME``, else the user's data directory.

    Raises:
        OptionError: it cannot be used, or there is no home directory.
    """
    if chosen := os.environ.get("OVM_HOME"):
        return usable(expanded(chosen).absolute(), "OVM_HOME")
    import platformdirs

    return usable(_of_the_user(platformdirs.user_data_path), "OVM_HOME")


def images_dir() -> Path:
    """Where guest images live."""
    return home() / "images"


def machines_dir() -> Path:
    """Where machines live."""
    return home() / "machines"


def machine_dir(name: str) -> Path:
    """Where the machine called ``name`` lives."""
    return machines_dir() / name


def cache_dir() -> Path:
    """What can be made again: downloads, the remembered answer of the accelerator's probe.

    Raises:
        OptionError: it cannot be used, or there is no home directory.
    """
    if os.environ.get("OVM_HOME"):
        return home() / "cache"
    import platformdirs

    return usable(_of_the_user(platformdirs.user_cache_path), "XDG_CACHE_HOME")


def default_socket_dir(name: str) -> Path:
    """A short private directory for the sockets of the machine called ``name``.

    ``$XDG_RUNTIME_DIR`` where there is one, else a directory of the user's own below the system's
    temporary one. macOS's own temporary directory is long but private and within the limit.

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
