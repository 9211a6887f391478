"""The train step, compiled for TPUs and GPUs that are not there: what it would need and do."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from m2m_jax.configuration import Config
from m2m_jax.core import runtime
from m2m_jax.core.chips import Chip, chip_of, gpus_of
from m2m_jax.core.errors import UserError
from m2m_jax.planning import hlo, memory
from m2m_jax.planning.collectives import Collective, collectives
from m2m_jax.planning.gpus import gpu_devices
from m2m_jax.planning.hbm import hbm_bytes
from m2m_jax.planning.memory import Memory
from m2m_jax.planning.roofline import Roofline, mfu, roofline
from m2m_jax.training import sharding
from m2m_jax.training.attention_flops import AttentionFlops
from m2m_jax.training.setup import set_up
from m2m_jax.training.workload import Workload, batch_shapes, kept_by_remat, make_task, not_read

# libtpu looks for a TPU, for the machine's name in the cloud and for other processes with it, unless it is told not to.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GPU_NOTE = "compiled as JAX does where no GPU is: nothing is autotuned; FLOPs are the model's, and those computed again"
# Products in a kernel of attention. The backward pass computes two of the five that it needs in both of its kernels.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that need not be there.

    Attributes:
      topology: as the user names it.
      chip: what one device has of a chip.
      slices: of TPUs, or nodes of GPUs.
      platform: "tpu" or "gpu".
    """

    topology: str
    devices: tuple[jax.Device, ...]
    chip: Chip
    slices: int
    platform: str = "tpu"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
      flops: of one device, by XLA; the products of attention in kernels are added.
      hbm_bytes: of one device, read and written.
      collectives: see `Collective`.
      kernels: calls of kernels of attention in the program.
      launches: what a GPU launches, by kind, as `hlo.kinds_of_kernels` counts it; of TPUs, and by formula, nothing.
      times: see `Roofline`.
      images_per_second: of all devices, were the step as fast as `times` says.
      mfu: likewise.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    kernels: int
    launches: dict[str, int]
    times: Roofline
    images_per_second: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine.

    Attributes:
      sets_per_device: of a batch, whether computed at once or in parts.
      work: None where the step is too large to be compiled.
      advice: what to change where it does not fit.
      notes: what was assumed, and what else a run would trip over.
      compile_seconds: None where it was planned by formula.
    """

    mesh: dict[str, int]
    batch_size: int
    sets_per_device: int
    memory: Memory
    work: Work | None
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    compile_seconds: float | None

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        return self.work is not None and self.memory.fits


def prepare() -> None:
    """Keep JAX from looking for accelerators, and set what a run would set; call before JAX is asked for devices."""
    runtime.set_gpu_flags()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # JAX itself may have read the environment before


def get_machine(topology: str, slices: int = 1) -> Machine:
    """Return the devices of some slices of a topology such as "v5p:4x4x4", or of some nodes of "h100:8".

    Raises:
      UserError: there is no such topology, or no libtpu, or of GPUs nothing that compiles for them.
    """
    if gpus := gpus_of(topology):
        of_gpu, per_node = gpus
        found = gpu_devices(topology.partition(":")[0], per_node, slices)
        return Machine(topology, tuple(found), of_gpu, slices, "gpu")
    chip = chip_of(topology)
    options = dict(chip.options) | ({"num_slices": slices} if slices > 1 else {})
    try:
        devices: list[Any] = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                "planning needs libtpu, which compiles for TPUs: pip install -r requirements-tpu.txt"
            ) from error
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    chips = {(getattr(device, "slice_index", 0), *device.coords) for device in devices}
    return Machine(topology, tuple(devices), chip.share(len(devices) // len(chips)), slices)


def make_plan(config: Config, machine: Machine, workload: Workload) -> tuple[Plan, str]:
    """Compile the step of `config`, which takes minutes where the model is large.

    Returns the plan, and the compiled program's text: nothing where it is too large to be compiled. Raises UserError
    for a mesh or a batch size that does not go with the machine.
    """
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    parts, batch_size = config.train.accumulation, config.data.batch_size
    sharding.check_batch_size(batch_size, mesh, "data.batch_size", parts=parts)
    task, notes = make_task(config, machine.platform)
    if machine.platform == "gpu":
        notes.append(GPU_NOTE)
    try:
        sharding.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")
    except UserError as error:
        notes.append(f"m2m_jax.train will refuse this: {error}")

    setup = set_up(task, config, mesh)
    frozen = jax.tree.map(lambda x: _placed(x, sharding.replicated(mesh)), task.frozen)
    batch = {
        name: _placed(x, sharding.batch_sharding(mesh, name))
        for name, x in batch_shapes(config, task, batch_size).items()
    }
    started = time.monotonic()
    compiled: Any = None
    text = message = ""
    try:
        compiled = setup.step.lower(setup.state, frozen, batch).compile()
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
    sizes = memory.parse_out_of_memory(message)
    if compiled is None and sizes is None:
        raise UserError(f"XLA does not compile this step for {machine.topology}: {message[:2000]}")
    seconds = time.monotonic() - started

    peak, limit = sizes or (peak_bytes(compiled.memory_analysis(), machine.platform), machine.chip.hbm)
    needs = Memory(
        **memory.state_bytes(setup.state),
        frozen=memory.bytes_per_device(frozen),
        batch=memory.bytes_per_device(batch),
        peak=peak,
        beside=memory.bytes_per_device(not_read(config, frozen)),
        limit=limit,
    )
    shares = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    advice = []
    if compiled is None or not needs.fits:
        at_fsdp = state_at_fsdp(config, task, len(machine.devices), machine.slices)
        # Two devices for one, where there are two.
        context = 2 * mesh.shape["context"] if shares > 1 else None
        sets, kept = batch_size // shares, kept_by_remat(config)
        advice = memory.advice(needs, at_fsdp, mesh.shape["fsdp"], parts, sets, kept, context)
    plan = Plan(
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        sets_per_device=batch_size // shares,
        memory=needs,
        work=_work(text, compiled.cost_analysis(), config, machine, workload, mesh) if compiled else None,
        advice=tuple(advice),
        notes=tuple(notes),
        compile_seconds=seconds,
    )
    return plan, text


def _placed(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def peak_bytes(sizes: Any, platform: str) -> float:
    """Return the bytes that a program needs, arguments and results included."""
    if platform == "tpu":
        return sizes.peak_memory_in_bytes
    # Of GPUs buffers are assigned once, and the temporaries are all there are at any time.
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def _work(text: str, cost: Any, config: Config, machine: Machine, workload: Workload, mesh: jax.sharding.Mesh) -> Work:
    program = hlo.parse(text)
    sent = collectives(program, [getattr(d, "slice_index", 0) for d in mesh.devices.flat])
    num_devices, moved = len(machine.devices), hbm_bytes(program)
    launches: dict[str, int] = {}
    if machine.platform == "gpu":  # XLA counts no FLOPs of what cuDNN and cuBLAS do, which is nearly all
        launches = hlo.kinds_of_kernels(text)
        kernels = launches["attentions"]
        flops = workload.model_flops * workload.again * config.data.batch_size / num_devices
    else:
        calls = hlo.kernel_calls(text)
        kernels = sum(calls.values())
        # XLA counts what a loop does once, and accumulation is a loop around nearly all there is.
        flops = cost["flops"] * config.train.accumulation
        flops += kernel_flops(calls, workload.attention) * config.data.batch_size / num_devices
    times = roofline(machine.chip, flops, moved, sum(c.ici_bytes for c in sent), sum(c.dcn_bytes for c in sent))
    batch_size = config.data.batch_size
    return Work(
        flops=flops,
        hbm_bytes=moved,
        collectives=tuple(sent),
        kernels=kernels,
        launches=launches,
        times=times,
        images_per_second=batch_size * config.data.images_per_set / times.step_seconds,
        mfu=mfu(workload.model_flops * batch_size, times.step_seconds, num_devices, machine.chip),
    )


def kernel_flops(calls: dict[str, int], attention: AttentionFlops) -> float:
    """Return the FLOPs of all kernels for one set: forward, backward and again, as often as each is called.

    calls: as from `hlo.kernel_calls`.
    """
    if not any(calls.values()):
        return 0.0
    products = sum(PRODUCTS[kind] * count for kind, count in calls.items())
    return (attention.executed + attention.within_images) * products / (PRODUCTS["fwd"] * attention.calls)


def state_at_fsdp(config: Config, task, devices: int, slices: int) -> dict[int, int]:
    """Return {config.mesh.fsdp: bytes a device of the state}, for powers of two that divide a slice's devices."""
    others = config.mesh.tensor * config.mesh.context if min(config.mesh.tensor, config.mesh.context) > 0 else 0
    found = {}
    for fsdp in fsdp_sizes(devices // slices // (others or 1)) if others else ():
        other = copy.deepcopy(config)
        other.mesh.update({"fsdp": fsdp, "data": -1})
        mesh = sharding.abstract_mesh(other.mesh, devices)
        found[fsdp] = sum(memory.state_bytes(set_up(task, other, mesh).state).values())
    return found


def fsdp_sizes(devices: int) -> list[int]:
    """Return the powers of two that divide a number."""
    return [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
