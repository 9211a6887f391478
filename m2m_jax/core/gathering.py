"""What the processes of a launch make of the image sets that they share, brought together."""

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 3600  # seconds that a process may wait for others, which may still compile
_numbers = itertools.count()


def gather(images: np.ndarray) -> np.ndarray:
    """uint8 [k, ..., h, w, c] of each process to [k * processes, ...] on all: first the first set of each, and so on.

    All must call, with one shape. Image by image, for what is gathered lies on every device, beside a model.
    """
    if jax.process_count() == 1:
        return images
    wait_for_all()
    of_all = [multihost_utils.process_allgather(image_hwc) for image_hwc in images.reshape(-1, *images.shape[-3:])]
    gathered = np.stack(of_all).reshape(*images.shape[:-3], jax.process_count(), *images.shape[-3:])
    return np.moveaxis(gathered, -4, 1).reshape(-1, *images.shape[1:])


def wait_for_all() -> None:
    """Until all processes have come here, as often as this one has.

    Not by a collective: on CPUs these find each other within half a minute, or fail.
    """
    if jax.process_count() > 1:
        from jax._src import distributed  # private: a single process, perhaps with another JAX, needs none of it

        distributed.global_state.client.wait_at_barrier(f"m2m_jax {next(_numbers)}", 1000 * LONGEST)
