"""Distances between generated and real images as distributions, position by position: Fréchet, KID, MIND."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg

from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score


def _by_position(features: Features, distance: Callable[[np.ndarray, np.ndarray], float]) -> Measured:
    """Return a distance between samples [s, c] at every position, of any sets."""
    made_nkc, real_nkc = features.get("made_nkc"), features.get("real_nkc")

    def at(indices_s: np.ndarray) -> np.ndarray:
        return np.array(
            [distance(made_nkc[indices_s, k], real_nkc[indices_s, k]) for k in range(made_nkc.shape[1])], np.float64
        )

    return Measured(at, len(made_nkc))


def frechet_distance(first_sc: np.ndarray, second_sc: np.ndarray) -> float:
    """Return |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two samples, in float64.

    The trace of the root is the sum of the singular values of A B^T, where C1 = A^T A and C2 = B^T B: exact, and
    never complex. A and B are the centred samples, or Cholesky-like factors of the covariances where those are smaller.
    """
    first_sc, second_sc = np.asarray(first_sc, np.float64), np.asarray(second_sc, np.float64)
    difference_c = first_sc.mean(0) - second_sc.mean(0)
    factors = [_factor(x) for x in (first_sc, second_sc)]
    of_both = scipy.linalg.svdvals(factors[0] @ factors[1].T, overwrite_a=True, check_finite=False).sum()
    traces = sum((factor**2).sum() for factor in factors)
    return float(difference_c @ difference_c + traces - 2 * of_both)


def _factor(x_sc: np.ndarray) -> np.ndarray:
    """Return A with A^T A the unbiased covariance, of as few rows as it takes."""
    a_sc = (x_sc - x_sc.mean(0)) / np.sqrt(max(len(x_sc) - 1, 1))
    if len(a_sc) <= a_sc.shape[1]:
        return a_sc
    return scipy.linalg.qr(a_sc, mode="r", check_finite=False)[0][: a_sc.shape[1]]


@SCORES.register("frechet")
class Frechet(Score):
    """Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500).

    "FID" only with the Inception network of that name. It falls with N: compare equal N alone. Below as many sets as
    features, and one more, the covariances have no full rank.
    """

    needs = ("made_nkc", "real_nkc")
    better = "lower"

    def minimum(self, features: Features) -> int:
        """Return one more than there are features."""
        return features.get("made_nkc").shape[-1] + 1

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the distance between generated and real images of every place."""
        return {"frechet": _by_position(features, frechet_distance)}
