"""Collect the whole library, whose names are resolved at run time, and the guest's files."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

APART = ("ovm.cli", "ovm._pyinstaller", "ovm.testing")

hiddenimports = collect_submodules("ovm", filter=lambda name: not name.startswith(APART))
datas = collect_data_files("ovm", excludes=["_pyinstaller"])
