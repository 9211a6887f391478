"""The sample grid of an evaluation: all processes make it, each in pieces, as beside the state there is little room."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from m2m_jax.core import gathering
from m2m_jax.view.contact_sheet import Group, Row, contact_sheet

SETS = 8
PIXELS_AT_ONCE = 512 * 512  # on a device

Samples = dict[str, np.ndarray]  # uint8 images, [sets, ...]


def rows_of_process(num_sets: int) -> list[int]:
    """Return which sets of a grid this process makes.

    Each process makes as many as any other, so that they can be gathered: where there are too few, some are made twice.
    """
    process, count = jax.process_index(), jax.process_count()
    return [(process + count * i) % num_sets for i in range(-(-num_sets // count))]


def gather(samples: Samples | None, num_sets: int) -> Samples | None:
    """Return the samples of all processes, which must all call, in the order of their sets.

    Args:
      samples: of the sets that `rows_of_process` names; None where this process could make none.

    Returns:
      All samples; None where one process has None.
    """
    if jax.process_count() == 1:
        return samples
    gathering.wait_for_all()
    if not multihost_utils.process_allgather(np.bool_(samples is not None)).all() or samples is None:
        return None
    return {name: gathering.gather(x)[:num_sets] for name, x in sorted(samples.items())}


def pieces(count: int, image_size: int, num_devices: int = 1) -> list[slice]:
    """Return which of `count` images are made together.

    On each device these are as many as have, in all, the pixels of one image of 512 px a side.
    """
    at_once = max(PIXELS_AT_ONCE // image_size**2, 1) * num_devices
    return [slice(start, start + at_once) for start in range(0, count, at_once)]


def images_in_pieces(
    make: Callable[[np.ndarray], jax.Array], of_khwc: np.ndarray, image_size: int, num_devices: int = 1
) -> np.ndarray:
    """Return uint8 images [k, image_size, image_size, 3] made of latents or other images; k may be 0.

    Args:
      make: makes some images, a multiple of `num_devices`.
      of_khwc: what the images are made of.
    """
    images_khwc = np.empty((len(of_khwc), image_size, image_size, 3), np.uint8)
    for piece in pieces(len(of_khwc), image_size, num_devices):
        some_khwc = of_khwc[piece]
        padding = np.zeros((-len(some_khwc) % num_devices, *some_khwc.shape[1:]), some_khwc.dtype)
        images_khwc[piece] = np.asarray(make(np.concatenate([some_khwc, padding])))[: len(some_khwc)]
    return images_khwc


def side_by_side(*groups: Group) -> Image.Image:
    """Return a sheet of groups of as many images each, in rows of 8 of each where 8 divide their number."""
    count = len(groups[0].images)
    width = math.gcd(count, 8)
    rows = [slice(start, start + width) for start in range(0, count, width)]
    return contact_sheet(
        [Row("", [dataclasses.replace(group, images=group.images[row]) for group in groups]) for row in rows]
    )
