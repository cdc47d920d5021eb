"""Check new settings against this host before they are stored: a bad one would break every later command."""

from __future__ import annotations

import dataclasses
import zoneinfo
from collections.abc import Callable
from pathlib import Path

from ovm.errors import OptionError
from ovm.registry.images import image_dir, load_image
from ovm.registry.settings import Settings


def check_changes(before: Settings, after: Settings) -> None:
    """Check each setting that differs. One that stays is not checked, because a folder may be unmounted for a while.

    Raises:
        OptionError: a folder or a certificate is missing, or the time zone is unknown.
        ImageError: there is no such guest image.
    """
    for field in dataclasses.fields(Settings):
        if (check := _CHECKS.get(field.name)) and getattr(before, field.name) != getattr(after, field.name):
            check(after)


def _mounts(settings: Settings) -> None:
    for mount in settings.mounts or ():
        if not mount.host_path.is_dir():
            raise OptionError(f"mounts: {mount.host_path} is not a directory", hint="create it, or name another")


def _ca_certificates(settings: Settings) -> None:
    for path in settings.ca_certificates:
        if not path.is_file():
            raise OptionError(f"ca_certificates: {path} is not a file", hint="name a file of PEM certificates")


def _timezone(settings: Settings) -> None:
    known = zoneinfo.available_timezones()
    if settings.timezone and known and settings.timezone not in known:
        raise OptionError(
            f"timezone: {settings.timezone} is unknown",
            hint="name one such as Europe/Berlin; `timedatectl list-timezones` prints all",
        )


def _image(settings: Settings) -> None:
    if settings.image is not None:
        load_image(Path(image_dir(settings.image)))


_CHECKS: dict[str, Callable[[Settings], None]] = {
    "mounts": _mounts,
    "ca_certificates": _ca_certificates,
    "timezone": _timezone,
    "image": _image,
}
"""The check of each setting; all others are valid if they can be parsed."""
