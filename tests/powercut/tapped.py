"""A QEMU that logs what its guest writes to the data disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

Cache = Literal["as shipped", "unsafe"]
DISK = "ovm-data"

_PROGRAM = """\
#!{python} -IS
import json, os, sys

arguments = sys.argv[1:]
for number, argument in enumerate(arguments):
    if arguments[number - 1] == "-blockdev" and (node := json.loads(argument))["node-name"] == {disk!r}:
        node["file"] = {{
            "driver": "blklogwrites",
            "log-sector-size": 512,
            "log-super-update-interval": 1,
            "file": node["file"] | {{"cache": {{"no-flush": True}}}},
            "log": {{"driver": "file", "filename": {log!r}, "cache": {{"no-flush": True}}}},
        }}
        if {unsafe!r}:
            node["cache"] = {{"no-flush": True}}  # the filter inherits it, as all do under -drive cache=unsafe
        arguments[number] = json.dumps(node)
    if argument.startswith("virtio-blk") and "drive=" + {disk!r} in argument:
        arguments[number] += ",write-zeroes=off"  # their entry and their data may be logged apart
os.execv({qemu!r}, [{qemu!r}, *arguments])
"""


def program(path: Path, qemu: Path, log: Path, cache: Cache = "as shipped") -> Path:
    """Make the program ``path``, which is ``qemu`` with that log."""
    log.touch()
    path.write_text(
        _PROGRAM.format(python=sys.executable, disk=DISK, log=str(log), unsafe=cache == "unsafe", qemu=str(qemu))
    )
    path.chmod(0o700)
    return path
