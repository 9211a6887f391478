"""Which device holds what: the mesh, one table of rules for parameters, and the batch.

Mesh axes, outermost first:
  slice    TPU slices, which only the data-centre network connects, or nodes of GPUs: data parallelism between them
  data     every device along it has the same parameters
  fsdp     each device along it keeps a slice of every kernel, of its optimizer state and of its average, and gathers
           the whole kernel when it is used
  tensor   each device along it computes some of the heads and channels, from its slice of the kernels
  context  each device along it has some of the rows of every image
The first three split the batch; the others need one another's results in every layer and belong on fast links.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m2m_jax import configuration
from m2m_jax.core import gathering
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import HostParams, Params
from m2m_jax.models.unet import IN_FLOAT32
from m2m_jax.training.state import TrainState

AnyMesh = Mesh | AbstractMesh  # of devices, or of none

AXES = ("slice", "data", "fsdp", "tensor", "context")
BATCH_AXES = AXES[:3]

# (regular expression of the whole dotted name, logical names of the last axes); the first that matches decides.
# "split" channels are those between two layers, the first of which makes them and the second of which sums over them.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r".*\.(to_q|to_k|to_v|up|conv1)\.kernel", ("in", "split")),
    (r".*\.(to_out|down|conv2)\.kernel", ("split", "out")),
    (r".*\.kernel", ("in", "out")),  # linear [in, out] and convolution [height, width, in, out]
    (r".*\.(bias|scale)", ("channels",)),
    (r".*\.(embedding|tokens)", ("rows", "channels")),  # tables, and tokens that are learnt: small, and whole
)

# The mesh axis of a logical axis; without one it is whole on every device. Where several axes of a parameter have
# the same mesh axis, the longest one that it divides is split.
MESH_AXIS = {"in": "fsdp", "out": "fsdp", "split": "tensor"}

# Of an array of the batch, the mesh axes that split each axis, by the letters that end its name: `images_bnhwc`. From
# these and the parameters XLA derives how all that is computed between them lies.
ARRAY_AXES: dict[str, tuple[str, ...]] = {"b": BATCH_AXES, "n": (), "h": ("context",), "w": (), "c": (), "s": ()}


def make_mesh(config: configuration.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `config.mesh`, over all devices of all hosts or over `devices`.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `slice` is not how TPUs are connected.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # GPUs have an index for every node. Between nodes any axis may lie; `slice` keeps FSDP within them.
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1 and sizes[0] != len(slices):
        raise UserError(f"config.mesh.slice={sizes[0]}: these devices are in {len(slices)} slices; set it to that")
    if len(slices) > 1:
        within = (1, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (sizes[0], 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: XLA derives all shardings between; under Explicit axes a convolution with a sharded kernel raises.
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    gathering.connect(mesh)
    return mesh


def mesh_sizes(config: configuration.Mesh, num_devices: int) -> tuple[int, ...]:
    """Return how many devices lie along each of `AXES`. Raises UserError where these do not make `num_devices`."""
    sizes = [getattr(config, axis) for axis in AXES]
    named = [(axis, size) for axis, size in zip(AXES, sizes, strict=True) if size != 1 or axis in ("data", "fsdp")]
    asked = ", ".join(f"config.mesh.{axis}={size}" for axis, size in named)
    if sizes.count(-1) > 1:
        raise UserError(f"{asked}: only one axis can be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        raise UserError(f"{asked}: they make {fixed} devices, and there are {num_devices}; set one of them to -1")
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def abstract_mesh(config: configuration.Mesh, num_devices: int) -> AbstractMesh:
    """Return `make_mesh` without devices, which shapes do not need. Raises UserError as `mesh_sizes`."""
    return AbstractMesh(mesh_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(name: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Return how one parameter is split. Raises ValueError for a name that no rule matches."""
    rule = _rule(name)
    if rule is None:
        raise ValueError(f"no rule of m2m_jax/training/sharding.py matches parameter {name!r} {shape}; add one")
    logical = (None,) * (len(shape) - len(rule[1])) + rule[1]
    spec: list[str | None] = [None] * len(shape)
    for mesh_axis in AXES:
        size = mesh.shape[mesh_axis]
        candidates = [i for i, axis in enumerate(logical) if axis and MESH_AXIS.get(axis) == mesh_axis]
        candidates = [i for i in candidates if size > 1 and shape[i] % size == 0]
        if candidates:
            # Among equals the last, which is contiguous.
            spec[max(candidates, key=lambda i: (shape[i], i))] = mesh_axis
    return PartitionSpec(*spec)


