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


@SCORES.register("text_similarity")
class TextSimilarity(Score):
    """Cosine of a generated image to the caption of its set: "CLIP(text, image)" by CLIP (arXiv 2104.08718, unscaled).

    Papers print 100 times it. By another pair of encoders it bears their name, and is no CLIP score.
    """

    needs = ("made_nkc", "text_nc")
    better = "higher"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return it of every place."""
        values_nk = np.einsum("nkc,nc->nk", unit(features.get("made_nkc")), unit(features.get("text_nc")))
        return {"text_similarity": Measured.mean(values_nk)}


@SCORES.register("diversity")
class Diversity(Score):
    """How much the generated images of a set differ: mean of 1 - cosine of each to the others.

    0: all alike (collapse, or a copier). Real sets say how much is right: more is drift apart.
    """

    needs = ("made_nkc",)
    better = "as real"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return it of every place; nothing where one image is generated."""
        made_nkc = unit(features.get("made_nkc"))
        if made_nkc.shape[1] < 2:
            return {}
        cosine_nkk = np.einsum("nkc,njc->nkj", made_nkc, made_nkc)
        others_nk = (cosine_nkk.sum(2) - np.einsum("nkk->nk", cosine_nkk)) / (made_nkc.shape[1] - 1)
        return {"diversity": Measured.mean(1 - others_nk)}


@SCORES.register("nearest")
class Nearest(Score):
    """Cosine of a generated image to the most similar given one, and to the most similar image of the training set.

    As ViStoryBench's copy-paste score (arXiv 2505.24862), which takes the given ones. Beyond what real sets have it is
    copying. The look for exact and mirrored copies is "copy".
    """

    needs = ("made_nkc",)
    better = "as real"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return whichever of the two there is something to look in for."""
        made_nkc, found = unit(features.get("made_nkc")), {}
        if features.has("given_nmc"):
            given_nmc = unit(features.get("given_nmc"))
            found["nearest_given"] = np.einsum("nkc,nmc->nkm", made_nkc, given_nmc).max(2)
        if features.has("training_tc"):
            training_ct = unit(features.get("training_tc")).T
            found["nearest_training"] = np.stack([(made_kc @ training_ct).max(1) for made_kc in made_nkc])
        return {name: Measured.mean(values_nk) for name, values_nk in found.items()}
