"""How a machine is made: from options to an object that can be started."""

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
    """A machine under QEMU: inputs checked, files copied or unpacked, keys made. Nothing is started yet.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **more: Options by keyword, on top of ``options``.

    Raises:
        InputError: something given cannot be used; nothing was touched.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says what is needed.
    """
    return await _create(Options.of(options, **more), "qemu", progress)


async def create_darwin_ovm(
    options: Options | Mapping[str, Any] | None = None,
    /,
    *,
    progress: prepare.Progress | None = None,
    **more: Any,
) -> OVM:
    """A machine under vfkit: inputs checked, files copied or unpacked, keys made. Nothing is started yet.

    ``gvproxy`` and ``vfkit`` are those of ``origin_path``, else the ones that are installed. /Users, /var/folders
    and /private are shared unless ``mounts`` says otherwise.

    Args:
        options: :class:`ovm.Options`, or a mapping with its names or the seed's camelCase ones.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **more: Options by keyword, on top of ``options``.

    Raises:
        InputError: something given cannot be used, a path that vfkit's command line cannot carry for one; nothing
            was touched.
        InUseError: another process owns one of the directories.
        SpaceError: the disk is too small; says what is needed.
    """
    return await _create(Options.of(options, **more), "vfkit", progress)


async def _create(options: Options, hypervisor: prepare.Hypervisor, progress: prepare.Progress | None) -> OVM:
    try:
        plan = await prepare.choose(options, hypervisor)
        return OVM(await prepare.install(plan, progress))
    except BaseExceptionGroup as group:
        raise first_error(group) from None
