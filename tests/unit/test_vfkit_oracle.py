"""vfkit's command line against vfkit's own parsers: whatever the driver may say, they understand what was meant."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import doubles
from ovm.errors import FileError, SocketPathError
from ovm.hypervisors import Channel, Disk, Share, VMSpec
from ovm.hypervisors.vfkit import check_paths, command

ODD = {
    "plain": "plain",
    "space": "with space",
    "spaces at its ends": " both ends ",
    "equals": "a=b=c",
    "double quotes": 'say "hi"',
    "single quote": "it's",
    "percent": "100%20sure",
    "question": "what?now#then",
    "not ASCII": "Ünïcødé-文件-🐳",
    "shell": "$(id);`id`&|*",
    "backslash": "back\\slash\\n",
    "option": "--device",
    "option of a device": "readonly",
    "colon": "a:b",
    "tab": "tab\there",
    "newline": "line\nbreak",
}
CMDLINES = ["quiet", 'a="b c" d=e,f', "--cpus 9", "x=" + "y" * 500, "console=tty0 -- init='/bin/sh'", "ü"]
COMMA = "com,ma"


def ask(lines: list[list[str]]) -> list[dict[str, Any]]:
    done = subprocess.run([doubles.oracle()], input=json.dumps(lines), capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def spec(home: Path, **changes: Any) -> VMSpec:
    """A machine all of whose files lie in ``home``; its disks are there, for vfkit looks at them."""
    home.mkdir(parents=True, exist_ok=True)
    names = ("rootfs.btrfs", "scratch.img", "data.img")
    for name in names:
        (home / name).write_bytes(bytes(512))
    given: dict[str, Any] = {
        "arch": "aarch64",
        "cpus": 2,
        "memory_mib": 2048,
        "kernel": home / "Image",
        "initrd": home / "initrd",
        "cmdline": "quiet",
        "disks": (
            Disk(name="ovm-rootfs", path=home / names[0], read_only=True),
            Disk(name="ovm-data", path=home / names[2]),
        ),
        "shares": (),
        "channels": (channel(1026, "ready"),),
        "network_socket": Path("/s/net.sock"),
        "mac": "5a:94:ef:e4:0c:ee",
        "console_log": home / "console.log",
        "control_socket": Path("/s/vfkit.sock"),
    }
    return VMSpec(**given | changes)


def channel(port: int, name: str) -> Channel:
    return Channel(name=f"ovm.{name}", vsock_port=port, socket=Path(f"/s/{name}.sock"))


def folders(*paths: str | Path) -> tuple[Share, ...]:
    return tuple(
        Share(tag=f"share{n}", host_path=Path(path), read_only=bool(n % 2), socket=Path(f"/s/virtiofs-{n}.sock"))
        for n, path in enumerate(paths)
    )


def understood(said: VMSpec) -> dict[str, Any]:
    """What the oracle is to answer for ``said``, its devices reduced to what we decide."""
    devices: list[dict[str, Any]] = [
        {"kind": "virtio-blk", "ImagePath": str(disk.path), "ReadOnly": disk.read_only} for disk in said.disks
    ]
    if said.network_socket is not None:
        devices.append(
            {
                "kind": "virtio-net",
                "UnixSocketPath": str(said.network_socket),
                "MacAddress": said.mac,
                "VfkitMagic": True,
            }
        )
    devices += [
        {"kind": "virtio-vsock", "Port": c.vsock_port, "SocketURL": str(c.socket), "Listen": True}
        for c in said.channels
    ]
    devices += [{"kind": "virtio-fs", "SharedDir": str(s.host_path), "MountTag": s.tag} for s in said.shares]
    devices += [{"kind": "virtio-rng"}, {"kind": "virtio-serial", "LogFile": str(said.console_log)}]
    if said.rosetta:
        devices.append({"kind": "rosetta", "MountTag": "rosetta"})
    return {
        "cpus": said.cpus,
        "memory_mib": said.memory_mib,
        "bootloader": {
            "kernel": str(said.kernel),
            "initrd": str(said.initrd),
            "cmdline": f"console=hvc0 {said.cmdline}",
        },
        "rest": {"scheme": "unix", "host": "", "path": str(said.control_socket)},
        "devices": devices,
    }


UNTOUCHED = (False, "", 0, None, [])


def same(answer: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Field by field; whatever the driver did not say must have been left as it was."""
    assert "error" not in answer, answer["error"]
    assert {key: value for key, value in answer.items() if key != "devices"} == {
        key: value for key, value in wanted.items() if key != "devices"
    }
    assert [device["kind"] for device in answer["devices"]] == [device["kind"] for device in wanted["devices"]]
    for device, fields in zip(answer["devices"], wanted["devices"], strict=True):
        assert {key: device[key] for key in fields} == fields
        others = {key: value for key, value in device.items() if key not in fields}
        assert {key: value for key, value in others.items() if value not in UNTOUCHED} == DEFAULTS.get(
            device["kind"], {}
        )


