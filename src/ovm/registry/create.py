"""Create a machine by its name, with a default for everything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovm import paths
from ovm.errors import OptionError, UnsupportedError
from ovm.registry.images import IMAGE_FILES, Image, default_image_dir, host_arch, image_dir, load_image
from ovm.registry.machines import DEFAULT_MACHINE, check_name
from ovm.trust import directories

if TYPE_CHECKING:
    from ovm.machine.prepare import Progress
    from ovm.machine.vm import OVM
    from ovm.model.options import OriginPath, Versions
    from ovm.registry.machines import Machine


async def create_ovm(
    name: str = DEFAULT_MACHINE, *, image: Path | str | None = None, progress: Progress | None = None, **options: Any
) -> OVM:
    """Create the machine ``name``, with defaults for the guest image, the helper programs and the directories.

    The machine is not started. ``options`` are those of :class:`ovm.Options`; podman's API has a TCP port only with
    ``podman_tcp=True``.

    Args:
        name: Name of the machine. Machines of different names share only the image.
        image: Directory of a guest image; default: the default image of this host's architecture.
        progress: Called with the file's name, the bytes copied and the total bytes while files are copied.
        **options: Options of :class:`ovm.Options` except the origin files and their versions.

    Raises:
        OptionError: the name or an option is invalid.
        ImageError: the guest image is missing or damaged; build one with ``ovm image build``.
        HelperError: gvproxy or the hypervisor (QEMU on Linux, vfkit on macOS) is missing.
        UntrustedError: another user created a directory of the machine or of the images, or could change it.
        UnsupportedError: machines do not run on this system.
    """
    check_name(name)
    if sys.platform not in {"linux", "darwin"}:
        raise UnsupportedError(f"machines do not run on {sys.platform}", hint="use Linux or macOS")
    if given := {"origin_path", "originPath", "versions"} & options.keys():
        raise OptionError(
            f"create_ovm takes {', '.join(sorted(given))} from the image",
            hint="use create_linux_ovm or create_darwin_ovm for your own files",
        )
    import asyncio

    from ovm.machine import create
    from ovm.model.options import Options

    await asyncio.to_thread(directories.check, paths.home())
    directory = default_image_dir(host_arch()) if image is None else Path(image)
    guest = await asyncio.to_thread(load_image, directory)
    origin, versions = _files(guest)
    home = paths.machine_dir(name)
    defaults = {
        "origin_path": origin,
        "versions": versions,
        "sha256": guest.sha256,
        "target_dir": home / "target",
        "log_dir": home / "log",
        "ssh_key_dir": home / "ssh",
        "socket_dir": paths.default_socket_dir(name),
        "podman_tcp": False,
        "guest": guest.guest,
    }
    make = create.create_darwin_ovm if sys.platform == "darwin" else create.create_linux_ovm
    return await make(Options.of(defaults, **options), progress=progress)


async def create_from_settings(machine: Machine, *, progress: Progress | None = None) -> OVM:
    """Create the machine from its settings, with this host's proxies and certificate authorities if they say so.

    Raises as :func:`create_ovm` does, and:

    Raises:
        SettingsError: the settings are invalid.
    """
    import asyncio

    from ovm.host import environment

    settings = await asyncio.to_thread(machine.settings)
    options = settings.options()
    if settings.proxy == "host":
        options["environment"] = environment.host_proxies() | dict(settings.environment)
    if settings.host_ca:
        options["ca_certificates"] = (*settings.ca_certificates, *await environment.host_ca_certificates())
    image = options.pop("image", None)
    if image is not None:
        options["image"] = image_dir(image)
    return await create_ovm(machine.name, progress=progress, **options)


def _files(image: Image) -> tuple[OriginPath, Versions]:
    from ovm.model.options import OriginPath, Versions

    origin = OriginPath(**{role: image.path(role) for role in IMAGE_FILES})
    return origin, Versions(**{role: image.version(role) for role in IMAGE_FILES})
