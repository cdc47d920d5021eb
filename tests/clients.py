"""Clients of container engines that nobody here wrote, each made to do the same nine things."""

from __future__ import annotations

import abc
import contextlib
import gc
import json
import os
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import under
from full import BUSYBOX_IMAGE
from ovm.network.host_ports import free_port

TIMEOUT_S = 180
SOON_S = 2
"""To the end of what is asked of events: podman stops there, even if it has not yet read what was before."""
SERVE = "trap exit TERM; echo served > /tmp/hello; httpd -f -p 80 -h /tmp & echo serving; wait"
"""Ends at once when told to, which a first process does only if it says so."""
ASK_OTHER = """\
for i in 1 2 3 4 5 6 7 8 9; do
    ip=$(getent hosts other | cut -d' ' -f1) && busybox wget -q -O - "http://$ip/hello" && exit
    sleep 1
done
exit 1
"""
"""A static busybox cannot look names up."""
DOCKERFILE = f"FROM {BUSYBOX_IMAGE}\nCOPY greeting /greeting\nRUN cat /greeting > /copied\nCMD cat /copied\n"
GREETING = "built here"


def built_from(directory: Path) -> Path:
    """A directory to build an image from, which prints ``GREETING``."""
    directory.mkdir(exist_ok=True)
    (directory / "greeting").write_text(f"{GREETING}\n")
    (directory / "Dockerfile").write_text(DOCKERFILE)
    return directory


@contextlib.contextmanager
def opened(kind: str, docker_host: str, home: Path, *more: Path) -> Iterator[Client]:
    """The client of that name. What its library forgets to close is collected here, not in some later test."""
    client: Client = globals()[kind](docker_host, home, *more)
    try:
        yield client
    finally:
        if isinstance(client, DockerPy):
            client.client.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


class Client(abc.ABC):
    """One client; what it makes is called ``name``."""

    def __init__(self, docker_host: str, home: Path) -> None:
        self.docker_host = docker_host
        self.home = home
        self.name = f"by-{type(self).__name__.lower()}"

    @abc.abstractmethod
    def run(self, *command: str) -> str:
        """What a container prints that runs ``command`` and is removed then."""

    @abc.abstractmethod
    def serve(self, port: int) -> contextlib.AbstractContextManager[str]:
        """A container that serves on its port 80, which is ``port`` of the host; yields how the client calls it."""

    @abc.abstractmethod
    def logs(self, container: str) -> str: ...

    @abc.abstractmethod
    def exec(self, container: str, *command: str) -> str: ...

    @abc.abstractmethod
    def build(self, directory: Path) -> str:
        """What a container of the image prints that was built there."""

    @abc.abstractmethod
    def keep(self, text: str) -> str:
        """What a second container finds in a volume that a first one has written ``text`` to."""

    @abc.abstractmethod
    def meet(self) -> str:
        """What a container gets that asks another by its name, in a network of their own."""

    @abc.abstractmethod
    def events(self, container: str) -> set[str]:
        """What happened to it so far."""

    @abc.abstractmethod
    def attach(self, given: bytes) -> bytes:
        """What ``cat`` in a container answers that reads ``given``, and then the end of its input."""


