"""Named machines and guest images: where they live, and a default for everything."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ovm import hypervisors, paths
from ovm.errors import ImageError, OptionError, UnsupportedError
from ovm.registry.machines import DEFAULT_MACHINE, check_name
from ovm.trust import directories
from ovm.trust.files import read_file

if TYPE_CHECKING:
    from ovm.machine.prepare import Progress
    from ovm.machine.vm import OVM
    from ovm.model.options import OriginPath, Versions
    from ovm.registry.machines import Machine

IMAGE_MANIFEST = "image.json"
IMAGE_GUESTS = ("ovm", "bare")
"""What an image may hold, as :class:`ovm.Options` calls it."""
IMAGE_FORMAT = 1
MANIFEST_MAX_BYTES = 1 << 20
_DEBIAN_ARCH: dict[hypervisors.Arch, str] = {"x86_64": "amd64", "aarch64": "arm64"}
_IMAGE_FILES = {"kernel": "kernel", "initrd": "initrd", "rootfs": "rootfs.btrfs"}
"""What a machine needs of an image, and the file it is in."""


_Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")]


class _File(msgspec.Struct, frozen=True):
    size: Annotated[int, msgspec.Meta(gt=0, le=1 << 40)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Manifest(msgspec.Struct, frozen=True):
    """What of ``image.json`` is read here."""

    format: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    guest: _Word
    arch: _Word
    files: dict[str, _File]


@dataclass(frozen=True, slots=True)
class Image:
    """A guest image as its ``image.json`` describes it; its files are there and have the right sizes."""

    directory: Path
    guest: str
    """One of IMAGE_GUESTS."""
    arch: str
    sha256: dict[str, str]
    """Of the ``kernel``, the ``initrd`` and the ``rootfs``."""

    def path(self, role: str) -> Path:
        """The file that is the ``kernel``, ``initrd`` or ``rootfs``."""
        return self.directory / _IMAGE_FILES[role]

    def version(self, role: str) -> str:
        """Changes when that file's content does."""
        return f"sha256:{self.sha256[role]}"


async def create_ovm(
    name: str = DEFAULT_MACHINE, *, image: Path | str | None = None, progress: Progress | None = None, **options: Any
) -> OVM:
    """The machine called ``name``, with a default for everything: the guest image, the helpers and the directories.

    Nothing is started. ``options`` are those of :class:`ovm.Options`; podman's API is not on a TCP port unless
    ``podman_tcp=True`` asks for it.

    Args:
        name: Machines of different names share the image and nothing else.
        image: The directory of a guest image; the default image of this host's architecture if not given.
        progress: Called with a file's name, the bytes done and the bytes in all while files are copied.
        **options: Anything of :class:`ovm.Options` except the origin's files and their versions.

    Raises:
        OptionError: the name or an option cannot be used.
        ImageError: there is no guest image; build one with ``ovm image build``.
        HelperError: gvproxy or the hypervisor (QEMU on Linux, vfkit on macOS) is missing.
        UntrustedError: another user made a directory of the machine or of the images, or could change it.
        UnsupportedError: machines do not run on this system.
    """
    check_name(name)
    if sys.platform not in {"linux", "darwin"}:
        raise UnsupportedError(f"machines do not run on {sys.platform}", hint="use Linux or macOS")
    if given := {"origin_path", "originPath", "versions"} & options.keys():
        raise OptionError(
            f"create_ovm takes {', '.join(sorted(given))} from the image",
            hint="use create_linux_ovm or create_darwin_ovm for files of your own",
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
    """The machine as its settings describe it, on this host: with its proxies and, if they say so, its authorities.

    Raises as :func:`create_ovm` does, and:

    Raises:
        SettingsError: the settings cannot be understood.
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


def image_dir(name: str) -> Path:
    """Where the image ``name`` lies: one of those of this user, or with a ``/`` in it a path."""
    return paths.expanded(name) if "/" in name else paths.images_dir() / name


def host_arch() -> str:
    """This host's architecture as Debian and container images call it.

    Raises:
        UnsupportedError: there is no guest for it.
    """
    return _DEBIAN_ARCH[hypervisors.host_arch()]


def default_image_dir(arch: str) -> Path:
    """Where the guest image lies that is used unless another is given."""
    return paths.images_dir() / f"default-{arch}"


def load_image(directory: Path) -> Image:
    """The guest image in ``directory``.

    Raises:
        ImageError: it is missing, unknown, or a file of it is missing or cut.
    """
    try:
        manifest = msgspec.json.decode(read_manifest(directory), type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{directory / IMAGE_MANIFEST} cannot be read: {error}", hint=image_hint()) from error
    if manifest.guest not in IMAGE_GUESTS or manifest.format != IMAGE_FORMAT:
        raise ImageError(
            f"the image in {directory} is of another kind: {manifest.guest}, format {manifest.format}",
            hint=image_hint(),
        )
    for role, name in _IMAGE_FILES.items():
        if role not in manifest.files:
            raise ImageError(f"the image in {directory} lacks its {role}", hint=image_hint())
        _check_size(directory / name, manifest.files[role].size)
    sha256 = {role: manifest.files[role].sha256 for role in _IMAGE_FILES}
    return Image(directory=directory, guest=manifest.guest, arch=manifest.arch, sha256=sha256)


def read_manifest(directory: Path) -> bytes:
    """What the ``image.json`` in ``directory`` holds.

    Raises:
        ImageError: there is none, it cannot be read, or is too long to be one.
    """
    path = directory / IMAGE_MANIFEST
    try:
        return read_file(path, MANIFEST_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"there is no guest image in {directory}", hint=image_hint()) from error
    except (OSError, ValueError) as error:  # the latter for what can be no path
        raise ImageError(f"{path} cannot be read: {error}", hint=image_hint()) from error


def _check_size(path: Path, wanted: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"the image lacks {path}: {error.strerror}", hint=image_hint()) from error
    if size != wanted:
        raise ImageError(f"{path} has {size} bytes instead of {wanted}", hint=image_hint())


def image_hint() -> str:
    """How to come by a guest image on this host."""
    arch = host_arch()
    if is_released(arch):
        return "fetch it: ovm image pull"
    if sys.platform == "linux":
        return "build it: ovm image build"
    return (
        f"build it on Linux with `ovm image build --arch {arch}` and copy the directory to {default_image_dir(arch)}, "
        "or fetch one that was packed: ovm image pull URL"
    )


def is_released(arch: str) -> bool:
    """Whether an image for ``arch`` was released with this copy of ovm."""
    from importlib import resources

    index = (resources.files("ovm") / "image" / "index.json").read_bytes()
    return arch in msgspec.json.decode(index, type=_Index).images


class _Index(msgspec.Struct):
    """What of the index of released images is read here."""

    images: dict[str, msgspec.Raw]


def _files(image: Image) -> tuple[OriginPath, Versions]:
    from ovm.model.options import OriginPath, Versions

    origin = OriginPath(**{role: image.path(role) for role in _IMAGE_FILES})
    return origin, Versions(**{role: image.version(role) for role in _IMAGE_FILES})
