"""Kernels under a mesh: XLA can't partition them, so each device runs one for its own sets, heads and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from m2m_jax.core.errors import UserError

WITHIN_IMAGES = ("tensor", "context")  # axes of the mesh that do not split sets: training/sharding.py


def split_over_mesh(
    backend: Callable,
    name: str,
    q_bqthd: jax.Array,
    k_bkshd: jax.Array,
    v_bkshd: jax.Array,
    keep_bk: jax.Array | None = None,
) -> jax.Array:
    """Return `backend` of these, run by each device for the sets, heads and tokens of queries that it has.

    The mesh is that under which the caller is traced (`training/sharding.py: traced_on`); without one there is nothing
    to split. Where tokens are split a device has as many of every image, so the mask is the same for all, and so is
    their work; each gets the keys and values of all tokens.

    Raises:
      UserError: sets that the devices of the mesh can't share evenly; names the backend.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kept = () if keep_bk is None else (keep_bk,)
    if mesh.empty or mesh.are_all_axes_manual:  # each device has its share already
        return backend(q_bqthd, k_bkshd, v_bkshd, *kept)
    # An axis that is in no spec costs a sum of gradients, even one of a single device.
    sets = tuple(axis for axis in mesh.axis_names if axis not in WITHIN_IMAGES or mesh.shape[axis] == 1)
    num_sets, shares = q_bqthd.shape[0], math.prod(mesh.shape[axis] for axis in sets)
    if num_sets % shares:
        raise UserError(
            f"attention backend '{name}' has {num_sets} sets for {shares} devices of the mesh; give it a "
            "multiple of them, or set model.attention_backend='prefix'"
        )
    heads, tokens = axes_of_heads_and_tokens(mesh, q_bqthd.shape[3], q_bqthd.shape[2])
    of_queries, of_keys = PartitionSpec(sets, None, tokens, heads), PartitionSpec(sets, None, None, heads)
    # What varies over the mesh is not tracked through a kernel.
    in_specs = (of_queries, of_keys, of_keys, *(PartitionSpec(sets) for _ in kept))
    run = jax.shard_map(backend, in_specs=in_specs, out_specs=of_queries, check_vma=False)
    return run(q_bqthd, k_bkshd, v_bkshd, *kept)


def axes_of_heads_and_tokens(
    mesh: AbstractMesh, num_heads: int, tokens: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the axes of the mesh that split the heads, and those that split the tokens of every image of queries.

    Heads where an axis divides them, for then each device has its keys and values alone; else tokens, as `context`
    splits rows. An axis that divides neither is in none: all devices along it compute the same.
    """
    of_heads: tuple[str, ...] = ()
    of_tokens: tuple[str, ...] = ()
    for axis in ("tensor", "context"):
        size = mesh.shape.get(axis, 1)
        if size == 1:
            continue
        if num_heads % size == 0:
            of_heads = (*of_heads, axis)
            num_heads //= size
        elif tokens % size == 0:
            of_tokens = (axis, *of_tokens)  # rows first: they lie so in memory
            tokens //= size
    return of_heads, of_tokens
