"""Which device holds what: the mesh, one table of rules for parameters, and the batch.

Two mesh axes. `data`: every device along it has the same parameters. `fsdp`: each device along it keeps a slice
of every kernel, of its optimizer state and of its average, and gathers the whole kernel when it is used. Both
split the batch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from m2m_jax.errors import UserError
from m2m_jax.models.parameters import Params
from m2m_jax.training.state import TrainState

AXES = ("data", "fsdp")

# (regular expression of the whole dotted name, logical names of the last axes); the first that matches decides.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r".*\.kernel", ("in", "out")),  # linear [in, out] and convolution [height, width, in, out]
    (r".*\.(bias|scale)", ("channels",)),
)

# The mesh axis of a logical axis; without one it is whole on every device. Where several axes of a parameter have
# the same mesh axis, the longest one that it divides is split.
MESH_AXIS = {"in": "fsdp", "out": "fsdp"}


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of all devices of all hosts, with axes ("data", "fsdp"), from `config.mesh`.

    Raises UserError where the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [config[axis] for axis in AXES]
    asked = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise UserError(f"{asked}: only one axis can be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if devices % fixed or (-1 not in sizes and fixed != devices):
        raise UserError(f"{asked}: they make {fixed} devices, and there are {devices}; set one of them to -1")
    sizes = [devices // fixed if size == -1 else size for size in sizes]
    # Auto: XLA derives all shardings between; under Explicit axes a convolution with a sharded kernel raises.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is split. Raises ValueError for a name that no rule matches."""
    rule = _rule(name)
    if rule is None:
        raise ValueError(f"no rule of m2m_jax/training/sharding.py matches parameter {name!r} {shape}; add one")
    logical = (None,) * (len(shape) - len(rule[1])) + rule[1]
    spec: list[str | None] = [None] * len(shape)
    for mesh_axis in AXES:
        size = mesh.shape[mesh_axis]
        candidates = [i for i, axis in enumerate(logical) if MESH_AXIS.get(axis) == mesh_axis]
        candidates = [i for i in candidates if size > 1 and shape[i] % size == 0]
        if candidates:
            # Among equals the last, which is contiguous.
            spec[max(candidates, key=lambda i: (shape[i], i))] = mesh_axis
    return PartitionSpec(*spec)


def parameter_shardings(params: Params, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every parameter of a flat dict (arrays or ShapeDtypeStructs)."""
    return {name: NamedSharding(mesh, parameter_spec(name, value.shape, mesh)) for name, value in params.items()}


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """A TrainState of shardings: optimizer state and EMA follow their parameters; all else is on every device.

    `state`: arrays or ShapeDtypeStructs, as from `jax.eval_shape`.
    """
    of_parameter = parameter_shardings(state.params, mesh)

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The moments of a parameter stand in the optimizer's state under the parameter's own name.
        name = getattr(path[-1], "key", None) if path else None
        if name in state.params and leaf.shape == state.params[name].shape:
            return of_parameter[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises UserError where `batch_size`, the value of the config's `field`, cannot be split over the devices."""
    if batch_size % mesh.size:
        raise UserError(f"config.{field} is {batch_size}; it must be a multiple of the {mesh.size} devices")


def make_global_batch(mesh: Mesh, host_batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """{name: [B of this host, ...]} to {name: [B of all hosts, ...]}, split over all devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in host_batch.items()}


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be compiled, which can ask for the mesh: what XLA can't partition it must split itself.

    That is a kernel (`attention/splash.py`), which finds the mesh by `jax.sharding.get_abstract_mesh`.
    """

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def describe(params: Params, mesh: Mesh) -> str:
    """The resolved table, to be printed: for every rule, how many parameters it splits in which way."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, value in params.items():
        spec = parameter_spec(name, value.shape, mesh)
        split = f"[{', '.join(axis or '-' for axis in spec)}]"
        rows.setdefault((_rule(name)[0], split), []).append(math.prod(value.shape))
    lines = [f"mesh {dict(mesh.shape)}; parameters by rule and split axes:"]
    for (rule, split), sizes in sorted(rows.items()):
        lines.append(f"  {rule:<16} {split:<20} {len(sizes):>5} x {sum(sizes):>15,} scalars")
    return "\n".join(lines)


def _rule(name: str) -> tuple[str, tuple[str, ...]] | None:
    return next((rule for rule in RULES if re.fullmatch(rule[0], name)), None)