def parameter_shardings(params: Params, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Return the sharding of every parameter of a flat dict (arrays or ShapeDtypeStructs)."""
    return {name: NamedSharding(mesh, parameter_spec(name, value.shape, mesh)) for name, value in params.items()}


def gathered(params: Params, mesh: AnyMesh, dtype: jax.typing.DTypeLike) -> Params:
    """Return parameters as layers use them: whole along `fsdp`, which only keeps them apart. For compiled code.

    XLA, when it is left to decide, gathers now a kernel and now the images of the whole batch, and sums every gradient
    whole on every device. Here each device sums the slice that it keeps (reduce-scatter).

    Args:
      dtype: that layers cast their kernels to, but for the U-Net's `IN_FLOAT32`; they are gathered as that, and their
        gradients summed.
    """

    def whole(name: str, value: jax.Array) -> jax.Array:
        spec = parameter_spec(name, value.shape, mesh)
        if "fsdp" not in spec:
            return value
        kept = NamedSharding(mesh, spec)
        at_use = NamedSharding(mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec)))

        @jax.custom_gradient
        def gather(kernel: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
            # Without words of its own the gradient would get the sharding of the result.
            return (
                jax.lax.with_sharding_constraint(kernel, at_use),
                lambda gradient: jax.lax.with_sharding_constraint(gradient, kept),
            )

        return gather(value.astype(jnp.float32 if name.startswith(IN_FLOAT32) else dtype))

    return {name: whole(name, value) for name, value in params.items()}


def summed_in_float32(gradients_of: Callable, mesh: AnyMesh) -> Callable:
    """Return `gradients_of`, computed by each device of its own rows, and then summed in float32.

    XLA sums a product that is split over devices where it stands, in the product's dtype, and casts the sum: no cast in
    the program, before or after, makes it sum in float32. So each device computes a gradient of its own, as of a loss
    of its rows alone, and the sum is written out. With accumulation there is one sum a step, not one a part.

    Args:
      gradients_of: (parameters, frozen, inputs) -> (gradients, metrics), both means over the rows of the inputs.

    Raises:
      UserError: the mesh splits tensors or images, which only XLA can do.
    """
    if mesh.shape["tensor"] * mesh.shape["context"] > 1:
        raise UserError(
            "config.train.reduce_dtype=float32 does not go with config.mesh.tensor or .context above 1: set both to 1, "
            "or reduce_dtype=model"
        )

    def place(params: Params) -> dict[str, PartitionSpec]:
        return {name: parameter_spec(name, value.shape, mesh) for name, value in params.items()}

    def own_share(params: Params, frozen: Any, inputs: Any, kept: dict[str, PartitionSpec]) -> tuple[Params, dict]:
        def whole(name: str, value: jax.Array) -> jax.Array:
            if "fsdp" not in kept[name]:
                return value
            return jax.lax.all_gather(value, "fsdp", axis=kept[name].index("fsdp"), tiled=True)

        def summed(name: str, value: jax.Array) -> jax.Array:
            value = value.astype(np.float32) / math.prod(mesh.shape[axis] for axis in BATCH_AXES)
            if "fsdp" not in kept[name]:
                return jax.lax.psum(value, BATCH_AXES)
            axis = kept[name].index("fsdp")
            value = jax.lax.psum_scatter(value, "fsdp", scatter_dimension=axis, tiled=True)
            return jax.lax.psum(value, ("slice", "data"))

        gradients, metrics = gradients_of({name: whole(name, x) for name, x in params.items()}, frozen, inputs)
        return {name: summed(name, x) for name, x in gradients.items()}, jax.lax.pmean(metrics, BATCH_AXES)

    def run(params: Params, frozen: Any, inputs: Any) -> tuple[Params, dict]:
        kept = place(params)
        gradients = jax.eval_shape(gradients_of, params, frozen, inputs)[0]
        return jax.shard_map(
            functools.partial(own_share, kept=kept),
            mesh=mesh.abstract_mesh,
            in_specs=(kept, PartitionSpec(), PartitionSpec(BATCH_AXES)),
            out_specs=({name: kept[name] for name in gradients}, PartitionSpec()),
            check_vma=False,  # kernels are not tracked
        )(params, frozen, inputs)

    return run


def state_shardings(state: TrainState, mesh: AnyMesh) -> TrainState:
    """Return a TrainState of shardings: optimizer state and EMA follow their parameters; all else is on every device.

    Args:
      state: arrays or ShapeDtypeStructs, as from `jax.eval_shape`.
    """
    of_parameter = parameter_shardings(state.params, mesh)

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The moments of a parameter stand in the optimizer's state under the parameter's own name.
        name = getattr(path[-1], "key", None) if path else None
        if name in state.params and leaf.shape == state.params[name].shape:
            return of_parameter[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of what is the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Place NumPy arrays, which every process holds alike, on every device.

    `jax.device_put` would first gather them from all processes, to compare them: as often as there are processes.
    """
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, replicated(mesh), lambda index: x[index]), tree)


