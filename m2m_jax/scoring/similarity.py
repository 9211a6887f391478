"""Likeness of single images, in the features of an encoder: to the given ones, to those before, to the real one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score


def unit(x: np.ndarray) -> np.ndarray:
    """Return vectors of unit length along the last axis, float32."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@SCORES.register("similarity")
class Similarity(Score):
    """Cosine of a generated image to others of its set ("CLIP(image, image)" of arXiv 2404.03109, table 1, if by CLIP).

    to_given: mean over the given images. to_before: mean over the given and all generated before it. to_real: the real
    image of its place. What they are compared with was left open by the paper. A copier wins them: see "copy".
    """

    needs = ("made_nkc",)
    better = "higher"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return whichever of the three there is something to compare with for."""
        made_nkc = unit(features.get("made_nkc"))
        n, k, c = made_nkc.shape
        given_nmc = unit(features.get("given_nmc")) if features.has("given_nmc") else np.zeros((n, 0, c), np.float32)
        sum_nkc = given_nmc.sum(1)[:, None] + np.cumsum(made_nkc, axis=1) - made_nkc
        count_k = given_nmc.shape[1] + np.arange(k)
        found = {}
        if given_nmc.shape[1]:
            found["similarity_to_given"] = np.einsum("nkc,nc->nk", made_nkc, given_nmc.mean(1))
            found["similarity_to_before"] = np.einsum("nkc,nkc->nk", made_nkc, sum_nkc) / count_k
        if features.has("real_nkc"):
            found["similarity_to_real"] = np.einsum("nkc,nkc->nk", made_nkc, unit(features.get("real_nkc")))
        return {name: Measured.mean(values_nk) for name, values_nk in found.items()}
