"""The kinds of guest, and what the host may count on in each."""

from __future__ import annotations

from dataclasses import dataclass

from ovm.model.validation import GuestProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A contract between host and guest."""

    engine: bool
    """Whether sshd and podman answer in it."""
    managed: bool
    """Whether it has our programs below /usr/lib/ovm: the clock's, the publisher's, the firewall."""
    over_vsock: bool
    """Whether it asks for a shell command on vsock 1025 and brings its network over vsock 1024, instead of
    reading its boot configuration behind the initrd and having a network card."""


PROFILES: dict[GuestProfile, Profile] = {
    "ovm": Profile(engine=True, managed=True, over_vsock=False),
    "ovm-core": Profile(engine=True, managed=False, over_vsock=True),
    "bare": Profile(engine=False, managed=False, over_vsock=False),
}
