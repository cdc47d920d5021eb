"""``ovm config``: a machine's settings."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ovm.cli import EXIT_FAILED, json_option
from ovm.cli.names import complete, name_argument
from ovm.cli.outlet import say, say_json
from ovm.cli.output import filled, format_option

if TYPE_CHECKING:
    from ovm.registry.machines import Machine

F = TypeVar("F")


@click.group("config")
def command() -> None:
    """Show and change a machine's settings, which are in its machine.toml."""


def _key(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from ovm.registry.settings import KINDS

    return [key for key in KINDS if key.startswith(incomplete)]


def _machine_option(function: F) -> F:
    add: Any = click.option(
        "--machine",
        "name",
        default="default",
        metavar="NAME",
        show_default=True,
        help="Machine to configure.",
        shell_complete=complete,
    )
    decorated: F = add(function)
    return decorated


@command.command("get")
@click.argument("key", required=False, shell_complete=_key)
@_machine_option
@json_option
@format_option
def get(key: str | None, name: str, *, as_json: bool, template: str | None) -> None:
    """Print the setting KEY, or all settings that are set."""
    import tomllib

    from ovm.registry import machines
    from ovm.registry.settings import check_key

    machine = machines.find(name)
    machine.settings()  # its errors name the line
    told: Any = tomllib.loads(machine.settings_text())
    if key is not None:
        first, _, variable = key.partition(".")
        check_key(key)
        told = told.get(first)
        told = (told or {}).get(variable) if variable else told
    if as_json:
        say_json(told)
    elif template is not None:
        filled(told if isinstance(told, dict) else {key or "": told}, template)
    elif key is None:
        import tomlkit

        say(*tomlkit.dumps(told).splitlines())
    elif told is None:
        say(f"{key} is not set; its default applies", err=True)
    else:
        say(*_plain(told).split("\n"))


@command.command("set")
@click.argument("key", shell_complete=_key)
@click.argument("value", required=False)
@click.option("--unset", is_flag=True, help="Remove the setting and use the default.")
@_machine_option
def set_(key: str, value: str | None, name: str, *, unset: bool) -> None:
    """Set KEY to VALUE. Commas separate the items of a list; `environment.NAME` is one variable."""
    from ovm.registry import machines
    from ovm.registry.settings import changed

    if (value is None) != unset:
        raise click.UsageError("give a VALUE, or --unset")
    machine = machines.find(name)
    _change(machine, lambda text: changed(text, key, value, machine.settings_path))


@command.command("edit")
@name_argument
def edit(name: str) -> None:
    """Edit the settings of the machine NAME in $VISUAL, $EDITOR or vi. Invalid settings are not saved.

    If another command changes the settings meanwhile, this command saves yours only after you confirm.
    """
    from ovm.cli.init import template
    from ovm.errors import StateError
    from ovm.registry import machines

    machine = machines.find(name)
    before = machine.settings_text()

    def replaced(now: str) -> str:
        if now != before:  # compared under the lock of the settings, so no change is lost in between
            raise StateError(
                f"{machine.settings_path} was changed while you edited it; your edit is not saved",
                hint=f"edit it again: ovm config edit {machine.name}",
            )
        return text

    with tempfile.TemporaryDirectory(prefix="ovm-") as directory:
        copy = Path(directory, machine.settings_path.name)
        copy.write_text(before or template(""), encoding="utf-8")
        while True:
            _run_editor(copy)
            try:
                text = copy.read_text(encoding="utf-8")
                machine.check_settings(text)
            except ValueError as error:  # ours, or a UnicodeDecodeError
                if not sys.stdin.isatty():
                    raise
                say(*f"ovm: {error}".split("\n"), err=True)
                if not click.confirm("Edit it again? Otherwise nothing is changed.", default=True, err=True):
                    raise click.exceptions.Exit(EXIT_FAILED) from None
            else:
                break
    try:
        _change(machine, replaced)
    except StateError as error:
        if not sys.stdin.isatty():
            raise
        say(f"ovm: {error.message}", err=True)
        if not click.confirm("Save yours and lose the other change?", default=False, err=True):
            raise click.exceptions.Exit(EXIT_FAILED) from None
        _change(machine, lambda _now: text)


def _run_editor(path: Path) -> None:
    from ovm.errors import HelperError
    from ovm.process.child import users_environment

    hint = "set $VISUAL or $EDITOR to another editor"
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        argv = shlex.split(chosen)
        ended = subprocess.run([*argv, path], check=False, env=users_environment())
    except (OSError, ValueError) as error:
        raise HelperError(f"the editor {chosen} cannot be started: {error}", hint=hint) from error
    if ended.returncode != 0:
        raise HelperError(f"the editor {chosen} failed with status {ended.returncode}; nothing is changed", hint=hint)


def _change(machine: Machine, change: Callable[[str], str]) -> None:
    """Change the settings, apply a change of autostart, and print how to apply the others."""
    from ovm.integrations import autostart
    from ovm.registry import machines
    from ovm.registry.settings import RESTART_KEYS, Settings, parse

    different: set[str] = set()
    done = ""

    def changed(text: str) -> str:
        nonlocal done
        new = change(text)
        after = machine.check_settings(new)
        try:
            before = parse(text, machine.settings_path)
        except ValueError:  # the old settings were invalid
            before = Settings()
        different.update(key for key in Settings.__slots__ if getattr(before, key) != getattr(after, key))
        if "autostart" in different:  # under the lock of the settings, so that file and setting agree
            done = autostart.set_(machine.name, enabled=after.autostart)
        return new

    machine.change_settings(changed)
    if done:
        say(done, err=True)
    if machines.at_rest(machine).held_by == "nobody":
        return
    if different & RESTART_KEYS:
        say(f"Takes effect at the next start: ovm restart {machine.name}", err=True)
    if "ports" in different:
        say("to open a port now: ovm port add", err=True)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "\n".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
