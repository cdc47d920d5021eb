"""``ovm image``: build, fetch and manage guest images."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ovm.cli import Ui, json_option, run
from ovm.cli.outlet import say, say_json
from ovm.cli.output import filled, format_option
from ovm.cli.progress import Steps, steps

if TYPE_CHECKING:
    from ovm.image import BuildOptions, GuestImage, PullOptions

_T = TypeVar("_T")


@click.group("image")
def image() -> None:
    """Build, fetch and manage guest images."""


command = image


@image.command("build")
@click.option("--arch", type=click.Choice(["amd64", "arm64"]), help="Guest architecture; by default the host's.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the image.")
@click.option("--zip", is_flag=True, help="Also pack the rootfs as rootfs.btrfs.zip.")
@click.option("--suite", default="trixie", show_default=True, help="Debian release: trixie, or forky for podman 5.8.")
@click.option(
    "--mirror", default="", metavar="URL", help="Debian archive; by default the one that this host's apt uses."
)
@json_option
@click.pass_obj
def build(ui: Ui, /, as_json: bool, **chosen: Any) -> None:
    """Build a guest image from Debian packages.

    It replaces the default image, or the one in the directory given with -o.
    """
    from ovm.image import BuildOptions
    from ovm.image.build import host_arch

    options = BuildOptions(**chosen | {"arch": chosen["arch"] or host_arch()})
    _show(run(_build(options, steps(ui.progress))), as_json)


async def build_default(shown: Steps) -> None:
    """Build the default image."""
    from ovm.image import BuildOptions

    await _build(BuildOptions(), shown)


async def _build(options: BuildOptions, shown: Steps) -> GuestImage:
    from ovm.image import build_image

    with contextlib.ExitStack() as step:
        show = _stages(shown, step)
        return await _until_terminated(build_image(options, progress=lambda stage, detail: show(stage, detail, 0, 0)))


@image.command("pull")
@click.argument("url", default="")
@click.option("--arch", type=click.Choice(["amd64", "arm64"]), help="Guest architecture; by default the host's.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the image.")
@click.option("--sha256", default="", metavar="DIGEST", help="Expected SHA-256 of the download.")
@json_option
@click.pass_obj
def pull(ui: Ui, /, as_json: bool, **chosen: Any) -> None:
    """Fetch the guest image released with this ovm, or the packed image at URL.

    It replaces the default image, or the one in the directory given with -o. After an interruption, the next pull
    continues the download.
    """
    from ovm.image import PullOptions
    from ovm.image.build import host_arch

    options = PullOptions(**chosen | {"arch": chosen["arch"] or host_arch()})
    _show(run(_pull(options, steps(ui.progress))), as_json)


async def _pull(options: PullOptions, shown: Steps) -> GuestImage:
    from ovm.image import pull_image

    with contextlib.ExitStack() as step:
        show = _stages(shown, step)
        return await _until_terminated(
            pull_image(options, progress=lambda stage, done, total: show(stage, f"{total >> 20} MiB", done, total))
        )


def _stages(shown: Steps, step: contextlib.ExitStack) -> Callable[[str, str, int, int], None]:
    """Return a callback that shows each stage as a step of its own; ``step`` ends the last one."""
    stage, advance = "", None

    def show(entered: str, detail: str, done: int, total: int) -> None:
        nonlocal stage, advance
        if advance is None or entered != stage:
            step.close()
            stage, advance = entered, step.enter_context(shown.step(entered))
        advance(detail, done, total)

    return show


async def _until_terminated(work: Coroutine[Any, Any, _T]) -> _T:
    """Await ``work``; SIGTERM ends it as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@image.command("pack")
@click.argument("name", default="")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the file; by default the working directory.",
)
@json_option
def pack(name: str, output: Path | None, as_json: bool) -> None:
    """Pack an image into one file for `ovm image pull`. NAME is one of `ovm image ls`, or a directory."""
    from ovm.image import pack_image

    packed = run(_until_terminated(pack_image(_directory(name), output)))
    if as_json:
        say_json(packed)
    else:
        say(f"{packed.sha256}  {packed.path}")


@image.command("ls")
@json_option
@format_option
def ls(as_json: bool, template: str | None) -> None:
    """List the images of this host."""
    from ovm import paths
    from ovm.image import list_images

    images = list_images(paths.images_dir())
    if as_json:
        say_json([_summary(found) for found in images])
        return
    if template is not None:
        for found in images:
            filled(_summary(found), template)
        return
    if not images:
        from ovm.registry.images import image_hint

        say(f"no images yet; {image_hint()}", err=True)
    for found in images:
        versions = found.versions
        say(
            f"{found.directory.name:<20} {found.arch:<6} podman {versions.get('podman', '?')}"
            f"  kernel {versions.get('kernel', '?')}  {_mebibytes(found)} MiB"
        )


@image.command("verify")
@click.argument("name", default="")
@json_option
def verify(name: str, as_json: bool) -> None:
    """Check every file of an image against its digest. NAME is one of `ovm image ls`, or a directory."""
    from ovm.image import verify_image

    _show(run(verify_image(_directory(name))), as_json)


@image.command("rm")
@click.argument("name")
def rm(name: str) -> None:
    """Remove an image. NAME is one of `ovm image ls`, or a directory."""
    from ovm.image import remove_image

    remove_image(_directory(name))


def _directory(name: str) -> Path:
    from ovm import paths
    from ovm.errors import OptionError
    from ovm.image.build import host_arch

    if "/" in name:
        return paths.expanded(name).absolute()
    if name.startswith("."):
        raise OptionError(
            f"{name!r} is not the name of an image", hint="give one of `ovm image ls`, or a directory with /"
        )
    return paths.images_dir() / (name or f"default-{host_arch()}")


def _show(built: GuestImage, as_json: bool) -> None:
    if as_json:
        say_json(_summary(built))
    else:
        say(f"{built.directory}: podman {built.versions.get('podman', '?')}, {_mebibytes(built)} MiB")


def _mebibytes(found: GuestImage) -> int:
    return found.occupied >> 20


def _summary(found: GuestImage) -> dict[str, Any]:
    import msgspec

    summary: dict[str, Any] = msgspec.to_builtins(found, enc_hook=str)
    summary.pop("packages")
    return {"name": found.directory.name, "data_mib": _mebibytes(found)} | summary
