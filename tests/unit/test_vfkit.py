"""vfkit: its command line, and the conversation over its REST socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovm.errors import FileError, GuestError, SocketPathError
from ovm.hypervisors import Channel, Disk, Share, VMSpec
from ovm.hypervisors.vfkit import Vfkit, check_paths, command
from ovm.model.states import VMState
from ovm.wire import http

SPEC = VMSpec(
    arch="aarch64",
    cpus=4,
    memory_mib=2048,
    kernel=Path("/t/Image"),
    initrd=Path("/s/boot.initrd"),
    cmdline="quiet",
    disks=(
        Disk(name="ovm-rootfs", path=Path("/t/rootfs.btrfs"), read_only=True),
        Disk(name="ovm-data", path=Path("/t/data.img")),
    ),
    shares=(Share(tag="share0", host_path=Path("/Users"), read_only=False, socket=Path("/s/virtiofs-0.sock")),),
    channels=(Channel(name="ovm.ready", vsock_port=1026, socket=Path("/s/ready.sock")),),
    network_socket=Path("/s/net.sock"),
    mac="5a:94:ef:e4:0c:ee",
    console_log=Path("/l/console.log"),
    control_socket=Path("/s/vfkit.sock"),
)


def devices(**changes) -> list[str]:
    argv = command(dataclasses.replace(SPEC, **changes), Path("/t/vfkit"))
    return [value for word, value in pairwise(argv) if word == "--device"]


def test_the_whole_command_line():
    """For a plain machine the command line is this, word for word; the disks' order is their order in the guest."""
    assert command(SPEC, Path("/t/vfkit")) == [
        "/t/vfkit",
        *("--cpus", "4"),
        *("--memory", "2048"),
        *("--kernel", "/t/Image"),
        *("--initrd", "/s/boot.initrd"),
        *("--kernel-cmdline", "console=hvc0 quiet"),
        *("--restful-uri", "unix:///s/vfkit.sock"),
        *("--device", "virtio-blk,path=/t/rootfs.btrfs,readonly"),
        *("--device", "virtio-blk,path=/t/data.img"),
        *("--device", "virtio-net,unixSocketPath=/s/net.sock,mac=5a:94:ef:e4:0c:ee"),
        *("--device", "virtio-vsock,port=1026,socketURL=/s/ready.sock,listen"),
        *("--device", "virtio-fs,sharedDir=/Users,mountTag=share0"),
        *("--device", "virtio-rng"),
        *("--device", "virtio-serial,logFilePath=/l/console.log"),
    ]


def test_a_guest_with_a_network_of_its_own_gets_no_card():
    """gvforwarder steps aside where it finds a card."""
    assert not [device for device in devices(network_socket=None) if device.startswith("virtio-net")]


def test_rosetta_is_given_when_asked_for():
    """Under the tag the guest is told to mount."""
    assert "rosetta,mountTag=rosetta" in devices(rosetta=True)
    assert not [device for device in devices() if device.startswith("rosetta")]


@pytest.mark.parametrize("path", ["/a,b", "/x/,", "/,/rootfs.btrfs"])
def test_a_comma_is_refused(path):
    """vfkit splits at it, and nothing escapes it."""
    with pytest.raises(FileError, match="comma"):
        check_paths([Path("/fine"), Path(path)], Path("/s"))


@pytest.mark.parametrize("directory", ["/a b", "/a%20b", "/a?b", "/a#b", "/ä", "/a=b", "/a+b", "/a\nb"])
def test_an_odd_socket_directory_is_refused(directory):
    """It would be read as a URL by one option and literally by another."""
    with pytest.raises(SocketPathError, match="URL"):
        check_paths([], Path(directory))


@pytest.mark.parametrize("path", ["/a b", "/ä/é", "/a=b", '/a"b', "/a'b", "/a%20b"])
def test_other_odd_paths_are_fine_for_disks_and_folders(path):
    """Only sockets are read as URLs."""
    check_paths([Path(path)], Path("/private/tmp/o_v-m.1"))


class Rest:
    """vfkit's REST as a table: what GET says, and how each verb is answered."""

    def __init__(self) -> None:
        self.state = "Running"
        self.can: dict[str, bool] | None = {}
        self.answers: dict[str, tuple[int, str] | None] = {}
        self.verbs: list[str] = []
        self.after = {"Pause": "Paused", "Resume": "Running", "Stop": "Stopping"}

    def _state(self) -> dict[str, object]:
        said: dict[str, object] = {"state": f"VirtualMachineState{self.state}"}
        if self.can is None:
            return said
        can = {"canStart": False, "canPause": self.state == "Running", "canResume": self.state == "Paused"}
        return said | can | {"canStop": self.state == "Running", "canHardStop": True} | self.can

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r")[0] or 0)
                body = await reader.readexactly(length)
                if head.startswith("get"):
                    status, text = 200, json.dumps(self._state())
                else:
                    verb = json.loads(body)["state"]
                    self.verbs.append(verb)
                    answer = self.answers.get(verb, (202, ""))
                    if answer is None:  # the process is gone before it answers
                        return
                    status, text = answer
                    if status == 202:
                        self.state = self.after.get(verb, self.state)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


