"""A machine's ssh configuration: a Host block ``ovm-NAME`` with the machine's port, key and pinned host key.

Each machine has its own file, so machines never wait for each other to write, and the file is removed with it::

    machines/NAME/ssh_config         the block
    machines/NAME/ssh_known_hosts    the machine's host key

The user's own ssh configuration needs one line, :func:`include`; ovm never writes to it.
"""

from __future__ import annotations

from pathlib import Path

from ovm import paths
from ovm.errors import FileError
from ovm.trust.atomic import write_through
from ovm.trust.files import read_file

CONFIG = "ssh_config"
KNOWN_HOSTS = "ssh_known_hosts"

_UNTOLD = '"\\%$'
"""Characters with a special meaning in ssh's paths; how to escape them depends on ssh's version."""


def host(name: str) -> str:
    """Return the host name of the machine ``name`` for ssh."""
    return f"ovm-{name}"


def config_path(name: str) -> Path:
    """Return the path of the file with the block of the machine ``name``."""
    return paths.machine_dir(name) / CONFIG


def include() -> str:
    """Return the line for the top of ``~/.ssh/config`` that includes the blocks of all machines, also future ones.

    Raises:
        FileError: the path has a character that ssh treats specially.
    """
    import glob

    return f"Include {_quoted(Path(glob.escape(str(paths.machine_dir('')))) / '*' / CONFIG)}"


def write(name: str, *, port: int, user: str = "root") -> Path:
    """Write the block of the machine ``name``, whose sshd is on ``port`` of 127.0.0.1, and return its path.

    Called at each start, because the port may change.

    Raises:
        FileError: a key is missing, a file cannot be written, or a path has a character that ssh treats specially.
    """
    directory = paths.machine_dir(name)
    keys = paths.KeyPaths(directory / "ssh")
    known_hosts = directory / KNOWN_HOSTS
    options = {
        "HostName": "127.0.0.1",
        "Port": str(port),
        "User": user,
        "IdentityFile": _quoted(keys.user_key),
        "IdentitiesOnly": "yes",  # else ssh offers all keys of an agent, and sshd refuses after a few
        "PreferredAuthentications": "publickey",
        "HostKeyAlias": host(name),
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "CheckHostIP": "no",
        "UpdateHostKeys": "no",
        "ProxyCommand": "none",  # override one for all hosts in the user's own configuration
        "LogLevel": "ERROR",
    }
    block = [f"Host {host(name)}", *(f"  {option} {value}" for option, value in options.items())]
    try:
        host_key = " ".join(read_file(paths.public(keys.host_key), paths.KEY_MAX_BYTES).decode("ascii").split()[:2])
        _write(known_hosts, f"{host(name)} {host_key}\n")
        _write(config_path(name), "\n".join(block) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot write the ssh configuration of {name}: {error}") from error
    return config_path(name)


def _write(path: Path, text: str) -> None:
    write_through(path, text.encode(), 0o600, durable=False)  # rewritten at the next start


def _quoted(path: Path) -> str:
    if found := set(str(path)) & set(_UNTOLD):
        raise FileError(
            f"ssh cannot use the path {path}: it contains {' and '.join(map(repr, sorted(found)))}",
            hint="choose another directory with OVM_HOME",
        )
    return f'"{path}"'