class _Command(Client):
    """A program with docker's own command line."""

    argv: tuple[str, ...] = ()

    def __call__(
        self, *arguments: str | Path, given: bytes = b"", check: bool = True, more: Mapping[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            [*self.argv, *map(str, arguments)],
            input=given,
            capture_output=True,
            check=False,
            timeout=TIMEOUT_S,
            env=self.environment() | dict(more or {}),
            cwd=self.home,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        assert done.returncode == 0 or not check, f"{self.argv[0]} {' '.join(map(str, arguments))}: {err or out}"
        return out.rstrip("\n")

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_RUNTIME_DIR": str(self.home),
            "TMPDIR": str(self.home),
            "DOCKER_HOST": self.docker_host,
            "DOCKER_BUILDKIT": "0",
        }

    def run(self, *command: str) -> str:
        return self("run", "--rm", BUSYBOX_IMAGE, *command)

    @contextlib.contextmanager
    def serve(self, port: int) -> Iterator[str]:
        self("run", "-d", "--name", self.name, "-p", f"{port}:80", BUSYBOX_IMAGE, "sh", "-c", SERVE)
        try:
            yield self.name
        finally:
            self("rm", "-f", self.name)

    def logs(self, container: str) -> str:
        return self("logs", container)

    def exec(self, container: str, *command: str) -> str:
        return self("exec", container, *command)

    def build(self, directory: Path) -> str:
        self("build", "-t", f"localhost/{self.name}", directory)
        return self("run", "--rm", f"localhost/{self.name}")

    def keep(self, text: str) -> str:
        self("volume", "create", self.name)
        try:
            self("run", "--rm", "-v", f"{self.name}:/data", BUSYBOX_IMAGE, "sh", "-c", f"echo {text} > /data/it")
            return self("run", "--rm", "-v", f"{self.name}:/data", BUSYBOX_IMAGE, "cat", "/data/it")
        finally:
            self("volume", "rm", self.name)

    def meet(self) -> str:
        self("network", "create", self.name)
        try:
            self("run", "-d", "--name", "other", "--network", self.name, BUSYBOX_IMAGE, "sh", "-c", SERVE)
            return self("run", "--rm", "--network", self.name, BUSYBOX_IMAGE, "sh", "-c", ASK_OTHER)
        finally:
            self("rm", "-f", "other")
            self("network", "rm", self.name)

    def events(self, container: str) -> set[str]:
        until = str(int(time.time()) + SOON_S)
        told = self(
            "events", "--since", "10m", "--until", until, "--filter", f"container={container}", "--format", "{{json .}}"
        )
        return {_what(line) for line in told.splitlines()}

    def attach(self, given: bytes) -> bytes:
        return self("run", "--rm", "-i", BUSYBOX_IMAGE, "cat", given=given).encode()


class Docker(_Command):
    """The docker command."""

    def __init__(self, docker_host: str, home: Path) -> None:
        super().__init__(docker_host, home)
        self.argv = (under.program("docker"),)


class Podman(_Command):
    """``podman --remote``."""

    def __init__(self, docker_host: str, home: Path) -> None:
        super().__init__(docker_host, home)
        self.argv = (under.program("podman"), "--remote", "--url", docker_host)


def prints_null(client: Client) -> bool:
    """Whether it is a podman 4, which shows null for most events of a podman 5 (containers/podman#28325)."""
    return isinstance(client, Podman) and client("version", "--format", "{{.Client.Version}}").startswith("4.")


class Compose(_Command):
    """docker compose v2, which does all of it by a file."""

    def __init__(self, docker_host: str, home: Path, program: Path) -> None:
        super().__init__(docker_host, home)
        self.argv = (str(program), "--project-name", self.name)

    @contextlib.contextmanager
    def project(self, **services: dict[str, Any]) -> Iterator[str]:
        """A file of these services, and volumes and networks of the names they use; nothing of it is left."""
        described: dict[str, Any] = {"services": services}
        for kind in ("volumes", "networks"):
            named = {item.partition(":")[0] for service in services.values() for item in service.get(kind, ())}
            described |= {kind: {name: {} for name in named}} if named else {}
        (self.home / "compose.yaml").write_text(json.dumps(described))  # JSON is YAML
        try:
            yield self.name
        finally:
            self("down", "--volumes", "--timeout", "1")

    def once(self, service: str, *command: str, given: bytes = b"") -> str:
        return self("run", "--rm", "--no-TTY", service, *command, given=given)

    def run(self, *command: str) -> str:
        with self.project(one={"image": BUSYBOX_IMAGE}):
            return self.once("one", *command)

    @contextlib.contextmanager
    def serve(self, port: int) -> Iterator[str]:
        web = {"image": BUSYBOX_IMAGE, "command": ["sh", "-c", SERVE], "ports": [f"{port}:80"]}
        with self.project(web=web):
            self("up", "--detach")
            yield "web"

    def logs(self, container: str) -> str:
        return self("logs", "--no-log-prefix", container)

    def exec(self, container: str, *command: str) -> str:
        return self("exec", "--no-TTY", container, *command)

    def build(self, directory: Path) -> str:
        with self.project(built={"build": str(directory)}):
            self("build")
            return self.once("built")

    def keep(self, text: str) -> str:
        with self.project(one={"image": BUSYBOX_IMAGE, "volumes": ["kept:/data"]}):
            self.once("one", "sh", "-c", f"echo {text} > /data/it")
            return self.once("one", "cat", "/data/it")

    def meet(self) -> str:
        other = {"image": BUSYBOX_IMAGE, "command": ["sh", "-c", SERVE], "networks": ["theirs"]}
        with self.project(other=other, one={"image": BUSYBOX_IMAGE, "networks": ["theirs"], "profiles": ["asked"]}):
            self("up", "--detach")
            return self.once("one", "sh", "-c", ASK_OTHER)

    def events(self, container: str) -> set[str]:
        until = str(int(time.time()) + SOON_S)
        # the end of what it is told, which was asked for, is an error to it
        told = self("events", "--json", "--since", "10m", "--until", until, container, check=False)
        return {_what(line) for line in told.splitlines()}

    def attach(self, given: bytes) -> bytes:
        with self.project(one={"image": BUSYBOX_IMAGE, "stdin_open": True}):
            return self.once("one", "cat", given=given).encode()


def _what(line: str) -> str:
    """What an event is about, whichever way its client calls that."""
    event = json.loads(line) or {}
    return next((str(event[key]) for key in ("Action", "action", "Status", "status") if event.get(key)), line)


class DockerPy(Client):
    """docker-py, which testcontainers and many others are made of."""

    def __init__(self, docker_host: str, home: Path) -> None:
        import docker

        super().__init__(docker_host, home)
        self.client: Any = docker.DockerClient(base_url=docker_host, timeout=TIMEOUT_S)

    def run(self, *command: str) -> str:
        return _text(self.client.containers.run(BUSYBOX_IMAGE, list(command), remove=True))

    @contextlib.contextmanager
    def serve(self, port: int) -> Iterator[str]:
        made = self.client.containers.run(
            BUSYBOX_IMAGE, ["sh", "-c", SERVE], name=self.name, ports={"80/tcp": port}, detach=True
        )
        try:
            yield self.name
        finally:
            made.remove(force=True)

    def logs(self, container: str) -> str:
        return _text(self.client.containers.get(container).logs())

    def exec(self, container: str, *command: str) -> str:
        status, out = self.client.containers.get(container).exec_run(list(command))
        assert status == 0, out
        return _text(out)

    def build(self, directory: Path) -> str:
        image, _ = self.client.images.build(path=str(directory), tag=f"localhost/{self.name}")
        return _text(self.client.containers.run(image.id, remove=True))

    def keep(self, text: str) -> str:
        volume = self.client.volumes.create(self.name)
        mounted = {self.name: {"bind": "/data", "mode": "rw"}}
        try:
            write = ["sh", "-c", f"echo {text} > /data/it"]
            self.client.containers.run(BUSYBOX_IMAGE, write, volumes=mounted, remove=True)
            return _text(self.client.containers.run(BUSYBOX_IMAGE, ["cat", "/data/it"], volumes=mounted, remove=True))
        finally:
            volume.remove()

    def meet(self) -> str:
        network = self.client.networks.create(self.name)
        try:
            other = self.client.containers.run(
                BUSYBOX_IMAGE, ["sh", "-c", SERVE], name="other", network=self.name, detach=True
            )
            try:
                ask = ["sh", "-c", ASK_OTHER]
                return _text(self.client.containers.run(BUSYBOX_IMAGE, ask, network=self.name, remove=True))
            finally:
                other.remove(force=True)
        finally:
            network.remove()

    def events(self, container: str) -> set[str]:
        now = int(time.time())
        told = self.client.events(since=now - 600, until=now + SOON_S, filters={"container": container})
        return {_what(line) for part in told for line in part.splitlines()}

    def attach(self, given: bytes) -> bytes:
        made = self.client.containers.create(BUSYBOX_IMAGE, ["cat"], stdin_open=True)
        made_socket = made.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1})
        try:
            made.start()
            wire = made_socket._sock
            wire.sendall(given)
            wire.shutdown(socket.SHUT_WR)
            made.wait(timeout=TIMEOUT_S)
            return b"".join(_frames(made_socket))
        finally:
            made_socket.close()
            made.remove(force=True)


