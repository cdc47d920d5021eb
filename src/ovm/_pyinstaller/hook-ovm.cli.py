"""Each verb is imported when it is chosen, and rich imports its tables by their names."""

from PyInstaller.utils.hooks import collect_submodules

hiddenimports = collect_submodules("ovm.cli") + collect_submodules("rich._unicode_data")
