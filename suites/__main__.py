"""Run the clients' own suites against a machine, and write what came of it to docs/clients.md."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ovm.sync
from ovm.image import GuestImage, load_image
from ovm.image.images import FILE_NAMES
from ovm.registry.images import default_image_dir, host_arch
from suites import podman_stand_in, registry, sources
from suites.outcome import Ran, outcomes, placed, reasons, stale, table
from suites.plan import LEFT_OUT, PODMANS_OWN, SUITES, TEST_S, Suite

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".cache" / "clients"
TOOLS = ROOT / ".cache" / "tools" / "usr" / "bin"
PAGE = ROOT / "docs" / "clients.md"
SHORT = Path("/tmp").resolve()  # noqa: S108  # names of sockets are short; the directory in it is private
NOTED = "run.json"
MINUTES = 40.0
SAID_MAX = 300
REPORT_S = 20.0
"""For pytest, to write its report when it is interrupted."""
_TO_THE_END = (0, 1, 5)
"""Statuses of pytest: all passed, some failed, none there."""
MEMORY_MIB = 2048
REGISTRIES = "/etc/containers/registries.conf.d/clients.conf"
ENGINE = "/etc/containers/containers.conf.d/clients.conf"
STOP_TIMEOUT_S = 1
"""Most containers of the suites ignore SIGTERM, and to remove one takes this long, even by force."""


def main() -> int:
    """Its status is 1 if a failure is ours, or if time ran out."""
    chosen = _arguments()
    wanted = [suite for suite in SUITES if not chosen.only or suite.client in chosen.only]
    if not chosen.recount:
        _measure(chosen, wanted)
    noted = json.loads((WORK / NOTED).read_text(encoding="utf-8"))
    ran = [_counted(suite, noted["ended"][suite.client]) for suite in wanted if suite.client in noted["ended"]]
    shown = "\n\n".join([table(ran, noted["versions"]), reasons(ran, PODMANS_OWN)])
    print(shown)
    for one in ran:
        for outcome in one.outcomes:
            if outcome.verdict == "ours":
                print(f"ours: {outcome.test}: {outcome.said[:SAID_MAX]}")
    for test in stale(ran, PODMANS_OWN):
        print(f"passes now, though the table says podman's own: {test}")
    if chosen.write:
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), shown), encoding="utf-8")
    return int(any(one.count("ours") or not one.ended for one in ran))


def _counted(suite: Suite, ended: bool) -> Ran:
    found = [
        outcomes(_report(suite, module), suite, Path(module).stem, LEFT_OUT, PODMANS_OWN) for module in suite.modules
    ]
    return Ran(suite, tuple(itertools.chain.from_iterable(found)), ended)


def _report(suite: Suite, module: str) -> Path:
    return WORK / f"{suite.client}-{Path(module).stem}.xml"


def _measure(chosen: argparse.Namespace, wanted: list[Suite]) -> None:
    """Leave a report of each module, and a note of what they are of."""
    until = time.monotonic() + chosen.minutes * 60
    image = load_image(chosen.image or default_image_dir(host_arch()))
    WORK.mkdir(parents=True, exist_ok=True)
    interpreter = sources.python(WORK)
    unpacked = {suite.client: sources.sdist(suite, WORK) for suite in wanted}
    for suite in wanted:
        for module in suite.modules:
            _report(suite, module).unlink(missing_ok=True)
    path = f"{TOOLS}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="ovm-", dir=SHORT) as directory:
        work = Path(directory)
        certificate = registry.certified(work)
        with (
            registry.serving(work, path, certificate) as port,
            ovm.sync.create_linux_ovm(_options(image, work, certificate)) as machine,
        ):
            _configure(machine, REGISTRIES, registry.guest_config(port))
            _configure(machine, ENGINE, f"[engine]\nstop_timeout = {STOP_TIMEOUT_S}\n")
            machine.exec(["systemctl", "try-restart", "podman.service"])
            surroundings = _surroundings(machine, work, image.versions.get("podman", ""), path)
            runner = Runner(interpreter, surroundings, work, until, chosen.select)
            ended = {suite.client: runner.run(suite, unpacked[suite.client]) for suite in wanted}
    noted = WORK / NOTED
    versions = ", ".join(f"{name} {image.versions[name]}" for name in ("podman", "crun", "netavark", "kernel"))
    guest = f"Debian {image.suite}: {versions}"
    before = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if before.get("versions") == guest:  # another suite's run with this very guest goes on counting
        ended = before["ended"] | ended
    noted.write_text(json.dumps({"versions": guest, "ended": ended}), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make clients CLIENTS_ARGS=", description=__doc__)
    parser.add_argument("--image", type=Path, help="directory of the guest image; by default the default one")
    parser.add_argument("--only", action="append", choices=[suite.client for suite in SUITES])
    parser.add_argument("-k", dest="select", default="", help="the tests that pytest's -k selects")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; %(default)s by default")
    parser.add_argument("--recount", action="store_true", help="run nothing: judge the reports of the last run again")
    parser.add_argument("--write", action="store_true", help="write the table to docs/clients.md")
    return parser.parse_args()


def _configure(machine: ovm.sync.OVM, path: str, text: str) -> None:
    for argv, given in ((["mkdir", "-p", os.path.dirname(path)], ""), (["tee", path], text)):  # noqa: PTH120  # the guest's
        done = machine.exec(argv, stdin=given.encode())
        if done.exit_status:
            raise SystemExit(f"{path} in the guest cannot be written: {done.stderr!r}")


def _options(image: GuestImage, work: Path, certificate: Path) -> dict[str, object]:
    """A machine of its own, of which nothing is left."""
    files = {name: image.directory / file for name, file in FILE_NAMES.items()}
    return {
        "origin_path": files,
        "versions": dict.fromkeys(files, "1"),
        **{f"{kind}_dir": work / kind for kind in ("target", "socket", "log", "ssh_key")},
        "memory_mib": MEMORY_MIB,
        "podman_tcp": False,
        "ca_certificates": [certificate],
    }


def _surroundings(machine: ovm.sync.OVM, work: Path, podman: str, path: str) -> dict[str, str]:
    """What the suites' processes find in their environment."""
    programs = work / "bin"
    programs.mkdir()
    stand_in = programs / "podman"
    stand_in.write_text(f"#!{sys.executable}\n{Path(podman_stand_in.__file__).read_text(encoding='utf-8')}")
    stand_in.chmod(0o755)
    return {
        "PATH": f"{programs}:{path}",
        "HOME": os.fspath(work),
        "LANG": "C.UTF-8",
        "DOCKER_HOST": machine.info.docker_host,
        "PODMAN_BINARY": os.fspath(stand_in),
        "OVM_PODMAN_VERSION": podman.partition("+")[0],
        "OVM_PODMAN_SOCKET": os.fspath(machine.info.podman_socket),
        "TESTCONTAINERS_RYUK_DISABLED": "true",
        "PYTHONPATH": os.fspath(ROOT / "suites"),
    }