def _frames(stream: Any) -> Iterator[bytes]:
    """The contents of docker's frames: eight bytes, the last four of which say how much follows."""
    while len(head := stream.read(8)) == 8:
        yield stream.read(int.from_bytes(head[4:], "big"))


def _text(told: Any) -> str:
    content = told if isinstance(told, bytes) else b"".join(told)
    return content.decode().rstrip("\n")


class PodmanPy(DockerPy):
    """podman-py, in most of its words a twin of docker-py."""

    def __init__(self, docker_host: str, home: Path) -> None:
        import podman

        Client.__init__(self, docker_host, home)
        self.client = podman.PodmanClient(base_url=docker_host, timeout=TIMEOUT_S)

    def build(self, directory: Path) -> str:
        image, _ = self.client.images.build(path=str(directory), tag=f"localhost/{self.name}", dockerfile="Dockerfile")
        return _text(self.client.containers.run(image.id, remove=True))

    def exec(self, container: str, *command: str) -> str:
        status, (out, _) = self.client.containers.get(container).exec_run(list(command), demux=True)
        assert status == 0, out
        return _text(out)

    def meet(self) -> str:
        network = self.client.networks.create(self.name, dns_enabled=True)  # not, unless asked for
        there = {"network_mode": "bridge", "networks": {self.name: {}}}
        try:
            other = self.client.containers.run(BUSYBOX_IMAGE, ["sh", "-c", SERVE], name="other", detach=True, **there)
            try:
                return _text(self.client.containers.run(BUSYBOX_IMAGE, ["sh", "-c", ASK_OTHER], remove=True, **there))
            finally:
                other.remove(force=True)
        finally:
            network.remove()