DEFAULTS: dict[str, dict[str, Any]] = {"virtio-blk": {"DevName": "virtio-blk"}}
"""What vfkit fills in itself."""


def matrix(root: Path) -> Iterator[VMSpec]:
    """Every kind of machine the driver can be asked for, odd but legal paths included."""
    for odd in ODD.values():  # where the machine's own files lie
        yield spec(root / odd)
    for one, other in itertools.product(ODD.values(), repeat=2):  # what is shared
        yield spec(root / "plain", shares=folders(f"/{one}", f"/x/{other}/y"))
    for odd, cmdline in itertools.product((*ODD.values(), COMMA), CMDLINES):  # a comma is fine outside of devices
        yield spec(root / "plain", kernel=Path("/k", odd), initrd=Path("/i", odd), cmdline=cmdline)
    home = root / "plain"
    core = (channel(1026, "ready"), channel(1024, "net"), channel(1025, "command"))
    third = (*spec(home).disks[:1], Disk(name="ovm-scratch", path=home / "scratch.img"), *spec(home).disks[1:])
    for cpus, memory, shares, rosetta in itertools.product(
        (1, 8, 255), (256, 2048, 1 << 24), (0, 1, 3, 100), (False, True)
    ):
        size = {"cpus": cpus, "memory_mib": memory, "rosetta": rosetta}
        size |= {"shares": folders(*(f"/folder {n}" for n in range(shares)))}
        yield spec(home, **size)
        yield spec(home, **size, disks=third, channels=core, network_socket=None)


def test_every_command_line_is_understood_as_it_was_meant(tmp_path):
    """The generated matrix, parsed by vfkit's own code in one run, compared with the specification field by field."""
    specs = list(matrix(tmp_path))
    for said in specs:
        check_paths([d.path for d in said.disks] + [said.console_log] + [s.host_path for s in said.shares], Path("/s"))
    answers = ask([command(said, Path("/t/vfkit"))[1:] for said in specs])
    assert len(answers) == len(specs) > 500
    for said, answer in zip(specs, answers, strict=True):
        same(answer, understood(said))


def test_the_disks_of_an_ovm_core_guest_are_never_swapped(tmp_path):
    """vdb is formatted at every boot, vdc holds people's images: vfkit gets them in this order."""
    home = tmp_path
    disks = tuple(Disk(name=n, path=spec(home) and home / n) for n in ("rootfs.btrfs", "scratch.img", "data.img"))
    (answer,) = ask([command(spec(home, disks=disks), Path("/t/vfkit"))[1:]])
    blocks = [device["ImagePath"] for device in answer["devices"] if device["kind"] == "virtio-blk"]
    assert blocks == [str(home / name) for name in ("rootfs.btrfs", "scratch.img", "data.img")]


def test_what_is_refused_would_have_been_misunderstood(tmp_path):
    """A comma really is the end of a path for vfkit: the check is not stricter than it must be."""
    said = spec(tmp_path, shares=folders(f"/{COMMA}"))
    with pytest.raises(FileError):
        check_paths([Path(f"/{COMMA}")], Path("/s"))
    (answer,) = ask([command(said, Path("/t/vfkit"))[1:]])
    assert "error" in answer
    with pytest.raises(SocketPathError):
        check_paths([], Path("/s%41"))
    (answer,) = ask([command(spec(tmp_path, control_socket=Path("/s%41/vfkit.sock")), Path("/t/vfkit"))[1:]])
    assert answer["rest"]["path"] == "/sA/vfkit.sock"
