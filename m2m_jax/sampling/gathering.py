"""What the processes of a launch make of the image sets that they share, brought together."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(images: np.ndarray) -> np.ndarray:
    """uint8 [k, ..., h, w, c] of each process to [k * processes, ...] on all: first the first set of each, and so on.

    All must call, with one shape. Image by image, for what is gathered lies on every device, beside a model.
    """
    if jax.process_count() == 1:
        return images
    of_all = [multihost_utils.process_allgather(image_hwc) for image_hwc in images.reshape(-1, *images.shape[-3:])]
    gathered = np.stack(of_all).reshape(*images.shape[:-3], jax.process_count(), *images.shape[-3:])
    return np.moveaxis(gathered, -4, 1).reshape(-1, *images.shape[1:])


def wait_for_all(name: str) -> None:
    """Until all processes have come here. XLA gives them a minute to find each other: not where one must compile."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
