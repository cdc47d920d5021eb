"""What PyInstaller has to know to freeze an app that uses ovm; it finds this by the entry point ``pyinstaller40``."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Where the hooks are."""
    return [str(Path(__file__).parent)]
