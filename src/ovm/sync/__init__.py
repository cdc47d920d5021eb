"""The blocking API, without asyncio: the names of :mod:`ovm`, with machines whose calls block.

One event loop in its own thread does the work for all machines of the process. Layout::

    _generated_local, _generated_remote (written by scripts/sync.py) → base, process → loop → the asynchronous machines

The names are resolved on first use, like those of :mod:`ovm`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import ovm

if TYPE_CHECKING:
    from ovm import ArchiveError as ArchiveError
    from ovm import Event as Event
    from ovm import ExecResult as ExecResult
    from ovm import ExecTimeout as ExecTimeout
    from ovm import FileError as FileError
    from ovm import FileState as FileState
    from ovm import Forward as Forward
    from ovm import GuestError as GuestError
    from ovm import GuestRefused as GuestRefused
    from ovm import Health as Health
    from ovm import HelperError as HelperError
    from ovm import HelperExited as HelperExited
    from ovm import HostKeyMismatch as HostKeyMismatch
    from ovm import ImageError as ImageError
    from ovm import Info as Info
    from ovm import InputError as InputError
    from ovm import InUseError as InUseError
    from ovm import Mount as Mount
    from ovm import NotReadyError as NotReadyError
    from ovm import OptionError as OptionError
    from ovm import Options as Options
    from ovm import OriginPath as OriginPath
    from ovm import OVMError as OVMError
    from ovm import PortError as PortError
    from ovm import Pruned as Pruned
    from ovm import SettingsError as SettingsError
    from ovm import SkewError as SkewError
    from ovm import SocketPathError as SocketPathError
    from ovm import SpaceError as SpaceError
    from ovm import StartError as StartError
    from ovm import StateError as StateError
    from ovm import StateInfo as StateInfo
    from ovm import StopError as StopError
    from ovm import UnsupportedError as UnsupportedError
    from ovm import Versions as Versions
    from ovm import VMState as VMState
    from ovm import freeze_support as freeze_support
    from ovm.sync._generated_local import OVM as OVM
    from ovm.sync._generated_local import create_darwin_ovm as create_darwin_ovm
    from ovm.sync._generated_local import create_linux_ovm as create_linux_ovm
    from ovm.sync._generated_local import create_ovm as create_ovm
    from ovm.sync._generated_remote import RemoteOVM as RemoteOVM
    from ovm.sync._generated_remote import connect as connect

_TWINS = {
    "create_ovm": "_generated_local",
    "create_linux_ovm": "_generated_local",
    "create_darwin_ovm": "_generated_local",
    "connect": "_generated_remote",
    "OVM": "_generated_local",
    "RemoteOVM": "_generated_remote",
}
"""The names that differ from :mod:`ovm`'s, and their modules."""

__all__ = [name for name in ovm.__all__ if name != "__version__"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home: object = import_module(f"{__name__}.{_TWINS[name]}") if name in _TWINS else ovm
    value: object = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
