"""What the benchmark makes of a boot that goes wrong."""

from __future__ import annotations

from functools import partial

import tiny
import under
from bench import starts
from bench.samples import Recorder


@under.QEMU_ALONE  # which tells of resets
async def test_a_start_that_ovm_began_anew_is_made_again(machines: tiny.Machines) -> None:
    """It is not counted, and its machine is stopped."""
    machine, recorder = await machines("m"), Recorder()
    with (machine.ovm.options.target_dir / "data.img").open("r+b") as disk:
        disk.write(b"fall")  # which the guest takes away before it does it
    await recorder.unspoiled("m", partial(starts.boot, machine.ovm))
    assert recorder.spoiled == {"m": ["the guest's kernel crashed before its first message, and was started again"]}
    starting = ["Starting", "Stopped", "Starting", "Running", "Stopping", "Stopped", "Starting", "Running"]
    assert machine.transitions == starting
    await machine.ovm.stop()
    assert await machines.leftovers() == []
