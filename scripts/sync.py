"""Write src/ovm/sync/_generated_*.py: the blocking machines, by the signatures and docstrings of the asynchronous ones.

`scripts/sync.py --check` writes nothing, and fails if a file is not what it would write.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYNC = ROOT / "src" / "ovm" / "sync"
BASE = "ovm.sync.base"


@dataclass(frozen=True, slots=True)
class Twin:
    """A blocking machine and the functions that return one: what one file holds."""

    name: str
    """That of the class, which is the asynchronous one's too."""
    module: str
    """Where the asynchronous class is."""
    base: str
    """The class in base.py that the twin builds on; its docstring is the twin's."""
    makers: dict[str, str]
    """The functions, and where the asynchronous ones are."""


TWINS = {
    "_generated_local.py": Twin(
        "OVM",
        "ovm.machine.vm",
        "Local",
        {
            "create_ovm": "ovm.registry.create",
            "create_linux_ovm": "ovm.machine.create",
            "create_darwin_ovm": "ovm.machine.create",
        },
    ),
    "_generated_remote.py": Twin("RemoteOVM", "ovm.service.remote", "Remote", {"connect": "ovm.service.remote"}),
}
CLASSES = {twin.name for twin in TWINS.values()}
SAID_OTHERWISE = {"aclose"}
"""What the twin has under another name."""
HEAD = '''"""A blocking machine. Written by scripts/sync.py; what it cannot know is in base.py."""

from __future__ import annotations
'''

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """A module to read, and where the names in it come from."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.tree = ast.parse((ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
        self.origins: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    kept = f" as {alias.asname}" if alias.asname else ""
                    self.origins[alias.asname or alias.name] = f"from {node.module} import {alias.name}{kept}"
        for name in (name for node in self.tree.body for name in _defined(node)):
            self.origins.setdefault(name, f"from {module} import {name}")

    def find(self, name: str) -> ast.ClassDef | Function:
        """What is called so at the module's top."""
        return next(
            node
            for node in self.tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
        )

    def imports(self, function: Function) -> set[str]:
        """What its signature needs."""
        names = {
            node.id
            for part in (function.args, function.returns)
            if part
            for node in ast.walk(part)
            if isinstance(node, ast.Name)
        }
        return {self.origins[name] for name in names - CLASSES if name in self.origins}


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.ClassDef) else []


def written(path: Path, twin: Twin) -> str:
    """What the file is to hold."""
    hand = Source(BASE)
    source, by_hand = Source(twin.module), hand.find(twin.base)
    by_itself = {*_public(by_hand), *_public(hand.find("Twin"))} | SAID_OTHERWISE
    imports = {"from ovm.sync.loop import Loop", f"from {BASE} import {twin.base}"}
    lines = [f"class {twin.name}({twin.base}):", _documentation(by_hand, 4)]
    for name, method in _public(source.find(twin.name)).items():
        if name not in by_itself:
            imports |= source.imports(method)
            lines.append(_method(method))
    parts = ["\n\n".join(lines)]
    for name, module in twin.makers.items():
        source = Source(module)
        found = source.find(name)
        assert isinstance(found, ast.AsyncFunctionDef)
        imports |= source.imports(found) | {f"from {module} import {name} as {name}_async"}
        parts.append(_maker(found))
    return _tidy(path, HEAD + "\n" + "\n".join(sorted(imports)) + "\n\n" + "\n\n".join(parts) + "\n")


def _public(found: ast.AST) -> dict[str, Function]:
    assert isinstance(found, ast.ClassDef)
    functions = (node for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: node for node in functions if not node.name.startswith("_")}


def _method(method: Function) -> str:
    head = f"    def {method.name}({ast.unparse(method.args)}) -> {_returned(method)}:\n{_documentation(method, 8)}\n"
    if any(isinstance(node, ast.Name) and node.id == "property" for node in method.decorator_list):
        return f"    @property\n{head}        return self._loop.call(lambda: self._async.{method.name})"
    how = "run" if isinstance(method, ast.AsyncFunctionDef) else "call"
    call = f"self._loop.{how}({', '.join([f'self._async.{method.name}', *_passed(method)])})"
    return head + ("        " if _returned(method) == "None" else "        return ") + call


def _maker(function: Function) -> str:
    kind = _returned(function)
    call = f"loop.run({', '.join([f'{function.name}_async', *_passed(function)])})"
    return (
        f"def {function.name}({ast.unparse(function.args)}) -> {kind}:\n{_documentation(function, 4)}\n"
        f"    loop = Loop.current()\n    return {kind}(loop, {call})"
    )


def _passed(function: Function) -> list[str]:
    args = function.args
    plain = [arg.arg for arg in [*args.posonlyargs, *args.args] if arg.arg != "self"]
    named = [f"{arg.arg}={arg.arg}" for arg in args.kwonlyargs]
    return [*plain, *named, *([f"**{args.kwarg.arg}"] if args.kwarg else [])]


def _returned(function: Function) -> str:
    assert function.returns is not None
    return ast.unparse(function.returns)


def _documentation(node: ast.ClassDef | Function, indent: int) -> str:
    text = ast.get_docstring(node) or ""
    end = "\n" if "\n" in text else ""
    return "\n".join(f"{' ' * indent}{line}".rstrip() for line in f'"""{text}{end}"""'.splitlines())


def _tidy(path: Path, text: str) -> str:
    for verb in (["check", "--fix", "--select", "I,F401,RUF100"], ["format"]):
        argv = [sys.executable, "-m", "ruff", *verb, "--quiet", "--stdin-filename", str(path), "-"]
        text = subprocess.run(argv, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return text


def main() -> int:
    """As it says at the top."""
    texts = {SYNC / name: written(SYNC / name, twin) for name, twin in TWINS.items()}
    if sys.argv[1:] != ["--check"]:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return 0
    old = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} is out of date: .venv/bin/python scripts/sync.py", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
