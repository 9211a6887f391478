"""The plan of a training step on GPUs, by formula: for where XLA has no compiler for CUDA, or no minutes to spare.

What a step keeps for its backward pass is counted exactly, before XLA optimises anything: fusions keep less of it, and
convolutions take room for themselves. FLOPs are counted in the program, with what `model.remat` computes again.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from m2m_jax.attention.backends import resolve
from m2m_jax.configuration import Config
from m2m_jax.core.chips import Chip
from m2m_jax.core.errors import UserError
from m2m_jax.planning import memory
from m2m_jax.planning.collectives import Collective, wire_bytes
from m2m_jax.planning.compile import Plan, Work, state_at_fsdp
from m2m_jax.planning.memory import Memory
from m2m_jax.planning.roofline import mfu, roofline
from m2m_jax.training import sharding
from m2m_jax.training.setup import set_up
from m2m_jax.training.workload import Workload, batch_shapes, kept_by_remat, kept_bytes, make_task, not_read

NOTE = (
    "by formula, nothing was compiled: activations before fusion and without workspace, HBM and network at least what "
    "state, gradients and activations take"
)


def plan_by_formula(config: Config, chip: Chip, devices: int, workload: Workload) -> Plan:
    """Return a plan like that of `compile.make_plan`, with `NOTE` among its notes.

    Args:
      devices: of all nodes together, of which there are config.mesh.slice.

    Raises:
      UserError: the config splits tensors or rows; or does not go with so many devices.
    """
    config = copy.deepcopy(config)
    mesh = sharding.abstract_mesh(config.mesh, devices)
    if mesh.shape["tensor"] * mesh.shape["context"] > 1:
        raise UserError("GPUs are planned by formula, which knows config.mesh.data, .fsdp and .slice alone")
    parts, batch_size = config.train.accumulation, config.data.batch_size
    sharding.check_batch_size(batch_size, mesh, "data.batch_size", parts=parts)
    sets = batch_size // devices

    # The kernels of both platforms keep the same: queries, keys, values, outputs and a number a row.
    if resolve(config.model.attention_backend, "gpu", config.model.dtype) == "prefix_cudnn":
        config.model.attention_backend = "splash"
    task, notes = make_task(config)
    setup = set_up(task, config, mesh)
    state_bytes, params = memory.state_bytes(setup.state), setup.state.params
    trained = setup.trained.of(params)
    trained_bytes = memory.bytes_per_device(trained)
    kept_of_loss = kept_bytes(config, task)
    kept = kept_of_loss.of(sets // parts)
    # Gathered kernels all live from forward to backward; where layers cast them, the casts are among what is kept.
    separate = config.train.reduce_dtype == "float32" and task.compute_dtype != "float32"
    float32 = separate or task.compute_dtype == "float32"
    split = {name: x for name, x in params.items() if "fsdp" in sharding.parameter_spec(name, x.shape, mesh)}
    gathered = _bytes(split) if float32 else 0
    frozen_bytes, batch = _bytes(task.frozen), _bytes(batch_shapes(config, task, sets))
    beside = _bytes(not_read(config, task.frozen))
    needs = Memory(
        **state_bytes,
        frozen=frozen_bytes,
        batch=batch,
        peak=sum(state_bytes.values()) + trained_bytes + gathered + kept + batch + frozen_bytes - beside,
        beside=beside,
        limit=chip.hbm,
    )

    flops = workload.model_flops * workload.again * sets
    hbm_bytes = 2 * sum(state_bytes.values()) + 2 * trained_bytes + 2 * parts * kept
    # Kernels are gathered, and gradients summed, as layers compute; those that devices sum themselves once a step.
    per_scalar = 1 if float32 else jnp.dtype(task.compute_dtype).itemsize / 4
    sums = 1 if separate else parts
    collectives = _collectives(mesh, _bytes(params) * per_scalar, _bytes(trained) * per_scalar, sums)
    times = roofline(
        chip, flops, hbm_bytes, sum(c.ici_bytes for c in collectives), sum(c.dcn_bytes for c in collectives)
    )
    work = Work(
        flops=flops,
        hbm_bytes=hbm_bytes,
        collectives=tuple(collectives),
        kernels=0,
        launches={},
        times=times,
        images_per_second=batch_size * config.data.images_per_set / times.step_seconds,
        mfu=mfu(workload.model_flops * batch_size, times.step_seconds, devices, chip),
    )
    advice = []
    if not needs.fits:
        at_fsdp = state_at_fsdp(config, task, devices, mesh.shape["slice"])
        advice = memory.advice(
            needs, at_fsdp, mesh.shape["fsdp"], parts, sets, kept_by_remat(config, kept_of_loss), None
        )
    return Plan(dict(mesh.shape), batch_size, sets, needs, work, tuple(advice), (NOTE, *notes), None)


def _bytes(tree: Any) -> int:
    """Return the bytes of whole arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _collectives(mesh: AbstractMesh, kernels: float, gradients: float, sums: int) -> list[Collective]:
    """Return what devices send for gradients, summed over all, and for kernels, gathered once where fsdp shares them.

    Args:
      kernels, gradients: bytes.
      sums: how often a step sums gradients: once for each part of a batch.
    """
    slices, data, fsdp = tuple(mesh.shape.values())[:3]
    share = gradients / fsdp
    found = []

    def add(kind: str, between: int, count: int, ici_bytes: float, dcn_bytes: float = 0.0, slices: int = 1) -> None:
        if ici_bytes or dcn_bytes:
            found.append(Collective(kind, between, slices, count, ici_bytes, dcn_bytes))

    add("all-gather", fsdp, 1, wire_bytes("all-gather", kernels, fsdp))
    add("reduce-scatter", fsdp, sums, sums * wire_bytes("reduce-scatter", share, fsdp))
    add("all-reduce", data, sums, sums * wire_bytes("all-reduce", share, data))
    add("all-reduce", slices, sums, 0.0, sums * wire_bytes("all-reduce", share / data, slices), slices)
    return found
