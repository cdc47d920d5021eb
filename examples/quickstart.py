"""Boot a machine, run a container in it with an ordinary Docker client, stop the machine."""

import asyncio

import docker
from busybox_image import busybox_image

import ovm


def run_container(docker_host: str) -> str:
    engine = docker.DockerClient(base_url=docker_host)
    engine.api.import_image_from_data(busybox_image(), repository="localhost/busybox")
    return engine.containers.run("localhost/busybox", ["uname", "-srm"], remove=True).decode().strip()


async def main() -> None:
    async with await ovm.create_ovm() as machine:
        for stage in machine.info.timings:
            print(f"{stage.ms / 1000:6.2f} s  {stage.name}")
        # in a thread: the loop is the machine's, it opens the ports that containers publish
        said = await asyncio.to_thread(run_container, machine.info.docker_host)
        print("A container says:", said)
    print("The machine is stopped; its images and containers are kept. Next:")
    print("  .venv/bin/ovm start --foreground    a machine to use from another shell, with docker or podman")
    print("  .venv/bin/ovm doctor                what this host has, and what it lacks")


asyncio.run(main())
