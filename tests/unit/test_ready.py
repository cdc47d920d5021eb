"""What the guest says while it boots, which is not to be trusted."""

from __future__ import annotations

import asyncio
import logging

import pytest

from ovm.errors import GuestRefused
from ovm.guest import boot_channel
from ovm.guest.boot_channel import ReadyChannel


@pytest.fixture
async def channel():
    """A channel; what it warns of is in ``warned``."""
    warned: list[str] = []
    channel = ReadyChannel(warned.append, lambda: None)
    channel.warned = warned
    yield channel
    channel._drop()


async def say(path, content: bytes) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def until_ready(channel) -> None:
    async with asyncio.timeout(5):
        await channel.wait()


@pytest.mark.parametrize(
    ("line", "stages", "warned"),
    [
        ("stage initrd 0.41", [("initrd", 0.41)], []),
        ("stage rootfs 1", [("rootfs", 1.0)], []),
        ("ready 2.5", [("ready", 2.5)], []),
        ("warn the clock is odd", [], ["the clock is odd"]),
        ("warn", [], [""]),
        ("stage x", [], []),
        ("stage x y", [], []),
        ("stage x nan", [], []),
        ("stage x 1e999", [], []),
        ("stage x 1 2", [], []),
        ("ready", [], []),
        ("ready soon", [], []),
        ("ready 1 2", [], []),
        ("Ready 1", [], []),
        ("", [], []),
        ("rubbish", [], []),
        (f"stage {'x' * 1000} 1", [("x" * 40, 1.0)], []),
    ],
)
async def test_lines(channel, line, stages, warned):
    """Each line means what the table says; any other means nothing."""
    channel.hear(line)
    assert [(stage.name, stage.uptime_s) for stage in channel.stages] == stages
    assert channel.warned == warned
    assert channel._ready.done() is (stages[:1] == [("ready", 2.5)])


@pytest.mark.parametrize("code", sorted(boot_channel._HINTS))
async def test_a_guest_that_gives_up_says_what_to_do(channel, code):
    """A fatal line is GuestRefused with the guest's words, its code as the stage, and advice for each known code."""
    channel.hear(f"fatal {code} the superblock is gone")
    with pytest.raises(GuestRefused) as caught:
        await until_ready(channel)
    assert caught.value.message == "the guest cannot boot: the superblock is gone"
    assert caught.value.stage == code
    assert caught.value.hint


async def test_an_unknown_reason_is_a_reason(channel):
    """A fatal line with a code we do not know, or no words, ends the wait too."""
    channel.hear("fatal strange")
    with pytest.raises(GuestRefused, match="the guest cannot boot: strange"):
        await until_ready(channel)


async def test_what_comes_first_counts(channel):
    """After its ready a guest cannot take it back, and hundreds of stages fill no memory."""
    channel.hear("ready 1")
    channel.hear("fatal x y")
    await until_ready(channel)
    for n in range(1000):
        channel.hear(f"stage s{n} {n}")
    assert len(channel.stages) < 100


async def test_a_reboot_is_waited_for_anew(channel):
    """After a reset the last boot's ready counts no more, and the next one does."""
    channel.hear("stage a 1")
    channel.hear("ready 1")
    channel.expect_boot()
    assert channel.stages == []
    waiting = asyncio.create_task(channel.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    channel.hear("ready 2")
    async with asyncio.timeout(5):
        await waiting


async def test_a_cancelled_wait_spoils_nothing(channel):
    """One waiter that is cancelled does not take the ready from the next."""
    waiting = asyncio.create_task(channel.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    channel.hear("ready 1")
    await until_ready(channel)


async def test_several_connections_are_heard(short_path):
    """The hypervisor may connect several times, say nothing at all, and cut a line in two."""
    async with boot_channel.listen(short_path / "s", print, lambda: None) as channel:
        assert (short_path / "s").stat().st_mode & 0o777 == 0o600
        await say(short_path / "s", b"")
        await say(short_path / "s", b"stage one 1\r\nstage two 2\n")
        _, writer = await asyncio.open_unix_connection(short_path / "s")
        writer.write(b"rea")
        await writer.drain()
        await say(short_path / "s", b"stage three 3\n")
        async with asyncio.timeout(5):
            while len(channel.stages) < 3:
                await asyncio.sleep(0)
        writer.write(b"dy 4\n")
        await until_ready(channel)
        writer.close()
    assert {stage.name for stage in channel.stages[:3]} == {"one", "two", "three"}
    assert not (short_path / "s").exists()


@pytest.mark.parametrize("noise", [b"x" * 100_000 + b"\n", b"\xff\xfe\x00\n", b"\n\n\n", b"x" * 4097 + b"\n"])
async def test_noise_is_passed_over(short_path, noise):
    """After an endless line or odd bytes the guest is still understood."""
    async with boot_channel.listen(short_path / "s", print, lambda: None) as channel:
        await say(short_path / "s", noise + b"ready 1\n")
        await until_ready(channel)


async def test_the_guest_cannot_write_to_the_terminal_as_it_likes(short_path):
    """Control characters of a guest's words do not reach people."""
    warned = []
    async with boot_channel.listen(short_path / "s", warned.append, lambda: None) as channel:
        await say(short_path / "s", b"warn \x1b]0;evil\x07 %s\nfatal x \x1b[2J\n")
        with pytest.raises(GuestRefused) as caught:
            await until_ready(channel)
    assert warned == ["·]0;evil· %s"]
    assert caught.value.message.isprintable()


async def test_leaving_ends_open_connections(short_path):
    """A connection that is still open when the channel is left is closed by us, and no task remains."""
    before = asyncio.all_tasks()
    async with boot_channel.listen(short_path / "s", print, lambda: None) as channel:
        reader, writer = await asyncio.open_unix_connection(short_path / "s")
        writer.write(b"ready 1\n")
        await until_ready(channel)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0)
    writer.close()
    await writer.wait_closed()


async def test_what_is_not_understood_is_logged(channel, caplog):
    """A line that makes no sense can be found in the debug log, cut short."""
    with caplog.at_level(logging.DEBUG, "ovm.guest.boot_channel"):
        channel.hear("x" * 5000)
    assert "unknown line" in caplog.text
    assert len(caplog.text) < 500


async def test_who_has_not_the_key_is_not_heard(short_path):
    """On vsock anybody in the guest can speak; each connection shows the key first, or changes nothing."""
    path = short_path / "s"
    async with boot_channel.listen(path, print, lambda: None, key="open sesame") as channel:
        for words in (
            b"ready 1\n",
            b"key open\nready 1\n",
            b"key \nready 1\n",
            b"\xff\nready 1\n",
            b"x" * 9000 + b"\n",
        ):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(words)
            assert await reader.read() == b""
            writer.close()
        assert channel.stages == []
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"key open sesame\nstage initrd 1\nready 2\n")
        async with asyncio.timeout(5):
            await channel.wait()
        writer.close()
    assert [stage.name for stage in channel.stages] == ["initrd", "ready"]


async def test_a_boot_that_begins_again_is_noticed():
    """Where the hypervisor does not tell, the guest's own first word does; not at its very first boot."""
    resets = []
    channel = ReadyChannel(print, lambda: resets.append(len(channel.stages)))
    channel.hear("stage initrd 1")
    channel.hear("stage rootfs 2")
    assert resets == []
    channel.hear("stage initrd 1")
    assert resets == [2]
