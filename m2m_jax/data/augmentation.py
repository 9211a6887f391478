"""Augmentations of image sets: drawn once for a set and shared by its images.

What is shared (colours, ground, size, direction) becomes part of what the images of a set have in common,
and so part of what a model has to carry over from the context. A few emoji families thus give very many
styles.
"""

import dataclasses

import numpy as np
from PIL import Image

from m2m_jax.core.images import composite

# Grounds are at least this bright (Rec. 601 luminance, 0 to 1): black outlines must stay visible on them.
MIN_GROUND_LUMINANCE = 0.45
# HSV value, at most, of the colour that black line art is drawn in: well below any ground's brightness.
MAX_INK_VALUE = 0.35
_GREY_TOLERANCE = 8  # channels of line art differ by less than this, of 255

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


@dataclasses.dataclass(frozen=True)
class SetAugmentation:
    """Augments the images of a set alike; the fields are `data.augment` of the configuration.

    hue_degrees: hues are rotated by up to this, either way.
    ground_probability: chance of a coloured ground instead of white.
    ink_probability: chance that black line art is drawn in a dark colour instead.
    contrast: contrast is multiplied by 1 - contrast to 1 + contrast.
    scale: size is multiplied by 1 - scale to 1; images without transparency are enlarged by as much instead,
        for want of a ground to show beside them.
    mirror_probability: chance of a left-right flip.
    """

    hue_degrees: float = 0.0
    ground_probability: float = 0.0
    ink_probability: float = 0.0
    contrast: float = 0.0
    scale: float = 0.0
    mirror_probability: float = 0.0

    def __call__(self, images_nhwc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGBA [n, h, w, 4], h == w, straight alpha -> uint8 RGB [n, h, w, 3]."""
        # Every draw is taken, used or not: changing one config value changes nothing but what it names.
        hue = np.deg2rad(rng.uniform(-1, 1) * self.hue_degrees)
        ground = _ground(rng)
        if rng.random() >= self.ground_probability:
            ground = np.ones(3)
        ink = _hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.1, MAX_INK_VALUE))
        use_ink = rng.random() < self.ink_probability
        contrast = 1 + rng.uniform(-1, 1) * self.contrast
        scale = 1 - rng.random() * self.scale
        mirror = rng.random() < self.mirror_probability

        if scale != 1:
            images_nhwc = _rescale(images_nhwc, scale)
        if mirror:
            images_nhwc = images_nhwc[:, :, ::-1]
        rgb, alpha = images_nhwc[..., :3].astype(np.float32), images_nhwc[..., 3:]
        if use_ink:
            grey = _is_grey(images_nhwc)
            ink = (255 * ink).astype(np.float32)
            rgb[grey] = ink + rgb[grey] * (1 - ink / 255)  # black becomes ink, white stays white
        rgb = rgb @ _hue_rotation(hue).T
        rgb = (rgb - 127.5) * np.float32(contrast) + 127.5
        return composite(np.clip(rgb, 0, 255), alpha, (255 * ground).astype(np.float32))


def _hue_rotation(angle: float) -> np.ndarray:
    """Rotation of hue by an angle in radians, brightness kept: a [3, 3] matrix for RGB columns."""
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return (_YIQ_TO_RGB @ rotation @ _RGB_TO_YIQ).astype(np.float32)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A pastel to saturated colour [3] in 0..1, at least MIN_GROUND_LUMINANCE bright."""
    colour = _hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.6, 1))
    luminance = float(_LUMINANCE @ colour)
    if luminance < MIN_GROUND_LUMINANCE:
        towards_white = (MIN_GROUND_LUMINANCE - luminance) / (1 - luminance)
        colour = colour + towards_white * (1 - colour)
    return colour


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """All in 0..1 -> [3] in 0..1."""
    ramps = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - ramps))


def _is_grey(images_nhwc: np.ndarray) -> np.ndarray:
    """bool [n]: which images are line art without any colour."""
    rgb = images_nhwc[..., :3].astype(np.int16)
    spread = np.where(images_nhwc[..., 3] > 0, rgb.max(-1) - rgb.min(-1), 0)
    return spread.max((1, 2)) < _GREY_TOLERANCE


def _rescale(images_nhwc: np.ndarray, scale: float) -> np.ndarray:
    """Shrinks about the centre by `scale` <= 1; images without transparency are enlarged by 1 / scale."""
    size = images_nhwc.shape[1]
    margin = int(np.ceil(size * (1 / scale - 1) / 2))
    padded = np.pad(images_nhwc, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    opaque = images_nhwc[..., 3].min((1, 2)) == 255
    rescaled = np.empty_like(images_nhwc)
    for index, image in enumerate(padded):
        side = size * scale if opaque[index] else size / scale
        first = margin + (size - side) / 2
        box = (first, first, first + side, first + side)
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
        rescaled[index] = np.asarray(resized)
    return rescaled
