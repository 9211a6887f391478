"""The plan of a job: a training step, sampling, or building image sets, on a machine that need not be there.

Example:
    planned = plan(config, Planning(topology="v5p:4x4x4"))
    planned.fits, planned.text, planned.values["memory"]
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from typing import Any

from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config
from m2m_jax.core import disk
from m2m_jax.core.chips import gpus_of
from m2m_jax.core.errors import UserError
from m2m_jax.planning.compile import Plan, get_machine, make_plan, prepare
from m2m_jax.planning.formula import plan_by_formula
from m2m_jax.planning.gpus import can_compile
from m2m_jax.planning.memory import gib
from m2m_jax.planning.options import Planning
from m2m_jax.planning.report import as_dict, as_text
from m2m_jax.planning.sampling import plan_sampling, sampling_as_text
from m2m_jax.planning.search import search
from m2m_jax.planning.set_building import build_as_text, plan_build
from m2m_jax.training.workload import NOT_READ, Workload, count_flops


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan of any job.

    Attributes:
      text: for people.
      values: all figures, as `json` can write them.
      fits: whether the devices have enough memory.
    """

    text: str
    values: dict[str, Any]
    fits: bool

    def json_text(self) -> str:
        """Return `values` as text."""
        return json.dumps(self.values, indent=1)


def plan(config: Config, options: Planning) -> Planned:
    """Plan a job of a config.

    Neither data nor weights are read; frozen models whose folders are not there are taken for Stable Diffusion's
    autoencoder and DINOv2. TPUs are compiled for, which needs libtpu and, of large models, minutes; so are GPUs where
    JAX has its plugin for CUDA, and else they are planned by formula. The plan says which.

    Raises:
      UserError: a bad config, no such topology, or no libtpu.
    """
    config = copy.deepcopy(config)
    config.data.path = config.data.path or NOT_READ
    validate(config)
    if config.mesh.slice == 1:
        config.mesh.slice = options.slices
    prepare()
    if options.job == "build_mis":
        build = plan_build(config, options.topology, options.slices, options.captions, options.mfu)
        values = dataclasses.asdict(build) | {"hours": build.hours}
        return Planned(build_as_text(build, options.topology), values, fits=True)
    gpus, compiles = gpus_of(options.topology), can_compile(options.topology.partition(":")[0])
    if gpus and not compiles and (options.job == "sample" or options.search or options.hlo):
        raise UserError(
            f"--topology={options.topology}: by formula one training step is planned; for --job=sample, --search and "
            "--hlo pip install -r requirements-cuda.txt, which compiles for GPUs without one (an l4 is not described)"
        )
    if gpus and (options.formula or not compiles):
        chip, per_node = gpus
        devices = per_node * options.slices
        workload = count_flops(config, devices, "gpu")
        return _planned(plan_by_formula(config, chip, devices, workload), options, workload, [])
    machine = get_machine(options.topology, options.slices)
    _say(f"compiling for {len(machine.devices)} devices; Stable Diffusion takes many minutes")
    if options.job == "sample":
        sampling = plan_sampling(config, machine, options.sets_per_device)
        return Planned(sampling_as_text(sampling, options.topology), dataclasses.asdict(sampling), sampling.fits)
    if options.search:
        config.mesh.update({"data": -1, "fsdp": 1})
        workload = count_flops(config, len(machine.devices), machine.platform)
        found, overrides = search(config, machine, workload, _say_progress)
        return _planned(found, options, workload, overrides)
    workload = count_flops(config, len(machine.devices), machine.platform)
    found, text = make_plan(config, machine, workload)
    if options.hlo:
        with disk.errors(f"--hlo={options.hlo}"):
            disk.write(options.hlo, text.encode())
    return _planned(found, options, workload, [])


def _planned(found: Plan, options: Planning, workload: Workload, overrides: list[str]) -> Planned:
    about = (found, options.topology, workload, overrides)
    return Planned(as_text(*about), as_dict(*about), found.fits)


def _say_progress(overrides: str, found: Plan) -> None:
    said = f"{found.work.images_per_second:.1f} images/s at most" if found.work and found.fits else "does not fit"
    _say(f"{overrides}: {gib(found.memory.needed)}, {said}; compiled in {found.compile_seconds:.0f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
