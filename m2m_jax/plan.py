"""Plans training, and sampling: `python -m m2m_jax.plan --config configs/mis_sd21_self.py --topology v5p:4x4x4`.

Compiles the training step of a config for TPUs, on a machine that has none, and says whether it fits into their memory,
what takes it, how fast a step can be at most and what limits it. Needs `pip install -r requirements-tpu.txt`, and
minutes where the model is large; neither data nor weights. Folders of frozen models that are not there are taken for
Stable Diffusion's autoencoder and DINOv2. The evaluation, which keeps no gradients, is not compiled.

Exit code 0: it fits; 1: it does not, and what to change is said; 2: bad input.

    --job sample             what sampling takes, sets shared evenly by the devices: --sets_per_device
    --job build_mis          what it takes to build image sets from --captions with the config's U-Net, at --mfu of the
                             peak, by formula: chip-hours and storage
    --topology v5p:4x4x4     chips of v4, v5e, v5p, v6e or tpu7x, and how they are connected
                             a100, h100, h200, l4 and how many a node has: h100:8, planned by formula
    --slices 2               as many such slices or nodes, connected by the data-centre network
    --search                 tries meshes and batch sizes, and says which promises most images a second
    --hlo FILE               where to write the compiled step, as XLA prints it
    --json                   for machines
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.core import disk
from m2m_jax.core.chips import gpus_of
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import run_program
from m2m_jax.planning.compile import Plan, get_machine, make_plan, prepare
from m2m_jax.planning.formula import plan_by_formula
from m2m_jax.planning.memory import gib
from m2m_jax.planning.report import as_dict, as_text
from m2m_jax.planning.sampling import plan_sampling, sampling_as_text
from m2m_jax.planning.search import search
from m2m_jax.planning.set_building import build_as_text, plan_build
from m2m_jax.training.workload import NOT_READ, Workload, count_flops

CONFIG = define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips and how they are connected: v5p:4x4x4.", required=True)
SLICES = flags.DEFINE_integer("slices", 1, "How many of that topology, side by side.", lower_bound=1)
SEARCH = flags.DEFINE_bool("search", False, "Find the mesh and the batch size that promise most.")
JOB = flags.DEFINE_enum("job", "train", ["train", "sample", "build_mis"], "What is planned.")
SETS = flags.DEFINE_integer("sets_per_device", 1, "Of --job=sample: sets that a device samples at once.", lower_bound=1)
CAPTIONS = flags.DEFINE_integer("captions", 12_000_000, "Of --job=build_mis.", lower_bound=1)
MFU = flags.DEFINE_float("mfu", 0.3, "Of --job=build_mis: the share of the chips' peak that is assumed.")
HLO = flags.DEFINE_string("hlo", None, "File to write: the text of the compiled step.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv) -> int:
    config = CONFIG.value
    config.data.path = config.data.path or NOT_READ
    validate(config)
    if config.mesh.slice == 1:
        config.mesh.slice = SLICES.value
    prepare()
    if JOB.value == "build_mis":
        build = plan_build(config, TOPOLOGY.value, SLICES.value, CAPTIONS.value, MFU.value)
        as_json = json.dumps(dataclasses.asdict(build) | {"hours": build.hours}, indent=1)
        print(as_json if JSON.value else build_as_text(build, TOPOLOGY.value))
        return 0
    gpus, samples = gpus_of(TOPOLOGY.value), JOB.value == "sample"
    if samples and SEARCH.value:
        raise UserError("--search is for training; try values of --sets_per_device")
    if gpus and (samples or SEARCH.value):
        raise UserError(f"--topology={TOPOLOGY.value}: of GPUs, one training step is planned, by formula")
    if HLO.value and (gpus or samples or SEARCH.value):
        raise UserError("--hlo is of one training step that is compiled: for TPUs, without --search")
    if gpus:
        chip, per_node = gpus
        devices = per_node * SLICES.value
        workload = count_flops(config, devices, "gpu")
        return _report(plan_by_formula(config, chip, devices, workload), workload, [])
    machine = get_machine(TOPOLOGY.value, SLICES.value)
    print(f"compiling for {len(machine.devices)} devices; Stable Diffusion takes many minutes", file=sys.stderr)
    if samples:
        sampling = plan_sampling(config, machine, SETS.value)
        as_json = json.dumps(dataclasses.asdict(sampling), indent=1)
        print(as_json if JSON.value else sampling_as_text(sampling, TOPOLOGY.value))
        return 0 if sampling.fits else 1
    if SEARCH.value:
        config.mesh.update({"data": -1, "fsdp": 1})
    workload = count_flops(config, len(machine.devices))

    overrides = []
    if SEARCH.value:
        plan, overrides = search(config, machine, workload, _print_progress)
    else:
        plan, text = make_plan(config, machine, workload)
        if HLO.value:
            with disk.errors(f"--hlo={HLO.value}"):
                disk.write(Path(HLO.value), text.encode())
    return _report(plan, workload, overrides)


def _report(plan: Plan, workload: Workload, overrides: list[str]) -> int:
    if JSON.value:
        print(json.dumps(as_dict(plan, TOPOLOGY.value, workload, overrides), indent=1))
    else:
        print(as_text(plan, TOPOLOGY.value, workload, overrides))
    return 0 if plan.fits else 1


def _print_progress(overrides: str, plan: Plan) -> None:
    said = f"{plan.work.images_per_second:.1f} images/s at most" if plan.fits else "does not fit"
    print(
        f"{overrides}: {gib(plan.memory.needed)}, {said}; compiled in {plan.compile_seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    run_program(main, CONFIG.take)