class Testcontainers(DockerPy):
    """testcontainers-python, where it has words of its own; its ryuk's image is not to be had in the tests."""

    def _container(self, *command: str, image: str = BUSYBOX_IMAGE) -> Any:
        from testcontainers.core.container import DockerContainer

        made = DockerContainer(image)
        return made.with_command(list(command)) if command else made

    def _said(self, container: Any) -> str:
        """What it has printed once it has ended."""
        with container:
            container.get_wrapped_container().wait(timeout=TIMEOUT_S)
            return _text(container.get_logs()[0])

    def run(self, *command: str) -> str:
        return self._said(self._container(*command))

    @contextlib.contextmanager
    def serve(self, port: int) -> Iterator[str]:
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        web = self._container("sh", "-c", SERVE).with_bind_ports(80, port).with_name(self.name)
        with web.waiting_for(LogMessageWaitStrategy("serving")):
            assert web.get_exposed_port(80) == port
            yield self.name

    def build(self, directory: Path) -> str:
        from testcontainers.core.image import DockerImage

        with DockerImage(path=directory) as image:
            return self._said(self._container(image=str(image)))

    def keep(self, text: str) -> str:
        mounted = ("kept-by-testcontainers", "/data", "rw")
        try:
            self._said(self._container("sh", "-c", f"echo {text} > /data/it").with_volume_mapping(*mounted))
            return self._said(self._container("cat", "/data/it").with_volume_mapping(*mounted))
        finally:
            self.client.volumes.get(mounted[0]).remove()

    def meet(self) -> str:
        from testcontainers.core.network import Network

        with Network() as network:
            other = self._container("sh", "-c", SERVE).with_network(network).with_network_aliases("other")
            with other:
                return self._said(self._container("sh", "-c", ASK_OTHER).with_network(network))


def fetched(port: int, words: str) -> None:
    """Until a web server on the host's loopback says ``words``."""
    import urllib.request

    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port}/hello", timeout=10
            ) as answer:
                assert answer.read().decode().strip() == words
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def check(client: Client, tmp_path: Path) -> None:
    """The nine things, or those that it can do."""
    assert client.run("echo", "hello from a container") == "hello from a container"
    port = free_port("tcp", "127.0.0.1", 0)
    assert port is not None
    with client.serve(port) as container:
        fetched(port, "served")
        assert "serving" in client.logs(container)
        assert client.exec(container, "cat", "/tmp/hello") == "served"
        if not prints_null(client):
            assert client.events(container) >= {"create", "start"}
    assert client.build(built_from(tmp_path / "context")) == GREETING
    assert client.keep("precious") == "precious"
    assert client.meet() == "served"
    if not isinstance(client, PodmanPy):
        assert client.attach(b"through stdin\n").rstrip() == b"through stdin"
