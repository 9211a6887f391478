"""What the processes of a launch do together: find one another, wait, and gather what each has made."""

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LONGEST = 3600  # seconds that a process may wait for others, which may still compile
_numbers = itertools.count()


def connect(mesh: Mesh) -> None:
    """Connect the devices along every axis of a mesh, and along every combination of axes, where CPUs are to compute.

    Gloo, which XLA's collectives between CPUs run on, connects the devices of a group at the group's first collective,
    and gives up after 30 s, while one process may well compile that much longer than another. Once connected, devices
    wait for one another for half an hour. So all groups are connected here, when all processes have come, and no
    program needs to know. All processes of the mesh must call; meshes of one process have nothing to connect.
    """
    if len({device.process_index for device in mesh.devices.flat}) == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda index: np.ones(mesh.size, np.float32)[index])
    axes = [name for name, size in mesh.shape.items() if size > 1]
    combinations = [chosen for n in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, n)]
    programs = []
    for chosen in combinations:
        rest = PartitionSpec(tuple(name for name in mesh.axis_names if name not in chosen))
        total = jax.shard_map(
            lambda x, axes=chosen: jax.lax.psum(x, axes), mesh=mesh, in_specs=split.spec, out_specs=rest
        )
        programs.append(jax.jit(total).lower(ones).compile())
    wait_for_all()
    with _stdout_to_stderr():
        for program in programs:
            program(ones).block_until_ready()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print to standard error: Gloo tells of every group, and several processes share a stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C still holds
        os.dup2(stdout, 1)
        os.close(stdout)


def gather(images: np.ndarray) -> np.ndarray:
    """Return uint8 [k, ..., h, w, c] of each process as [k * processes, ...] on all: first the first set of each.

    All must call, with one shape. Image by image, for what is gathered lies on every device, beside a model.
    """
    if jax.process_count() == 1:
        return images
    wait_for_all()
    of_all = [multihost_utils.process_allgather(image_hwc) for image_hwc in images.reshape(-1, *images.shape[-3:])]
    gathered = np.stack(of_all).reshape(*images.shape[:-3], jax.process_count(), *images.shape[-3:])
    return np.moveaxis(gathered, -4, 1).reshape(-1, *images.shape[1:])


def wait_for_all() -> None:
    """Wait until all processes have come here, as often as this one has.

    Through the service that joined the processes, and not by a collective, which needs the devices, and devices that
    found one another (`connect`).
    """
    if jax.process_count() > 1:
        from jax._src import distributed  # private: a single process, perhaps with another JAX, needs none of it

        service: Any = distributed.global_state.client
        service.wait_at_barrier(f"m2m_jax {next(_numbers)}", 1000 * LONGEST)
