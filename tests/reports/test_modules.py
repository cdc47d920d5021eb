"""What containers want of the guest's kernel: modules, device nodes, and the files that set them up."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

import ovm
import under
from dockers import Docker
from full import BUSYBOX, BUSYBOX_IMAGE

pytestmark = pytest.mark.full

IPTABLES_IMAGE = "localhost/iptables:latest"
GUEST = Path(ovm.__file__).parent / "image" / "guest" / "rootfs"
KINDS = ("dummy", "wireguard", "bridge", "ifb")
BY_NAME = (
    "br_netfilter", "cifs", "fuse", "ip_set", "ip_vs", "ip_vs_rr", "ipvlan", "nbd", "nfs", "nfsv4", "overlay", "tun",
    "wireguard", "xfs", "xt_conntrack", "zram",
)  # fmt: skip
"""What the guests of Docker Desktop, Colima and Lima have ready, as far as Debian's cloud kernel has it."""


@pytest.fixture(scope="session")
async def iptables(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of iptables-legacy, with this host's libraries."""
    path = tmp_path_factory.mktemp("iptables") / "iptables.tar"
    program = Path(under.program("xtables-legacy-multi"))
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    with tarfile.open(path, "w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        tar.add(program, "usr/sbin/xtables-legacy-multi")
        for library in re.findall(r"\s(/\S+) \(", linked):
            tar.add(Path(library).resolve(), library.lstrip("/"))
        for name in ("iptables-legacy", "ip6tables-legacy"):
            link = tarfile.TarInfo(f"usr/sbin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "xtables-legacy-multi"
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("etc/protocols"), io.BytesIO())
    await docker("import", str(path), IPTABLES_IMAGE)
    return IPTABLES_IMAGE


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
async def test_iptables_has_its_tables(docker: Docker, iptables: str, program: str) -> None:
    """A container with NET_ADMIN lists each of iptables' tables (containers/podman#17451)."""
    script = f"for t in nat filter mangle raw; do /usr/sbin/{program} -w -t $t -L -n || exit 1; done"
    await docker("run", "--rm", "--cap-add", "NET_ADMIN", iptables, "/bin/busybox", "sh", "-c", script)


async def test_links_load_their_modules(docker: Docker) -> None:
    """A container with NET_ADMIN makes each kind of network link, though it cannot load modules."""
    script = "".join(f"busybox ip link add t{number} type {kind} || exit 1\n" for number, kind in enumerate(KINDS))
    made = await docker("run", "--rm", "--cap-add", "NET_ADMIN", BUSYBOX_IMAGE, "sh", "-c", script, check=False)
    assert (made.status, made.err) == (0, "")


async def test_modules_are_there_by_name(vm: ovm.OVM) -> None:
    """What a privileged container loads with modprobe is in the guest."""
    asked = await vm.exec(["modprobe", "-n", "-a", *BY_NAME])
    assert (asked.exit_status, asked.stderr) == (0, b"")


@pytest.mark.parametrize("device", ["/dev/fuse", "/dev/net/tun"])
async def test_any_user_opens_the_devices(docker: Docker, device: str) -> None:
    """A container's user who is not root opens the device it was given (containers/podman#17890)."""
    script = f"exec 3<>{device}"
    await docker("run", "--rm", "-u", "1000", "--device", device, BUSYBOX_IMAGE, "sh", "-c", script)


def lines(path: str) -> list[list[str]]:
    """The words of each line that is no comment."""
    read = [line.split() for line in (GUEST / path).read_text().splitlines()]
    return [words for words in read if words and not words[0].startswith("#")]


async def test_every_line_of_the_setup_takes_effect(vm: ovm.OVM) -> None:
    """Each line of modules-load.d, modprobe.d and tmpfiles.d did in the booted guest what it says."""
    checks = {"virtio_rng": "[ -e /sys/bus/virtio/drivers/virtio_rng ]"}
    script = []
    for (module,) in lines("usr/lib/modules-load.d/ovm.conf"):
        script.append(checks.get(module, f"[ -d /sys/module/{module} ]"))
    for _, module in lines("etc/modprobe.d/ovm.conf"):
        script.append(f"grep -q '^{module} ' /proc/modules")  # loaded by its name all the same
    for path in ("etc/tmpfiles.d/ovm.conf", "etc/tmpfiles.d/podman.conf"):
        for kind, name, *rest in lines(path):
            match kind:
                case "R!" | "x":
                    script.append(f"! ls -d {name} 2>/dev/null")
                case "L+":
                    script.append(f'[ "$(readlink {name})" = {rest[-1]} ]')
                case "d":
                    script.append(f'[ "$(stat -c %a {name})" = {rest[0].lstrip("0")} ]')
                case _:
                    pytest.fail(f"{path}: no check for {kind} {name}")
    failed = "; ".join(f"{{ {check}; }} || echo {number}" for number, check in enumerate(script))
    told = (await vm.exec(["sh", "-c", failed])).text.split()
    assert [script[int(number)] for number in told if number.isdigit()] == []
