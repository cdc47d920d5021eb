"""Create a machine: from options to an object that can be started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ovm.errors import first_error
from ovm.machine import prepare
from ovm.machine.vm import OVM
from ovm.model.options import Options


async def create_linux_ovm(
    options: Options | Mapping[str, Any] | None = None,
    /,
    *,
    progress: prepare.Progress | None = None,
    **more: Any,
) -> OVM:
    """Create a machine under QEMU: check inputs, copy or unpack files, create keys. This starts nothing.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the total bytes while files are copied.
        **more: Options by keyword; they override ``options``.

    Raises:
        InputError: an option or file cannot be used; nothing was changed.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says how much is needed.
    """
    return await _create(Options.of(options, **more), "qemu", progress)


async def create_darwin_ovm(
    options: Options | Mapping[str, Any] | None = None,
    /,
    *,
    progress: prepare.Progress | None = None,
    **more: Any,
) -> OVM:
    """Create a machine under vfkit: check inputs, copy or unpack files, create keys. This starts nothing.

    ``gvproxy`` and ``vfkit`` default to the installed ones, ``mounts`` to /Users, /var/folders and /private.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the total bytes while files are copied.
        **more: Options by keyword; they override ``options``.

    Raises:
        InputError: an option or file cannot be used, such as a path that vfkit's command line cannot express;
            nothing was changed.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says how much is needed.
    """
    return await _create(Options.of(options, **more), "vfkit", progress)


async def _create(options: Options, hypervisor: prepare.Hypervisor, progress: prepare.Progress | None) -> OVM:
    try:
        plan = await prepare.choose(options, hypervisor)
        return OVM(await prepare.install(plan, progress))
    except BaseExceptionGroup as group:
        raise first_error(group) from None
