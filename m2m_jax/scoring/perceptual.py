"""ST-LPIPS between the images of a set: to the given ones, and to the real ones of their places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.models import stlpips
from m2m_jax.models.autoencoder import pixels_to_float
from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score


@SCORES.register("st_lpips")
class PerceptualDistance(Score):
    """ST-LPIPS (Ghildyal and Liu, ECCV 2022), VGG or Alex as the folder holds: how different images look.

    Their weights were retrained: never call it LPIPS.

    to_given: mean over the given images; a copier wins it. to_real: the real image of that place.
    """

    needs = ("made_nkhwc",)
    better = "lower"
    weights = "m2m_jax.data.prepare_stlpips"

    def __init__(self, folder: Path | None = None):
        super().__init__(folder)
        if folder is None:
            raise UserError(f"ST-LPIPS needs a folder of weights: make one with python -m {self.weights}")
        self._params = stlpips.load_stlpips(folder)
        self._name = f"st_lpips_{stlpips.network_of(self._params)}"
        self._distances = jax.jit(lambda params, images_bhwc: stlpips.distances(params, pixels_to_float(images_bhwc)))

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return whichever of the two there is something to compare with for. Each image passes the network once."""
        made_nkhwc = features.get("made_nkhwc")
        k = made_nkhwc.shape[1]
        others = [features.get(name) for name in ("given_nmhwc", "real_nkhwc") if features.has(name)]
        m = others[0].shape[1] if features.has("given_nmhwc") else 0
        found: dict[str, list[np.ndarray]] = {}
        if not others:
            return {}
        for images in zip(made_nkhwc, *others, strict=True):
            distance_kb = np.asarray(self._distances(self._params, np.concatenate(images)))[:k]
            if m:
                found.setdefault("to_given", []).append(distance_kb[:, k : k + m].mean(1))
            if features.has("real_nkhwc"):
                found.setdefault("to_real", []).append(np.diagonal(distance_kb[:, k + m :]))
        return {f"{self._name}_{name}": Measured.mean(np.stack(values)) for name, values in found.items()}
