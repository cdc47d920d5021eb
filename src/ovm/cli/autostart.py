"""``ovm autostart``: start machines when their user logs in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ovm.cli import EXIT_NOT_SO, json_option
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json

LINGERING = Path("/var/lib/systemd/linger")
"""Directory with one file for each user whose services systemd starts at boot and keeps running after logout."""


@click.group("autostart")
def command() -> None:
    """Start machines when you log in."""


@command.command("enable")
@name_argument
def enable(name: str) -> None:
    """Let systemd (Linux) or launchd (macOS) start the machine NAME at each login. This does not start it now."""
    say(_set(name, enabled=True), err=True)
    if sys.platform == "linux" and not (LINGERING / _user()).exists():
        say("to start it at boot and keep it running after logout: loginctl enable-linger", err=True)


@command.command("disable")
@name_argument
def disable(name: str) -> None:
    """Stop starting the machine NAME at login. A running machine keeps running."""
    say(_set(name, enabled=False) or f"{name} is not started when you log in", err=True)


@command.command("status")
@name_argument
@json_option
def status(name: str, *, as_json: bool) -> int:
    """Show whether the machine NAME starts at login. The exit status is 3 if it does not."""
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
            say(f"its setting autostart is true, but nothing starts it; repair: ovm autostart enable {name}", err=True)
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
        done = autostart.set_(name, enabled=enabled)  # under the lock of the settings, so that file and setting agree
        return new

    machine.change_settings(change)
    return done


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # loginctl also accepts the number
        return str(os.getuid())
