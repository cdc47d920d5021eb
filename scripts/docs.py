"""Write what docs/ tells of the commands and of the REST interface, from the code.

What stands between two of its marks is the script's, everything else on a page is people's, and stays.
`scripts/docs.py --check` writes nothing, and fails if a page is not what it would write.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ovm.cli import _VERBS
from ovm.cli import ovm as ovm_command
from ovm.service.app import VERBS
from ovm.service.openapi import document

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN = "<!-- from the code: {} -->"
END = "<!-- as written -->"
COMMANDS = "commands"
REQUESTS = "requests"


def written() -> dict[Path, str]:
    """Every page, as it should be."""
    pages = {}
    context = click.Context(ovm_command, info_name="ovm", obj=None)
    for verb in _VERBS:
        page = DOCS / "commands" / f"{verb}.md"
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        for level, path, told in _commands(context, verb):
            text = _placed(text, path, f"{'#' * level} {path}\n", told)
        pages[page] = text
    for name, place, table in (("cli.md", COMMANDS, _commands_table()), ("service.md", REQUESTS, _requests_table())):
        pages[DOCS / name] = _placed((DOCS / name).read_text(encoding="utf-8"), place, "", table)
    pages[DOCS / "openapi.json"] = json.dumps(document(), indent=2, ensure_ascii=False) + "\n"
    return pages


def _commands(parent: click.Context, name: str, level: int = 1) -> Iterator[tuple[int, str, str]]:
    """The command ``name`` and those below it: the level of its heading, its whole name, and what the code tells."""
    assert isinstance(parent.command, click.Group)
    command = parent.command.get_command(parent, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=parent)
    yield level, context.command_path, _told(command, context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            yield from _commands(context, below, level + 1)


def _placed(text: str, name: str, heading: str, told: str) -> str:
    """``text`` with ``told`` in its place, or else at the end, below ``heading``."""
    begin = BEGIN.format(name)
    block = f"{begin}\n\n{told}\n\n{END}"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(END)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: block, text)
    return f"{text}\n{heading}\n{block}\n".lstrip("\n")


def _commands_table() -> str:
    rows = [f"| [`ovm {verb}`](commands/{verb}.md) | {line} |" for verb, (_, line) in _VERBS.items()]
    return "\n".join(["| command | what |", "|---|---|", *rows])


def _requests_table() -> str:
    rows = []
    for verb in VERBS:
        takes = ", ".join(f"`{query.name}`" for query in verb.queries)
        takes = f"`{verb.body.__name__}`" if verb.body else takes
        rows.append(f"| {verb.method} | `{verb.path}` | {verb.summary} | {takes} |")
    return "\n".join(["| method | path | what | takes |", "|---|---|---|---|", *rows])


def _told(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"```\n{usage}\n```", _paragraphs(command.help or "")]
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if options:
        rows = [f"| {_names(option, context)} | {_cell(_explained(option, context))} |" for option in options]
        parts.append("\n".join(["| option | what |", "|---|---|", *rows]))
    if isinstance(command, click.Group):
        anchors = [
            (name, f"#{context.command_path} {name}".replace(" ", "-")) for name in command.list_commands(context)
        ]
        parts.append("\n".join(f"- [`{context.command_path} {name}`]({anchor})" for name, anchor in anchors))
    return "\n\n".join(part for part in parts if part)


def _paragraphs(text: str) -> str:
    """click's paragraphs, each on a line of its own; what it is to leave as it is, as code."""
    found = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            found.append("\n".join(["```", *lines[1:], "```"]))
        else:
            found.append(" ".join(lines))
    return "\n\n".join(found)


def _names(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    value = (
        "|".join(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else _value(option, context)
    )
    return f"{names} {_cell(value)}"


def _value(option: click.Option, context: click.Context) -> str:
    return re.sub(r"\s*RANGE$", "", option.make_metavar(context))


def _explained(option: click.Option, context: click.Context) -> str:
    """As ``--help`` has it, with what click adds in brackets said behind it."""
    record = option.get_help_record(context)
    return re.sub(r"\s{2,}\[([^\[\]]*)\]", r" (\1)", record[1]) if record else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    stale = 0
    for page, text in written().items():
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale = 1
        if "--check" not in arguments:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
        print(page.relative_to(DOCS.parent))
    return stale if "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
