"""How much of a sample grid is computed at once: beside the state of training there is no room for all of it."""

from collections.abc import Callable

import jax
import numpy as np

PIXELS_AT_ONCE = 512 * 512


def pieces(count: int, image_size: int) -> list[slice]:
    """Of `count` images, which are made together: as many as have, in all, the pixels of one of 512 px a side."""
    at_once = max(PIXELS_AT_ONCE // image_size**2, 1)
    return [slice(start, start + at_once) for start in range(0, count, at_once)]


def images_in_pieces(make: Callable[[np.ndarray], jax.Array], of_khwc: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 images [k, image_size, image_size, 3] of latents, or of other images; k may be 0. make: those of some."""
    images_khwc = np.empty((len(of_khwc), image_size, image_size, 3), np.uint8)
    for piece in pieces(len(of_khwc), image_size):
        images_khwc[piece] = make(of_khwc[piece])
    return images_khwc