@pytest.fixture
async def rest(short_path):
    """A REST server to be set up by the test; ``rest.vfkit`` drives it."""
    rest = Rest()
    server = await asyncio.start_unix_server(rest.serve, short_path / "vfkit.sock")
    async with http.connect(short_path / "vfkit.sock") as client:
        rest.vfkit = Vfkit(SimpleNamespace(expected=False), client)
        rest.path = short_path / "vfkit.sock"
        yield rest
    server.close()


async def test_every_state_is_ours(rest):
    """The ten strings are passed on; one that is unknown is an error, not a guess."""
    for state in VMState:
        rest.state = state.removeprefix("VirtualMachineState")
        assert await rest.vfkit.state() is state
    rest.state = "Confused"
    assert await rest.vfkit.state() is VMState.ERROR


async def test_pause_and_resume_are_idempotent(rest):
    """What is so already is not asked for."""
    await rest.vfkit.resume()
    await rest.vfkit.pause()
    await rest.vfkit.pause()
    await rest.vfkit.resume()
    await rest.vfkit.resume()
    assert rest.verbs == ["Pause", "Resume"]


@pytest.mark.parametrize(
    ("verb", "field", "state"), [("pause", "canPause", "Running"), ("resume", "canResume", "Paused")]
)
async def test_what_vfkit_says_it_cannot_is_not_asked(rest, verb, field, state):
    """The can… fields are honoured, and the error says what state it is in."""
    rest.state, rest.can = state, {field: False}
    with pytest.raises(GuestError, match=f"cannot {verb} the machine while it is {state.lower()}"):
        await getattr(rest.vfkit, verb)()
    assert rest.verbs == []


async def test_a_version_without_the_fields_is_asked_all_the_same(rest):
    """Before 0.5.0 there were none."""
    rest.can = None
    await rest.vfkit.pause()
    await rest.vfkit.request_stop()
    await rest.vfkit.force_stop()
    assert rest.verbs == ["Pause", "Resume", "Stop", "HardStop"]


async def test_a_refusal_is_told_in_vfkits_words(rest):
    """The text of Apple's framework is the evidence."""
    text = "Error Domain=VZErrorDomain Code=1"
    rest.answers["Pause"] = (500, json.dumps({"error": text}))
    with pytest.raises(GuestError, match=text):
        await rest.vfkit.pause()
    rest.answers["Pause"] = (500, "not json")
    with pytest.raises(GuestError, match="not json"):
        await rest.vfkit.pause()


async def test_a_paused_machine_is_resumed_before_its_stop(rest):
    """requestStop fails while it is paused."""
    rest.state = "Paused"
    await rest.vfkit.request_stop()
    assert rest.verbs == ["Resume", "Stop"]


async def test_the_power_button_is_not_pressed_where_it_cannot_be(rest):
    """canStop is honoured; nothing is raised, for the power is cut next."""
    rest.can = {"canStop": False}
    await rest.vfkit.request_stop()
    rest.can, rest.answers = {}, {"Stop": (500, '{"error": "no"}')}
    await rest.vfkit.request_stop()
    assert rest.verbs == ["Stop"]


async def test_a_lost_answer_to_a_hard_stop_is_a_success(rest):
    """The process ends with the machine; whether it did, its end tells."""
    rest.answers["HardStop"] = None
    await rest.vfkit.force_stop()
    assert rest.verbs == ["HardStop"]
    assert rest.vfkit.child.expected


async def test_a_hard_stop_that_cannot_be_is_not_asked_for(rest):
    """Before macOS 12; signals follow."""
    rest.can = {"canHardStop": False}
    await rest.vfkit.force_stop()
    assert rest.verbs == []


async def test_nobody_at_the_socket_is_an_error(short_path):
    """Not a hang, and a stop goes on."""
    async with http.connect(short_path / "none") as client:
        vfkit = Vfkit(SimpleNamespace(expected=False), client)
        with pytest.raises(GuestError, match="vfkit did not report its state"):
            await vfkit.state()
        await vfkit.request_stop()
        await vfkit.force_stop()


async def test_it_is_waited_for(rest):
    """Until it answers, whatever the machine's state is then."""
    rest.state = "Starting"
    async with asyncio.timeout(5):
        await rest.vfkit.answers(rest.path)
