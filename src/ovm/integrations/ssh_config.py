"""How ssh reaches a machine: a Host block ``ovm-NAME`` with the machine's port, key and pinned host key.

It is a file of the machine's own, so machines never wait for each other to write, and it goes with the machine::

    machines/NAME/ssh_config         the block
    machines/NAME/ssh_known_hosts    the one host key that is taken for the machine's

The user's own ssh configuration needs one line, :func:`include`, and is never written to.
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
"""What ssh takes for something else than itself in a path; how to keep it from that depends on its version."""


def host(name: str) -> str:
    """What ssh calls the machine ``name``."""
    return f"ovm-{name}"


def config_path(name: str) -> Path:
    """The file with the block of the machine ``name``."""
    return paths.machine_dir(name) / CONFIG


def include() -> str:
    """The line for the top of ``~/.ssh/config`` that makes all machines known, those to come as well.

    Raises:
        FileError: the path has a character that ssh cannot be told.
    """
    import glob

    return f"Include {_quoted(Path(glob.escape(str(paths.machine_dir('')))) / '*' / CONFIG)}"


def write(name: str, *, port: int, user: str = "root") -> Path:
    """Write the block of the machine ``name``, whose sshd is on ``port`` of 127.0.0.1, and return its file.

    Called at each start, for the port may be another one then.

    Raises:
        FileError: a key is missing, a file cannot be written, or a path has a character that ssh cannot be told.
    """
    directory = paths.machine_dir(name)
    keys = paths.KeyPaths(directory / "ssh")
    known_hosts = directory / KNOWN_HOSTS
    options = {
        "HostName": "127.0.0.1",
        "Port": str(port),
        "User": user,
        "IdentityFile": _quoted(keys.user_key),
        "IdentitiesOnly": "yes",  # an agent with many keys would offer them all, and be refused
        "PreferredAuthentications": "publickey",
        "HostKeyAlias": host(name),
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "CheckHostIP": "no",
        "UpdateHostKeys": "no",
        "ProxyCommand": "none",  # one for all hosts, further down in the user's own configuration
        "LogLevel": "ERROR",
    }
    block = [f"Host {host(name)}", *(f"  {option} {value}" for option, value in options.items())]
    try:
        host_key = " ".join(read_file(paths.public(keys.host_key), paths.KEY_MAX_BYTES).decode("ascii").split()[:2])
        _write(known_hosts, f"{host(name)} {host_key}\n")
        _write(config_path(name), "\n".join(block) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"ssh cannot be told of {name}: {error}") from error
    return config_path(name)


def _write(path: Path, text: str) -> None:
    write_through(path, text.encode(), 0o600, durable=False)  # it is written again at the next start


def _quoted(path: Path) -> str:
    if found := set(str(path)) & set(_UNTOLD):
        raise FileError(
            f"ssh cannot be told of {path}: it has {' and '.join(map(repr, sorted(found)))} in it",
            hint="choose another directory with OVM_HOME",
        )
    return f'"{path}"'
