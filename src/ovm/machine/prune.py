"""Prune: podman removes unused data, and the host gets back the blocks that the guest has freed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ovm.errors import GuestError
from ovm.guest.ssh import SSH
from ovm.model.results import Pruned
from ovm.text.printable import GuestText, tamed
from ovm.wire import http
from ovm.wire.error import WireError

log = logging.getLogger(__name__)

PRUNE_TIMEOUT_S = 900.0
"""Podman removes layer by layer, which takes long on a full disk."""
TRIM_TIMEOUT_S = 300.0

_PRUNE = "/v4.0.0/libpod/system/prune"
_MAKE_ROOM = "[ ! -x /usr/lib/ovm/reserve ] || /usr/lib/ovm/reserve give"
"""On a full disk podman cannot remove anything; ovm's own guests keep a reserve for that."""
_TRIM = (
    "sync; fstrim -v /var/lib/containers; status=$?; "  # without the sync, the blocks freed last are not trimmed
    "[ ! -x /usr/lib/ovm/reserve ] || /usr/lib/ovm/reserve take; exit $status"
)
_TRIMMED = re.compile(rb"(?<![-\d])(\d{1,18}) bytes\)? trimmed")
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A plausible size, which is exact in JSON."""


class _Item(msgspec.Struct, rename="pascal"):
    """One item that podman has tried to remove."""

    id: str = ""
    name: str = ""
    size: _Bytes = 0
    err: Any = None
    error: Any = None

    @property
    def failure(self) -> str:
        """Why the item was not removed; empty if it was."""
        reason = self.err or self.error
        return str(GuestText(f"{self.id or self.name}: {reason}")) if reason else ""


class _Report(msgspec.Struct):
    """Podman's answer; a kind without items is null."""

    pods: Sequence[_Item] | None = msgspec.field(default=None, name="PodPruneReport")
    containers: Sequence[_Item] | None = msgspec.field(default=None, name="ContainerPruneReports")
    images: Sequence[_Item] | None = msgspec.field(default=None, name="ImagePruneReports")
    networks: Sequence[_Item] | None = msgspec.field(default=None, name="NetworkPruneReports")
    volumes: Sequence[_Item] | None = msgspec.field(default=None, name="VolumePruneReports")


async def prune(podman_socket: Path, ssh: SSH, *, everything: bool = False, volumes: bool = False) -> Pruned:
    """Remove unused data with podman, and return the freed space in ``data.img`` to the host.

    Removes stopped containers, unused pods and networks, and untagged images.

    Args:
        podman_socket: Podman's API.
        ssh: The connection to its guest.
        everything: Also remove every image that no container uses.
        volumes: Also remove volumes that no container uses, with their contents.

    Raises:
        GuestError: the guest cannot be reached, or podman failed.
    """
    await ssh.exec(["sh", "-c", _MAKE_ROOM], timeout_s=TRIM_TIMEOUT_S)
    asked = f"{_PRUNE}?all={_go(everything)}&volumes={_go(volumes)}"
    try:
        async with http.connect(podman_socket) as podman:
            answer = await podman.post(asked, None, timeout_s=PRUNE_TIMEOUT_S)
        report = msgspec.json.decode(answer, type=_Report)
    except WireError as error:
        raise GuestError(f"podman could not prune: {error.message}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise GuestError(f"podman's answer to a prune is malformed: {GuestText.of(error)}") from tamed(error)
    return _summary(report, await trim(ssh))


async def trim(ssh: SSH) -> int | None:
    """Trim the guest's file system; return the trimmed bytes, or ``None`` if that failed.

    Raises:
        GuestError: the guest cannot be reached.
    """
    ended = await ssh.exec(["sh", "-c", _TRIM], timeout_s=TRIM_TIMEOUT_S)
    found = _TRIMMED.search(ended.stdout)
    if ended.exit_status != 0 or not found:
        log.warning("could not return the guest's free space to the host: %s", GuestText(ended.stderr))
        return None
    return int(found[1])


def _summary(report: _Report, trimmed: int | None) -> Pruned:
    kinds = {name: getattr(report, name) or () for name in report.__struct_fields__}
    gone = {name: [item for item in items if not item.failure] for name, items in kinds.items()}
    return Pruned(
        removed={name: len(items) for name, items in gone.items()},
        freed_bytes={name: sum(item.size for item in gone[name]) for name in ("containers", "images", "volumes")},
        trimmed_bytes=trimmed,
        failures=tuple(item.failure for items in kinds.values() for item in items if item.failure),
    )


def _go(value: bool) -> str:
    return "true" if value else "false"
