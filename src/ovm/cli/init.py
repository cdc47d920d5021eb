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
# The settings of this machine, in TOML. What stands behind a # does not count: it is the default, or an example.
# Changes take effect at the next start (ovm restart). docs/machines.md explains each key.
"""

TEMPLATE = {
    "cpus": ("2", "by default half the host's"),
    "memory": ('"2G"', ""),
    "disk": ('"64G"', "only ever grows"),
    "mounts": ('["~/src", "/data:/mnt/data:ro"]', "folders of the host: HOST[:GUEST][:ro]"),
    "ports": ('["8080:80", "0.0.0.0:5353:53/udp"]', "[ADDRESS:]HOST:GUEST[/udp]"),
    "register": ("true", "tell docker (a context) and podman (a connection) of it at each start"),
    "podman_tcp": ("true", "podman's API on a TCP port of the host's loopback, too"),
    "publish_address": ('"127.0.0.1"', "where ports of containers appear"),
    "proxy": ('"host"', 'the proxies of the host; "none" for none'),
    "environment": ('{ HTTPS_PROXY = "http://proxy.example:3128" }', "of the engine and of logins"),
    "ca_certificates": ('["/etc/ssl/ours.pem"]', "to trust besides the usual ones"),
    "host_ca": ("true", "and those the host trusts besides the usual ones"),
    "dns": ('["9.9.9.9"]', "by default the host's own"),
    "hostname": ('"ovm"', ""),
    "timezone": ('"Europe/Berlin"', "by default the host's"),
    "ssh_agent": ("true", "lend it your ssh agent"),
    "foreign_arch": ("true", "run containers of the other architecture"),
    "rosetta": ("true", "on a Mac with Apple's chip, by Rosetta"),
    "image": ('"/path/of/an/image"', "another guest image than the default one"),
    "accelerator": ('"auto"', '"kvm", "hvf" or "tcg" to force one'),
    "kernel_cmdline": ('""', ""),
    "pause_on_sleep": ("true", ""),
    "autostart": ("true", "start it when you log in: ovm autostart enable"),
}
"""An example of each setting, or its default; and a word on it."""


@click.command("init")
@name_argument
@options.settings_options
def command(name: str, **given: Any) -> None:
    """Make the machine NAME, without starting it: a directory, and in it the settings to edit."""
    from ovm.registry import machines

    machine = machines.of(name)
    write(machine, given, new=True)
    say(str(machine.settings_path))


def is_made(machine: Machine) -> bool:
    """Whether there is such a machine, made by a command or by a program."""
    return os.path.lexists(machine.settings_path) or machine.target.exists()


def write(machine: Machine, given: Mapping[str, Any], *, new: bool = False) -> dict[str, str]:
    """Put the settings that were ``given``, which are the options' values, into the machine's; returns them.

    A machine that is not made yet is made, with all settings and a word on each.

    Raises:
        StateError: it is made already, and is to be ``new``.
    """
    from ovm.errors import StateError
    from ovm.registry.settings import changed

    wanted = options.as_settings(given)

    def change(text: str) -> str:
        made = is_made(machine)
        if made and new:
            raise StateError(
                f"there is a machine called {machine.name} already", hint=f"change it: ovm config edit {machine.name}"
            )
        for key, value in wanted.items():
            text = changed(text, key, value, machine.settings_path)
        return text if made else template(text)

    if wanted or new or not is_made(machine):
        machine.change_settings(change, make=True)
    return wanted


def template(chosen: str) -> str:
    """All settings with a word on each: those of the TOML ``chosen``, and what could be instead of the others."""
    import tomllib

    live: Mapping[str, Any] = tomllib.loads(chosen)
    lines = [HEAD]
    for key, (example, word) in TEMPLATE.items():
        line = f"{key} = {json.dumps(live[key], ensure_ascii=False)}" if key in live else f"# {key} = {example}"
        lines.append(f"{line:<44}  # {word}" if word else line)
    return "\n".join(lines) + "\n"
