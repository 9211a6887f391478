"""The mesh and the batch that promise most images a second, of a few that are tried."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from m2m_jax.errors import UserError
from m2m_jax.planning.compile import Machine, Plan, fsdp_sizes, make_plan
from m2m_jax.planning.workload import Workload

MAX_SETS = 64  # a device: beyond it, more gains next to nothing


def search(
    config: ConfigDict, machine: Machine, workload: Workload, progress: Callable[[str, Plan], None]
) -> tuple[Plan, list[str]] | None:
    """The best plan that fits, and the overrides that make it; None where nothing fits.

    Tried are all devices as copies, shares over 8 of them, and shares over a whole slice; and of each 1, 2, 4, ... sets
    a device, until they do not fit. Every one is compiled, and `progress` told of it. All else is as in `config`, whose
    batch is computed at once or in as many parts as it says.

    Raises UserError where the config splits tensors or rows: those meshes are for what fits in no other way.
    """
    if config.mesh.tensor != 1 or config.mesh.context != 1:
        raise UserError("--search tries data and fsdp alone; leave config.mesh.tensor and config.mesh.context at 1")
    sizes = fsdp_sizes(len(machine.devices) // machine.slices)
    best = None
    for fsdp in sorted({1, min(8, sizes[-1]), sizes[-1]}):
        sets = config.train.accumulation
        while sets <= MAX_SETS * config.train.accumulation:
            tried = ConfigDict(config.to_dict())
            tried.mesh.update({"fsdp": fsdp, "data": -1})
            tried.data.batch_size = sets * len(machine.devices)
            plan, _ = make_plan(tried, machine, workload)
            overrides = [f"--config.mesh.fsdp={fsdp}", f"--config.data.batch_size={tried.data.batch_size}"]
            progress(" ".join(overrides), plan)
            if not plan.fits:
                break
            if best is None or plan.work.images_per_second > best[0].work.images_per_second:
                best = plan, overrides
            sets *= 2
    return best
