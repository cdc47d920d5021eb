"""Collect what is imported by name at run time: ovm's commands and rich's tables."""

from PyInstaller.utils.hooks import collect_submodules

hiddenimports = collect_submodules("ovm.cli") + collect_submodules("rich._unicode_data")
