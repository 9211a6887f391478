"""Colours: how far a generated image's palette is from that of the given images, and which way colours drift."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score

_SIDE = 32  # pixels a side that a palette is taken of
_PARTS = 32  # of the sorted pixels, each taken by its mean
# sRGB's primaries in XYZ, over the white point D65 (IEC 61966-2-1).
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ /= _XYZ.sum(1, keepdims=True)


# sRGB's curve, of every value that a pixel may have.
_LINEAR = np.where(
    np.arange(256) <= 0.04045 * 255, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
)


def lab(images_hwc: np.ndarray) -> np.ndarray:
    """Return sRGB uint8 [..., 3] in CIELAB (CIE 1976, white D65): lightness in [0, 100], a, b; float64."""
    xyz = _LINEAR[images_hwc] @ _XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _directions() -> np.ndarray:
    """Return 16 unit vectors [3, 16] spread over half a sphere (Fibonacci's lattice)."""
    i = np.arange(16) + 0.5
    height, angle = i / 16, np.pi * (1 + 5**0.5) * i
    radius = np.sqrt(1 - height**2)
    return np.stack([height, radius * np.cos(angle), radius * np.sin(angle)])


def palette(images_bhwc: np.ndarray, *, together: bool = False) -> np.ndarray:
    """Return the sorted pixels of images in CIELAB, along 16 directions, in 32 parts: [b, 32, 16].

    Args:
      together: the pixels of all images as those of one: [1, 32, 16].
    """
    small_bhwc = np.stack(
        [np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX)) for image in images_bhwc]
    )
    along_bpd = lab(small_bhwc).reshape(1 if together else len(images_bhwc), -1, 3) @ _directions()
    along_bpd.sort(axis=1)
    return along_bpd.reshape(len(along_bpd), _PARTS, -1, 16).mean(2)


@SCORES.register("palette")
class Palette(Score):
    """Distance of an image's colours to those of the given images together: sliced 1-Wasserstein in CIELAB.

    As colour transfer measures palettes (Bonneel et al., 2015, doi 10.1007/s10851-014-0506-3), where they are on the
    image left out. 0: the same colours in the same amounts; about 2: a difference just seen.
    """

    needs = ("made_nkhwc", "given_nmhwc")
    better = "lower"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return it of every place."""
        values_nk = [
            np.abs(palette(made) - palette(given, together=True)).mean((1, 2))
            for made, given in zip(features.get("made_nkhwc"), features.get("given_nmhwc"), strict=True)
        ]
        return {"palette_distance": Measured.mean(np.stack(values_nk))}


@SCORES.register("drift")
class Drift(Score):
    """Lightness, contrast and chroma of images, in CIELAB's units, whose slope over places is their drift.

    `Measured.slope` gives it. Compare with real sets, and with images generated from real ones at every place: what is
    over is the model's own doing (exposure bias).
    """

    needs = ("made_nkhwc",)
    better = "as real"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the three of every place: means of L and of chroma, standard deviation of L."""
        found: dict[str, list[np.ndarray]] = {"lightness": [], "contrast": [], "chroma": []}
        for made_khwc in features.get("made_nkhwc"):
            lab_khwc = lab(made_khwc)
            found["lightness"].append(lab_khwc[..., 0].mean((1, 2)))
            found["contrast"].append(lab_khwc[..., 0].std((1, 2)))
            found["chroma"].append(np.hypot(lab_khwc[..., 1], lab_khwc[..., 2]).mean((1, 2)))
        return {name: Measured.mean(np.stack(values)) for name, values in found.items()}
