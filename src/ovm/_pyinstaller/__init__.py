"""Hooks for PyInstaller to freeze an app that uses ovm; found by the entry point ``pyinstaller40``."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Return the directory of the hooks."""
    return [str(Path(__file__).parent)]
