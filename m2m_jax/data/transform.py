"""The augmentation that was drawn, applied: on the host with NumPy, or in the step with jax.numpy, to the same bits.

Arithmetic is that of integers (resampling multiplies matrices of whole numbers below 2**24, which float32 holds
exactly), so that no device, library or order of summation rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.data.augmentation import (
    COLOUR_BITS,
    ENLARGING_TAPS,
    GROUND,
    INK,
    MATRIX,
    MIRROR,
    OFFSET,
    TABLES,
    USE_INK,
    WEIGHT_ONE,
)

RGBA, PARAMETERS = "rgba_bnhwc", "augmentation_bs"  # of a batch that is to be augmented in the step
PLACES = "place_bn"  # in the images that the device holds, in the place of RGBA
IMAGES = "images_bnhwc"
_NO_CHANGE = np.append(2**COLOUR_BITS * np.eye(3, dtype=np.int32), np.int32(0))  # of MATRIX and OFFSET
_GREY_TOLERANCE = 8  # channels of line art differ by less than this, of 255

Array = Any  # of NumPy or JAX


def finish(batch: dict[str, jax.Array], resident_nhwc: jax.Array | None = None) -> dict[str, jax.Array]:
    """Return a batch with images, picked and augmented here where the host left that to the step; may be traced.

    Args:
      batch: has `images_bnhwc`; or `augmentation_bs` and either `rgba_bnhwc` or `place_bn`; or neither.
      resident_nhwc: uint8 [images, S, S, 4], which `place_bn` are places in.
    """
    if PARAMETERS not in batch:
        return batch
    rgba_bnhwc = batch[RGBA] if resident_nhwc is None else resident_nhwc[batch[PLACES]]
    rest = {name: value for name, value in batch.items() if name not in (RGBA, PLACES, PARAMETERS)}
    return rest | {IMAGES: augment(rgba_bnhwc, batch[PARAMETERS], jnp)}


def augment(rgba: Array, parameters: Array, xp: ModuleType = np) -> Array:
    """Return images of sets as uint8 RGB [..., n, S, S, 3] on a ground.

    Args:
      rgba: uint8 [..., n, S, S, 4] with straight alpha.
      parameters: int32 [..., p], those of each set, from `SetAugmentation.draw`.
      xp: numpy or jax.numpy, whose arrays these are.
    """

    if xp is np and _only_mirrored(rgba, parameters):  # as photographs are
        images = rgba[..., :3]
        return np.where((parameters[..., MIRROR] != 0)[..., None, None, None, None], images[..., ::-1, :], images)

    def of_set(place: int) -> Array:
        return parameters[..., place, None, None, None]

    *rgb, alpha = (rgba[..., channel].astype(np.int32) for channel in range(4))  # each [..., n, S, S]
    if xp is jnp or parameters[..., USE_INK].any():
        rgb = _ink(rgb, alpha, of_set, xp)
    if xp is jnp or (parameters[..., MATRIX : OFFSET + 1] != _NO_CHANGE).any():
        rgb = _mix(rgb, of_set, xp)
    planes = [x * alpha for x in rgb]  # premultiplied: what is transparent has no colour to mix in
    if parameters.shape[-1] > TABLES:
        opaque = alpha.min((-2, -1)) == 255
        planes, alpha = _rescale(planes, alpha, opaque, parameters[..., TABLES:], xp)
    ground = [of_set(GROUND + c) for c in range(3)]
    rgb = [xp.clip(_over_255(x + g * (255 - alpha)), 0, 255) for x, g in zip(planes, ground, strict=True)]
    images = xp.stack(rgb, -1).astype(np.uint8)
    return xp.where((of_set(MIRROR) != 0)[..., None], images[..., ::-1, :], images)


def _only_mirrored(rgba: np.ndarray, parameters: np.ndarray) -> bool:
    """Return whether nothing but a mirror can change these images: an exact short cut."""
    return (
        parameters.shape[-1] == TABLES
        and not parameters[..., USE_INK].any()
        and (parameters[..., MATRIX : OFFSET + 1] == _NO_CHANGE).all()
        and rgba[..., 3].min() == 255
    )


def _ink(rgb: list[Array], alpha: Array, of_set: Callable[[int], Array], xp: ModuleType) -> list[Array]:
    """Return colours [..., n, S, S] with black as ink and white as white, in images of line art without any colour."""
    red, green, blue = rgb
    most, least = xp.maximum(xp.maximum(red, green), blue), xp.minimum(xp.minimum(red, green), blue)
    spread = xp.where(alpha > 0, most - least, 0).max((-2, -1), keepdims=True)
    inked = (spread < _GREY_TOLERANCE) & (of_set(USE_INK) != 0)
    inks = [of_set(INK + channel) for channel in range(3)]
    return [xp.where(inked, _over_255(ink * 255 + x * (255 - ink)), x) for x, ink in zip(rgb, inks, strict=True)]


def _mix(rgb: list[Array], of_set: Callable[[int], Array], xp: ModuleType) -> list[Array]:
    """Return colours [..., n, S, S] after the matrix and the offset of their set."""
    offset = of_set(OFFSET) + 2 ** (COLOUR_BITS - 1)
    mixed = [sum(of_set(MATRIX + 3 * row + c) * rgb[c] for c in range(3)) + offset for row in range(3)]
    return [xp.clip(x >> COLOUR_BITS, 0, 255) for x in mixed]


def _over_255(x: Array) -> Array:
    """Return x / 255, rounded to the nearest, for x from 0 to 255 * 255."""
    x = x + 128
    return (x + (x >> 8)) >> 8


def _rescale(
    planes: list[Array], alpha: Array, opaque: Array, tables: Array, xp: ModuleType
) -> tuple[list[Array], Array]:
    """Return images in another size about their centres: opaque ones enlarged, the others smaller.

    Args:
      planes: premultiplied colours [..., n, S, S], 0 to 255 * 255.
      alpha: [..., n, S, S], 0 to 255.
      opaque: bool [..., n].
      tables: [..., t], two of `resampling_table` for each set.
    """
    size = alpha.shape[-1]
    taps = tables.shape[-1] // size - 2 - ENLARGING_TAPS
    first = size * (1 + taps)
    matrix = _resampling_matrix(tables[..., :first], size, taps, xp)[..., None, :, :]
    if xp is jnp or opaque.any():
        enlarging = _resampling_matrix(tables[..., first:], size, ENLARGING_TAPS, xp)[..., None, :, :]
        matrix = xp.where(opaque[..., None, None], enlarging, matrix)
    matrix = matrix[..., None, :, :]

    def product(a: Array, b: Array) -> Array:
        # Of whole numbers, so float32 is exact, but for the 11 bits of TF32 and the 8 of bfloat16.
        exact = {"precision": jax.lax.Precision.HIGHEST} if xp is jnp else {}
        sums = xp.matmul(a, b, **exact)
        return xp.floor((sums + WEIGHT_ONE // 2) * np.float32(1 / WEIGHT_ONE))

    stacked = xp.stack([*planes, alpha * 255], -3).astype(np.float32)  # [..., n, 4, S, S]
    scaled = product(matrix, product(stacked, xp.swapaxes(matrix, -1, -2))).astype(np.int32)
    return [scaled[..., channel, :, :] for channel in range(3)], _over_255(scaled[..., 3, :, :])


def _resampling_matrix(table: Array, size: int, taps: int, xp: ModuleType) -> Array:
    """Return `resampling_table` [..., size * (1 + taps)] as a matrix float32 [..., size, size], times WEIGHT_ONE."""
    start, weight = table[..., :size, None], table[..., size:].reshape(*table.shape[:-1], size, taps)
    column = np.arange(size, dtype=np.int32).reshape((1,) * (start.ndim - 1) + (size,))
    return sum(xp.where(column == start + k, weight[..., k, None], 0) for k in range(taps)).astype(np.float32)
