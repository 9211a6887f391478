"""Kernels under a mesh: XLA can't partition them, so each device runs one for its own sets and heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from m2m_jax.errors import UserError

WITHIN_IMAGES = ("tensor", "context")  # axes of the mesh that do not split sets: training/sharding.py


def split_over_mesh(kernel: Callable, backend: str, num_sets: int, num_heads: int, *, axis_of_heads: int) -> Callable:
    """`kernel` of arrays whose first axis is that of sets, run by each device for the sets and heads that it has.

    The mesh is that under which the caller is traced (`training/sharding.py: traced_on`); without one there is nothing
    to split. Its axes that split an image's channels or rows split heads here; where these do not divide, each device
    computes all heads, as their rows and keys must meet.

    Raises:
      UserError: sets that the devices of the mesh can't share evenly; names `backend`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    sets = tuple(axis for axis in mesh.axis_names if axis not in WITHIN_IMAGES)
    heads = tuple(axis for axis in mesh.axis_names if axis in WITHIN_IMAGES)
    shares_of_sets, shares_of_heads = (math.prod(mesh.shape[axis] for axis in axes) for axes in (sets, heads))
    if num_sets % shares_of_sets:
        raise UserError(
            f"attention backend '{backend}' has {num_sets} sets for {shares_of_sets} devices of the mesh; give it a "
            "multiple of them, or set model.attention_backend='prefix'"
        )
    between = (None,) * (axis_of_heads - 1)
    spec = PartitionSpec(sets, *between, None if num_heads % shares_of_heads else heads)
    # What varies over the mesh is not tracked through a kernel.
    return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)
