"""Augmentations of image sets: drawn once for a set and shared by its images.

What is shared (colours, ground, size, direction) becomes part of what the images of a set have in common,
and so part of what a model has to carry over from the context. A few emoji families thus give very many
styles.

Drawing is here; `transform.py` applies what was drawn, on the host or in the step.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

# Grounds are at least this bright (Rec. 601 luminance, 0 to 1): black outlines must stay visible on them.
MIN_GROUND_LUMINANCE = 0.45
# HSV value, at most, of the colour that black line art is drawn in: well below any ground's brightness.
MAX_INK_VALUE = 0.35

# Parameters are integers, for which every device computes the same: numbers of colours times 2**COLOUR_BITS, weights of
# pixels times WEIGHT_ONE.
COLOUR_BITS = 12
WEIGHT_ONE = 2**8

# Places in the parameters of a set, int32 [p]; what resizes images follows, see `resampling_tables`.
USE_INK, INK, MATRIX, OFFSET, GROUND, MIRROR, TABLES = 0, 1, 4, 13, 14, 17, 18

ENLARGING_TAPS = 2  # pixels that one of an enlarged image is made of
_SCALES = 1024  # steps of the size: fine enough, and their tables are made once

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


@dataclasses.dataclass(frozen=True)
class SetAugmentation:
    """Augmentation of the images of a set, all alike; the fields are `data.augment` of the configuration.

    hue_degrees: hues are rotated by up to this, either way.
    ground_probability: chance of a coloured ground instead of white.
    ink_probability: chance that black line art is drawn in a dark colour instead.
    contrast: contrast is multiplied by 1 - contrast to 1 + contrast.
    scale: size is multiplied by 1 - scale to 1; images without transparency are enlarged by as much instead,
        for want of a ground to show beside them.
    mirror_probability: chance of a left-right flip.

    Example:
        augmentation = SetAugmentation(hue_degrees=180, mirror_probability=0.5)
        images_nhwc = transform.augment(rgba_nhwc, augmentation.draw(rng, image_size=32))
    """

    hue_degrees: float = 0.0
    ground_probability: float = 0.0
    ink_probability: float = 0.0
    contrast: float = 0.0
    scale: float = 0.0
    mirror_probability: float = 0.0

    def draw(self, rng: np.random.Generator, image_size: int) -> np.ndarray:
        """Return the parameters of a set: int32 [p], p as `num_parameters` says."""
        # Every draw is taken, used or not: changing one config value changes nothing but what it names.
        hue = np.deg2rad(rng.uniform(-1, 1) * self.hue_degrees)
        ground = _ground(rng)
        if rng.random() >= self.ground_probability:
            ground = np.ones(3)
        ink = _hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.1, MAX_INK_VALUE))
        use_ink = rng.random() < self.ink_probability
        contrast = 1 + rng.uniform(-1, 1) * self.contrast
        smaller = 1 - np.round(rng.random() * self.scale * _SCALES) / _SCALES
        mirror = rng.random() < self.mirror_probability

        parameters = np.zeros(self.num_parameters(image_size), np.int32)
        parameters[USE_INK], parameters[MIRROR] = use_ink, mirror
        parameters[INK : INK + 3] = np.round(255 * ink)
        parameters[GROUND : GROUND + 3] = np.round(255 * ground)
        parameters[MATRIX : MATRIX + 9] = np.round(2**COLOUR_BITS * contrast * _hue_rotation(hue)).ravel()
        parameters[OFFSET] = np.round(2**COLOUR_BITS * 127.5 * (1 - contrast))
        if self.scale:
            parameters[TABLES:] = _tables(image_size, float(smaller), self._shrinking_taps)
        return parameters

    def num_parameters(self, image_size: int) -> int:
        """Return how many numbers describe the augmentation of a set."""
        taps = self._shrinking_taps + ENLARGING_TAPS
        return TABLES + (image_size * (2 + taps) if self.scale else 0)

    @property
    def _shrinking_taps(self) -> int:
        return int(np.floor(2 / (1 - self.scale))) + 1


@functools.lru_cache(maxsize=_SCALES)
def _tables(size: int, smaller: float, taps: int) -> np.ndarray:
    shrinking = resampling_table(size, smaller, taps)
    return np.concatenate([*shrinking, *resampling_table(size, 1 / smaller, ENLARGING_TAPS)]).astype(np.int32)


def resampling_table(size: int, scale: float, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how a row of pixels is scaled about its centre, with a triangle filter that averages where it shrinks.

    Pixel x of the result is the sum over k of weight[x, k] / WEIGHT_ONE * pixel[start[x] + k].

    Args:
      scale: size of what is shown after, over that before.
      taps: pixels that a pixel of the result is made of, at most.

    Returns:
      (start [size], weight [size * taps]), integers. Weights of pixels outside of the row are 0: nothing is there.
    """
    support = max(1 / scale, 1.0)
    centre = (np.arange(size) + 0.5 - size / 2) / scale + size / 2  # pixel i reaches from i to i + 1
    start = np.floor(centre - support + 0.5).astype(np.int64)
    place = start[:, None] + np.arange(taps)
    weight = np.maximum(1 - np.abs(place + 0.5 - centre[:, None]) / support, 0)
    rounded = np.round(WEIGHT_ONE * weight / weight.sum(1, keepdims=True)).astype(np.int64)
    # Together they are WEIGHT_ONE, or a flat ground would change its brightness.
    rounded[np.arange(size), weight.argmax(1)] += WEIGHT_ONE - rounded.sum(1)
    rounded[(place < 0) | (place >= size)] = 0
    return start, rounded.ravel()


def _hue_rotation(angle: float) -> np.ndarray:
    """Return the rotation of hue by an angle in radians, brightness kept: a [3, 3] matrix for RGB columns."""
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return _YIQ_TO_RGB @ rotation @ _RGB_TO_YIQ


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Draw a pastel to saturated colour [3] in 0..1, at least MIN_GROUND_LUMINANCE bright."""
    colour = _hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.6, 1))
    luminance = float(_LUMINANCE @ colour)
    if luminance < MIN_GROUND_LUMINANCE:
        towards_white = (MIN_GROUND_LUMINANCE - luminance) / (1 - luminance)
        colour = colour + towards_white * (1 - colour)
    return colour


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Return a colour, all in 0..1, as [3] in 0..1."""
    ramps = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - ramps))
