"""The mesh and the batch that promise most images a second, of a few that are tried."""

from __future__ import annotations

import copy
from collections.abc import Callable

from m2m_jax.configuration import Config
from m2m_jax.core.errors import UserError
from m2m_jax.planning.compile import Machine, Plan, fsdp_sizes, make_plan
from m2m_jax.training.workload import Workload

MAX_SETS = 64  # a device: beyond it, more gains next to nothing


def search(
    config: Config, machine: Machine, workload: Workload, progress: Callable[[str, Plan], None]
) -> tuple[Plan, list[str]]:
    """Return the best plan that fits, and the overrides that make it; where nothing fits, the one that needs least.

    Tried are all devices as copies, shares over 8 of them, and shares over a whole slice; and of each 1, 2, 4, ... sets
    a device, until they do not fit, and then those between, until the most that fit is known. Every one is compiled,
    and `progress` told of it. All else is as in `config`; its batch is computed in as many parts as it says.

    Raises UserError where the config splits tensors or rows: those meshes are for what fits in no other way.
    """
    if config.mesh.tensor != 1 or config.mesh.context != 1:
        raise UserError("--search tries data and fsdp alone; leave config.mesh.tensor and config.mesh.context at 1")
    sizes = fsdp_sizes(len(machine.devices) // machine.slices)
    fitting: list[tuple[float, Plan, list[str]]] = []  # images a second, plan, overrides
    others: list[tuple[Plan, list[str]]] = []
    for fsdp in sorted({1, min(8, sizes[-1]), sizes[-1]}):
        fits, too_many = 0, None  # sets a device, times `accumulation`
        while (sets := _next(fits, too_many)) is not None:
            batch_size = sets * config.train.accumulation * len(machine.devices)
            overrides = _overrides(config, fsdp, batch_size, len(machine.devices))
            tried = copy.deepcopy(config)
            tried.update({"mesh.fsdp": fsdp, "mesh.data": -1} | overrides)
            plan, _ = make_plan(tried, machine, workload)
            shown = [f"--config.{name}={value}" for name, value in overrides.items()]
            progress(" ".join(shown), plan)
            if plan.work and plan.fits:
                fits = sets
                fitting.append((plan.work.images_per_second, plan, shown))
            else:
                too_many = sets
                others.append((plan, shown))
    if fitting:
        return max(fitting, key=lambda found: found[0])[1:]
    return min(others, key=lambda found: found[0].memory.needed)


def _overrides(config: Config, fsdp: int, batch_size: int, devices: int) -> dict[str, int]:
    found = {"mesh.fsdp": fsdp, "data.batch_size": batch_size}
    return found | ({"eval.batch_size": devices} if config.eval.batch_size % devices else {})


def _next(fits: int, too_many: int | None) -> int | None:
    """Return the number of sets to try between the most that fit and the fewest that do not; None: there is none."""
    sets = max(2 * fits, 1) if too_many is None else (fits + too_many) // 2
    return sets if fits < sets <= MAX_SETS else None