@dataclass(frozen=True)
class Runner:
    """What all suites are run with."""

    interpreter: Path
    surroundings: dict[str, str]
    work: Path
    until: float
    """On the monotonic clock."""
    select: str

    def run(self, suite: Suite, unpacked: Path) -> bool:
        """Each module in a process of its own, so that one that hangs costs no other; false if time ran out."""
        ended = True
        for module in suite.modules:
            begun = time.monotonic()
            ended = begun < self.until and self._pytest(suite, module, unpacked, _report(suite, module)) and ended
            print(f"{module}: {time.monotonic() - begun:.0f} s", flush=True)
        return ended

    def _pytest(self, suite: Suite, module: str, unpacked: Path, report: Path) -> bool:
        """Whether it came to its end."""
        rows = {row.test.partition("::")[2]: row.why for row in LEFT_OUT if row.test.startswith(f"{suite.client}::")}
        settings = self.work / "pytest.ini"  # else that of a directory above would count
        settings.write_text("[pytest]\n")
        # fmt: off
        command: list[str | Path] = [
            self.interpreter, "-m", "pytest", "-q", "--tb=short", "-c", settings, f"--rootdir={unpacked}",
            "-p", "leave_out", "-p", "no:cacheprovider", f"--timeout={TEST_S}", f"--junitxml={report}",
            *(["-k", self.select] if self.select else []), *suite.options, module,
        ]
        # fmt: on
        with (WORK / f"{report.stem}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=unpacked,
                env=self.surroundings | {"OVM_LEFT_OUT": json.dumps(rows)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            for signal_sent in (signal.SIGINT, signal.SIGKILL, None):  # by the first it reports what it has so far
                try:
                    status = process.wait(max(REPORT_S, self.until - time.monotonic()))
                    break
                except subprocess.TimeoutExpired:
                    if signal_sent is not None:
                        process.send_signal(signal_sent)
        return status in _TO_THE_END


if __name__ == "__main__":
    sys.exit(main())