def place(params: HostParams, shardings: Mapping[str, Any]) -> Params:
    """Place parameters, which every process holds alike in the host's memory: each device gets its share alone."""
    return {name: jax.make_array_from_callback(x.shape, shardings[name], x.__getitem__) for name, x in params.items()}


@functools.cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def on_this_process(params: Params, mesh: Mesh) -> Params:
    """Return whole arrays: on all devices of this process where each has them whole, else in the host's memory.

    All processes must call. Arrays are gathered one after another: together they would need room on every device.
    """
    # Not in the mesh's order: a sampler, which has JAX's, would copy what lies in another.
    devices = set(mesh.devices.flat)
    own = Mesh(np.array([device for device in jax.local_devices() if device in devices]), ("data",))

    def whole(x: jax.Array) -> Any:
        if not x.is_fully_replicated:
            return np.asarray(_gather(mesh)(x).addressable_data(0))
        shards = [shard.data for shard in x.addressable_shards]  # as they lie: nothing is copied
        return jax.make_array_from_single_device_arrays(x.shape, replicated(own), shards)

    return {name: whole(x) for name, x in params.items()}


def batch_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Return the sharding of an array of the batch, by the letters that end its name and `ARRAY_AXES`.

    Raises:
      ValueError: the name does not say what the axes are.
    """
    _, found, letters = name.rpartition("_")
    if not found or not ARRAY_AXES.keys() >= set(letters):
        raise ValueError(
            f"the letters that end {name!r} must be among {', '.join(ARRAY_AXES)}; or add one to ARRAY_AXES in "
            "m2m_jax/training/sharding.py"
        )
    return NamedSharding(mesh, PartitionSpec(*(ARRAY_AXES[letter] or None for letter in letters)))


def check_batch_size(batch_size: int, mesh: AnyMesh, field: str, parts: int = 1) -> None:
    """Raise UserError where a batch cannot be split over the devices.

    Args:
      field: of the config, which has `batch_size`, for the message.
      parts: how many parts of the batch are computed one after another.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (shares * parts):
        times = f", times config.train.accumulation={parts}" if parts > 1 else ""
        raise UserError(
            f"config.{field} is {batch_size}; it must be a multiple of the {shares} devices that share it{times}"
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Return which rows of a batch lie, in whole or in part, on devices of this process."""
    shares = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((batch_size,))
    return sorted({row for share in shares.values() if share for row in range(*share[0].indices(batch_size))})


def make_global_batch(mesh: Mesh, host_batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Return a batch split over all devices, {name: [batch_size, ...]}.

    Args:
      host_batch: {name: the rows of this process, which `local_rows` names}.
    """
    position = {row: i for i, row in enumerate(local_rows(mesh, batch_size))}

    def place(name: str, value: np.ndarray) -> jax.Array:
        def share(index: Any) -> np.ndarray:
            rows = [position[row] for row in range(*index[0].indices(batch_size))]
            return value[rows][:, *index[1:]] if len(index) > 1 else value[rows]

        shape = (batch_size, *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, name), share)

    return {name: place(name, value) for name, value in host_batch.items()}


def traced_on(mesh: AnyMesh, function: Callable) -> Callable:
    """Return `function`, to be compiled, with a mesh that it can ask for.

    A kernel (`attention/splash.py`), which XLA can't partition, finds the mesh by `jax.sharding.get_abstract_mesh`.
    """

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def describe(params: Params, mesh: Mesh) -> str:
    """Return a table, to be printed: for every rule, how many parameters it splits in which way."""
    rows: dict[tuple[str, str], list[int]] = {}
    for name, value in params.items():
        spec = parameter_spec(name, value.shape, mesh)
        split = f"[{', '.join(axis or '-' for axis in spec)}]"
        pattern, _ = _rule(name) or ("", ())
        rows.setdefault((pattern, split), []).append(math.prod(value.shape))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [f"mesh {axes}; parameters by rule and split axes:"]
    for (rule, split), sizes in sorted(rows.items()):
        lines.append(f"  {rule:<40} {split:<24} {len(sizes):>5} x {sum(sizes):>15,} scalars")
    split_axes = "; ".join(f"{letter} over {', '.join(axes)}" for letter, axes in ARRAY_AXES.items() if axes)
    lines.append(f"arrays of the batch, by the letters that end their names: {split_axes}")
    return "\n".join(lines)


def _rule(name: str) -> tuple[str, tuple[str, ...]] | None:
    return next((rule for rule in RULES if re.fullmatch(rule[0], name)), None)
