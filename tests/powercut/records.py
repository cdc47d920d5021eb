"""What a container writes while the power fails, and whether all it was promised is there.

Three writers at once, each in its own way. A record is acknowledged, by a line on standard output, when it is synced;
what is in it follows from its number, so that nothing else need be remembered of it.
"""

from __future__ import annotations

import io
import platform
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("appended", "renamed", "overwritten")
PER_DIRECTORY = 20
SLOTS, SLOT_SIZE = 8, 20480
BLOCK = 4096
FSYNC = {"x86_64": 74, "aarch64": 82}[platform.machine()]

WRITER = f"""\
$| = 1;
sub synced {{ syscall({FSYNC}, fileno $_[0]) == 0 or die "fsync: $!" }}
sub synced_directory {{ sysopen my $d, $_[0], 0 or die "$_[0]: $!"; synced $d }}
sub record {{
    my ($kind, $n) = @_;
    my $size = $kind eq 'overwritten' ? {SLOT_SIZE} : 1 + $n * 7919 % 12000;
    my $line = sprintf "%s %08d\\n", $kind, $n;
    return substr $line x ($size / length($line) + 1), 0, $size;
}}
sub write_out {{
    my ($mode, $path, $record, $at) = @_;
    open my $file, $mode, $path or die "$path: $!";
    sysseek $file, $at, 0 if defined $at;
    syswrite($file, $record) == length $record or die "$path: $!";
    synced $file;
}}
my %writers = (
    appended => sub {{ write_out '>>', 'appended', $_[1] }},
    renamed => sub {{
        my $directory = int $_[0] / {PER_DIRECTORY};
        if ($_[0] % {PER_DIRECTORY} == 0) {{ mkdir $directory or die "mkdir: $!"; synced_directory '.' }}
        write_out '>', 'new', $_[1];
        rename 'new', "$directory/$_[0]" or die "rename: $!";
        synced_directory $directory;
    }},
    overwritten => sub {{ write_out '+<', 'overwritten', $_[1], $_[0] % {SLOTS} * {SLOT_SIZE} }},
);
chdir '/data' or die;
write_out '>', $_, '' for 'appended', 'overwritten';
synced_directory '.';
for my $kind (keys %writers) {{
    next if fork;
    for (my $n = 0; ; $n++) {{
        $writers{{$kind}}->($n, record $kind, $n);
        syswrite STDOUT, "$kind $n\\n" or exit;
    }}
}}
wait;
"""
"""For perl, in the directory /data, without any module."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A record was told to be durable when the log had ``log_size`` bytes."""

    kind: str
    number: int
    log_size: int


def record(kind: str, number: int) -> bytes:
    """What the writer writes."""
    size = SLOT_SIZE if kind == "overwritten" else 1 + number * 7919 % 12000
    line = f"{kind} {number:08}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def lost(promised: Mapping[str, int], files: Mapping[str, bytes]) -> list[str]:
    """What is not there of the records up to the number that was ``promised`` for each kind."""
    return [words for kind, last in promised.items() for words in _CHECKS[kind](last, files)]


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The files of a tar of /data."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            member.name.removeprefix("./"): file.read()
            for member in tar
            if (file := tar.extractfile(member)) is not None
        }


def _appended(last: int, files: Mapping[str, bytes]) -> Iterator[str]:
    content, at = files.get("appended", b""), 0
    for number in range(last + 1):
        expected = record("appended", number)
        if content[at : at + len(expected)] != expected:
            yield f"appended {number}"
        at += len(expected)


def _renamed(last: int, files: Mapping[str, bytes]) -> Iterator[str]:
    for number in range(last + 1):
        if files.get(f"{number // PER_DIRECTORY}/{number}") != record("renamed", number):
            yield f"renamed {number}"


def _overwritten(last: int, files: Mapping[str, bytes]) -> Iterator[str]:
    """A block may be of a later record already: writing over a file promises no more."""
    content = files.get("overwritten", b"")
    for number in range(max(0, last + 1 - SLOTS), last + 1):
        at = number % SLOTS * SLOT_SIZE
        for begin in range(0, SLOT_SIZE, BLOCK):
            found = content[at + begin : at + begin + BLOCK]
            of = max(number, *map(int, re.findall(rb"overwritten (\d{8})\n", found)), 0)
            if of % SLOTS != number % SLOTS or found != record("overwritten", of)[begin : begin + BLOCK]:
                yield f"overwritten {number}"
                break


_CHECKS = {"appended": _appended, "renamed": _renamed, "overwritten": _overwritten}
