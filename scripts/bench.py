"""How long a start takes, side by side with booting the same image by hand, and what else people wait for.

Starts of ovm and of scripts/boot-by-hand alternate, so that both see the same machine; the ratio of their medians
is what carries over to another one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import ovm
from ovm import helpers, registry
from ovm.process.probe import show_version

ROOT = Path(__file__).parents[1]
BY_HAND = ROOT / "scripts" / "boot-by-hand"
COMMAND_RUNS = 10
CPUS = 2
MEMORY_MIB = 2048

Samples = dict[str, list[float]]
"""Milliseconds of each run, by what was measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="starts on each side")
    parser.add_argument("--image", type=Path, default=registry.default_image_dir(registry.host_arch()))
    parser.add_argument("--json", type=Path, help="write the result there, too")
    given = parser.parse_args()
    result = asyncio.run(measure(given.image.absolute(), given.runs))
    print(report(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


async def measure(image: Path, runs: int) -> dict[str, Any]:
    samples: Samples = defaultdict(list)
    stages: Samples = defaultdict(list)
    commands()  # once for the page cache
    samples |= commands()
    gvproxy, qemu = await helpers.find_gvproxy(), await helpers.find_qemu(registry.host_arch())
    with tempfile.TemporaryDirectory(prefix="ovm-bench-") as directory:
        work = Path(directory)
        machine = await ovm.create_ovm(
            "bench",
            image=image,
            cpus=CPUS,
            memory_mib=MEMORY_MIB,
            target_dir=work / "target",
            log_dir=work / "log",
            ssh_key_dir=work / "ssh",
            socket_dir=work / "socket",
        )
        accelerator = ""
        for run in range(runs + 1):
            counted = run > 0  # the first start formats the data disk
            progress(f"run {run} of {runs}")
            by_hand_ms = await asyncio.to_thread(by_hand, image, work / "by-hand", gvproxy, qemu, accelerator)
            one: dict[str, float] = {"start": await timed(machine.start())}
            info = machine.info
            accelerator = info.accelerator
            one |= await a_life(machine)
            one["stop"] = await timed(machine.stop())
            if counted:
                samples["by hand: start"].append(by_hand_ms)
                for name, ms in one.items():
                    samples[f"ovm: {name}"].append(ms)
                for stage in info.timings:
                    stages[stage.name].append(stage.ms)
    progress("")
    return {
        "machine": describe(image, gvproxy, qemu, accelerator),
        "runs": runs,
        "milliseconds": {name: summary(values) for name, values in samples.items()},
        "stages": {name: summary(values) for name, values in stages.items()},
        "ratio": statistics.median(samples["ovm: start"]) / statistics.median(samples["by hand: start"]),
    }


async def a_life(machine: ovm.OVM) -> dict[str, float]:
    """What a running machine is asked for."""
    pause = await timed(machine.vm_pause())
    resume = await timed(machine.vm_resume())
    clock = await machine.clocksync()
    return {"pause": pause, "resume, clock set": resume, "clock offset left": abs(clock.offset_after_s) * 1000}


def by_hand(image: Path, work: Path, gvproxy: helpers.Helper, qemu: helpers.Helper, accelerator: str) -> float:
    environment = os.environ | {
        "GVPROXY": os.fspath(gvproxy.path),
        "QEMU": os.fspath(qemu.path),
        "CPUS": str(CPUS),
        "MEMORY": str(MEMORY_MIB),
    }
    if accelerator == "kvm":
        environment["ACCEL"] = "kvm"
    done = subprocess.run(
        [BY_HAND, image, work, "once"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"scripts/boot-by-hand failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.split()[-1])


def commands() -> Samples:
    """Starts of Python that people wait for."""
    bin_dir = Path(sys.executable).parent
    lines = {
        "python, nothing imported": [sys.executable, "-c", "pass"],
        "python, import ovm": [sys.executable, "-c", "import ovm"],
        "ovm --help": [os.fspath(bin_dir / "ovm"), "--help"],
    }
    samples: Samples = defaultdict(list)
    for _ in range(COMMAND_RUNS):
        for name, argv in lines.items():
            begun = time.perf_counter()
            subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
            samples[name].append((time.perf_counter() - begun) * 1000)
    return samples


async def timed(work: Awaitable[object]) -> float:
    begun = time.perf_counter()
    await work
    return (time.perf_counter() - begun) * 1000


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def describe(image: Path, gvproxy: helpers.Helper, qemu: helpers.Helper, accelerator: str) -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in read("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next((line.split()[1] for line in read("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory) / 1024**2, 1),
        "load_at_end": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": show_version(qemu.version),
        "gvproxy": show_version(gvproxy.version),
        "accelerator": accelerator,
        "image": registry.load_image(image).sha256,
        "guest": {"cpus": CPUS, "memory_mib": MEMORY_MIB},
    }


def read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def report(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpus']} x {machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}",
        f"Python {machine['python']}, QEMU {machine['qemu']} ({machine['accelerator']}), gvproxy {machine['gvproxy']}",
        f"guest: {CPUS} CPUs, {MEMORY_MIB} MiB; {result['runs']} starts on each side, alternating; milliseconds",
        "",
        f"{'':28}{'median':>9}{'least':>9}{'most':>9}",
    ]
    for table in ("milliseconds", "stages"):
        lines += [
            f"{name:28}" + "".join(f"{value[column]:9.1f}" for column in ("median", "least", "most"))
            for name, value in result[table].items()
        ]
        if table == "milliseconds":
            lines += ["", "stages of ovm's start, each when it was done"]
    lines += ["", f"ovm's start takes {result['ratio']:.2f} times as long as booting the same image by hand"]
    return "\n".join(lines)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
