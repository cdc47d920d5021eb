"""``ovm autostart``: machines that are started when their user logs in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ovm.cli import EXIT_NOT_SO, json_option
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json

LINGERING = Path("/var/lib/systemd/linger")
"""Where systemd notes whose programs it starts with the host, and leaves running without a login."""


@click.group("autostart")
def command() -> None:
    """Have machines started when you log in."""


@command.command("enable")
@name_argument
def enable(name: str) -> None:
    """Start the machine NAME at each login, by systemd (Linux) or launchd (macOS). It is not started now."""
    say(_set(name, enabled=True), err=True)
    if sys.platform == "linux" and not (LINGERING / _user()).exists():
        say("to have it started with the host, and kept running after a logout: loginctl enable-linger", err=True)


@command.command("disable")
@name_argument
def disable(name: str) -> None:
    """Start it at no login any more. If it runs, it goes on."""
    say(_set(name, enabled=False) or f"{name} is not started when you log in", err=True)


@command.command("status")
@name_argument
@json_option
def status(name: str, *, as_json: bool) -> int:
    """Say whether the machine NAME is started at a login. The exit status is 3 if it is not."""
    from ovm.integrations import autostart
    from ovm.registry import machines

    machine = machines.find(name)
    there = autostart.is_there(name)
    if as_json:
        say_json({"name": name, "autostart": there, "file": str(autostart.path(name)) if there else None})
    else:
        say(f"{name} is {'' if there else 'not '}started when you log in")
        if there:
            say(f"by {autostart.path(name)}", err=True)
        elif machine.settings().autostart:
            say(f"its settings say so, but nothing does it: ovm autostart enable {name}", err=True)
    return 0 if there else EXIT_NOT_SO


def _set(name: str, *, enabled: bool) -> str:
    from ovm.integrations import autostart
    from ovm.registry import machines
    from ovm.registry.settings import changed

    machine = machines.find(name)
    done = ""

    def change(text: str) -> str:
        nonlocal done
        new = changed(text, "autostart", "true" if enabled else None, machine.settings_path)
        done = autostart.set_(name, enabled=enabled)
        return new

    machine.change_settings(change)
    return done


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # loginctl takes the number as well
        return str(os.getuid())
