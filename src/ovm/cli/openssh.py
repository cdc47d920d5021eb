"""OpenSSH's programs for a running machine's guest, whether a service or a program runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ovm.registry.machines import Machine


def ssh_port(machine: Machine) -> int:
    """Query the machine's gvproxy for the port of 127.0.0.1 that is forwarded to the guest's sshd.

    Raises:
        StateError: the machine is not running.
        UntrustedError: another user listens on the socket, or could replace it.
    """
    import msgspec

    from ovm.errors import StateError, UntrustedError
    from ovm.network import gvproxy
    from ovm.wire import plain
    from ovm.wire.error import WireError

    sshd = f"{gvproxy.GUEST_ADDRESS}:22"
    try:
        with plain.request(machine.sockets.network_api, "GET", "/services/forwarder/all") as answer:
            forwards = msgspec.json.decode(answer.read(), type=list[dict[str, str]])
        return next(int(f["local"].rpartition(":")[2]) for f in forwards if f.get("remote") == sshd)
    except UntrustedError:  # also a ValueError
        raise
    except (WireError, msgspec.DecodeError, UnicodeDecodeError, StopIteration, KeyError, ValueError) as error:
        raise StateError(f"{machine.name} is not running", hint=f"start it: ovm start {machine.name}") from error


def ssh_program(program: str, name: str) -> list[str]:
    """Return ``program`` (``ssh``, ``scp``) with options for the running machine ``name``, without the user's config.

    The machine's host name is ``ssh_config.host(name)``.

    Raises:
        StateError: the machine does not exist, is not running, or is paused.
        HelperError: this host has no ``program``.
    """
    import shutil

    from ovm.errors import HelperError
    from ovm.integrations import ssh_config
    from ovm.registry import machines

    if not (found := shutil.which(program)):
        raise HelperError(f"{program} is not installed", hint="install OpenSSH's client (Debian: openssh-client)")
    machine = machines.find(name)
    _refuse_paused(machine)
    return [found, "-F", str(ssh_config.write(name, port=ssh_port(machine)))]


def _refuse_paused(machine: Machine) -> None:
    import contextlib

    from ovm.errors import OVMError, StateError
    from ovm.model.states import VMState
    from ovm.service.client import Service

    state = None
    with contextlib.suppress(OVMError):  # it has no service: a program runs it through the library, or it is down
        state = Service(machine.name, machine.service_socket).status().state
    if state is VMState.PAUSED:
        raise StateError(f"{machine.name} is paused", hint=f"resume it: ovm resume {machine.name}")


def become(argv: list[str]) -> NoReturn:
    """Replace this process with the program ``argv``, which gets its terminal and signals and sets its exit status."""
    import os
    import sys

    from ovm.process.child import users_environment

    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, users_environment())  # noqa: S606 - a list of arguments, as everywhere
