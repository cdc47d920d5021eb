"""ovm boots a small Linux virtual machine that runs Podman, and manages it.

Its packages, from top to bottom. Each imports only packages on lines below its own (checked by import-linter)::

    cli
    testing
    sync
    service, image
    registry
    machine
    host, integrations
    hypervisors, network, guest, disks, power
    process
    wire
    trust
    model
    paths
    errors
    text

The public names are resolved on first use, so that ``import ovm`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ovm._version import __version__

if TYPE_CHECKING:
    from ovm.disks.verify import FileState as FileState
    from ovm.errors import ArchiveError as ArchiveError
    from ovm.errors import ExecTimeout as ExecTimeout
    from ovm.errors import FileError as FileError
    from ovm.errors import GuestError as GuestError
    from ovm.errors import GuestRefused as GuestRefused
    from ovm.errors import HelperError as HelperError
    from ovm.errors import HelperExited as HelperExited
    from ovm.errors import HostKeyMismatch as HostKeyMismatch
    from ovm.errors import ImageError as ImageError
    from ovm.errors import InputError as InputError
    from ovm.errors import InUseError as InUseError
    from ovm.errors import NotReadyError as NotReadyError
    from ovm.errors import OptionError as OptionError
    from ovm.errors import OVMError as OVMError
    from ovm.errors import PortError as PortError
    from ovm.errors import SettingsError as SettingsError
    from ovm.errors import SkewError as SkewError
    from ovm.errors import SocketPathError as SocketPathError
    from ovm.errors import SpaceError as SpaceError
    from ovm.errors import StartError as StartError
    from ovm.errors import StateError as StateError
    from ovm.errors import StopError as StopError
    from ovm.errors import UnsupportedError as UnsupportedError
    from ovm.errors import UntrustedError as UntrustedError
    from ovm.machine.create import create_darwin_ovm as create_darwin_ovm
    from ovm.machine.create import create_linux_ovm as create_linux_ovm
    from ovm.machine.vm import OVM as OVM
    from ovm.model.events import Event as Event
    from ovm.model.info import Health as Health
    from ovm.model.info import Info as Info
    from ovm.model.options import Mount as Mount
    from ovm.model.options import Options as Options
    from ovm.model.options import OriginPath as OriginPath
    from ovm.model.options import Versions as Versions
    from ovm.model.ports import Forward as Forward
    from ovm.model.results import ExecResult as ExecResult
    from ovm.model.results import Pruned as Pruned
    from ovm.model.states import StateInfo as StateInfo
    from ovm.model.states import VMState as VMState
    from ovm.process.guard import freeze_support as freeze_support
    from ovm.registry.create import create_ovm as create_ovm
    from ovm.service.remote import RemoteOVM as RemoteOVM
    from ovm.service.remote import connect as connect

_HOME = {
    "create_ovm": "registry.create",
    "create_linux_ovm": "machine.create",
    "create_darwin_ovm": "machine.create",
    "connect": "service.remote",
    "OVM": "machine.vm",
    "RemoteOVM": "service.remote",
    "Info": "model.info",
    "Health": "model.info",
    "Options": "model.options",
    "OriginPath": "model.options",
    "Versions": "model.options",
    "Mount": "model.options",
    "Forward": "model.ports",
    "Pruned": "model.results",
    "FileState": "disks.verify",
    "ExecResult": "model.results",
    "VMState": "model.states",
    "StateInfo": "model.states",
    "Event": "model.events",
    "freeze_support": "process.guard",
    "OVMError": "errors",
    "InputError": "errors",
    "OptionError": "errors",
    "FileError": "errors",
    "UntrustedError": "errors",
    "SettingsError": "errors",
    "ArchiveError": "errors",
    "HelperError": "errors",
    "SocketPathError": "errors",
    "UnsupportedError": "errors",
    "StateError": "errors",
    "InUseError": "errors",
    "SpaceError": "errors",
    "PortError": "errors",
    "StartError": "errors",
    "HelperExited": "errors",
    "NotReadyError": "errors",
    "GuestRefused": "errors",
    "GuestError": "errors",
    "HostKeyMismatch": "errors",
    "ExecTimeout": "errors",
    "StopError": "errors",
    "SkewError": "errors",
    "ImageError": "errors",
}
"""The public names, most important first, and the module that defines each."""

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 - built from the table above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
