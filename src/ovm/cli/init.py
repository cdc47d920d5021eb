"""``ovm init``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ovm.cli import options
from ovm.cli.names import name_argument
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.registry.machines import Machine

HEAD = """\
# The settings of this machine, in TOML. Lines with # are comments: each shows a default or an example.
# Changes take effect at the next start (ovm restart). docs/machines.md explains each key.
"""

TEMPLATE = {
    "cpus": ("2", "by default half the host's"),
    "memory": ('"2G"', ""),
    "disk": ('"64G"', "can only grow"),
    "mounts": ('["~/src", "/data:/mnt/data:ro"]', "host folders to share: HOST[:GUEST][:ro]"),
    "ports": ('["8080:80", "0.0.0.0:5353:53/udp"]', "[ADDRESS:]HOST:GUEST[/udp]"),
    "register": ("true", "add a docker context and a podman connection at each start"),
    "podman_tcp": ("true", "also serve podman's API on a TCP port of the host's loopback"),
    "publish_address": ('"127.0.0.1"', "host address of published container ports"),
    "proxy": ('"host"', 'those of the host, or "none"'),
    "environment": ('{ HTTPS_PROXY = "http://proxy.example:3128" }', "of the container engine and logins"),
    "ca_certificates": ('["/etc/ssl/ours.pem"]', "to trust in addition to the usual ones"),
    "host_ca": ("true", "also trust the host's additional ones"),
    "dns": ('["9.9.9.9"]', "by default the host's"),
    "hostname": ('"ovm"', ""),
    "timezone": ('"Europe/Berlin"', "by default the host's"),
    "ssh_agent": ("true", "forward your ssh agent"),
    "foreign_arch": ("true", "run containers for the other architecture"),
    "rosetta": ("true", "on a Mac with an Apple chip, with Rosetta"),
    "image": ('"/path/of/an/image"', "guest image to use instead of the default one"),
    "accelerator": ('"auto"', '"kvm", "hvf" or "tcg" to force one'),
    "kernel_cmdline": ('""', ""),
    "pause_on_sleep": ("true", ""),
    "autostart": ("true", "start it when you log in, like ovm autostart enable"),
}
"""An example or default of each setting, and its comment."""


@click.command("init")
@name_argument
@options.settings_options
def command(name: str, **given: Any) -> None:
    """Create the machine NAME without starting it: a directory with its settings, which you can edit."""
    from ovm.registry import machines

    machine = machines.of(name)
    write(machine, given, new=True)
    say(str(machine.settings_path))


def is_made(machine: Machine) -> bool:
    """Return whether the machine exists, created by a command or by a program."""
    return os.path.lexists(machine.settings_path) or machine.target.exists()


def write(machine: Machine, given: Mapping[str, Any], *, new: bool = False) -> dict[str, str]:
    """Store the settings ``given`` as options in the machine's settings, and return them.

    A machine that does not exist is created, with a commented example of every other setting.

    Raises:
        StateError: the machine exists, although it should be ``new``.
    """
    from ovm.errors import StateError
    from ovm.registry.settings import changed

    wanted = options.as_settings(given)

    def change(text: str) -> str:
        made = is_made(machine)
        if made and new:
            raise StateError(
                f"the machine {machine.name} already exists", hint=f"change it: ovm config edit {machine.name}"
            )
        for key, value in wanted.items():
            text = changed(text, key, value, machine.settings_path)
        return text if made else template(text)

    if wanted or new or not is_made(machine):
        machine.change_settings(change, make=True)
    return wanted


def template(chosen: str) -> str:
    """Return all settings with comments: those of the TOML ``chosen``, and examples of the others."""
    import tomllib

    live: Mapping[str, Any] = tomllib.loads(chosen)
    lines = [HEAD]
    for key, (example, word) in TEMPLATE.items():
        line = f"{key} = {json.dumps(live[key], ensure_ascii=False)}" if key in live else f"# {key} = {example}"
        lines.append(f"{line:<44}  # {word}" if word else line)
    return "\n".join(lines) + "\n"
