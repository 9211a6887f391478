"""Distances between generated and real images as distributions, place by place; and the Inception Score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import scipy.linalg
import scipy.special

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


def polynomial_mmd(made_sc: np.ndarray, real_sc: np.ndarray, indices_s: np.ndarray) -> float:
    """Return the unbiased squared MMD of some of the rows under (x y / c + 1)^3.

    Pairs of a row with itself are left out, also where a bootstrap draws it repeatedly: that keeps it unbiased.
    """
    rows, count_r = np.unique(indices_s, return_counts=True)
    made_rc, real_rc = (np.asarray(x[rows], np.float64) for x in (made_sc, real_sc))
    count_r = count_r.astype(np.float64)
    others = count_r.sum() ** 2 - (count_r**2).sum()

    def within(x_rc: np.ndarray) -> float:
        kernel_rr = _polynomial(x_rc, x_rc)
        return float((count_r @ kernel_rr @ count_r - count_r**2 @ np.diagonal(kernel_rr)) / max(others, 1))

    across = float(count_r @ _polynomial(made_rc, real_rc) @ count_r / count_r.sum() ** 2)
    return within(made_rc) + within(real_rc) - 2 * across


def _polynomial(first_sc: np.ndarray, second_sc: np.ndarray) -> np.ndarray:
    return (first_sc @ second_sc.T / first_sc.shape[1] + 1) ** 3


@SCORES.register("kid")
class KernelDistance(Score):
    """Kernel distance: unbiased squared MMD with a cubic polynomial kernel (Bińkowski et al., arXiv 1801.01401).

    "KID" only with the Inception network of that name. Unbiased: near 0, of either sign, for equal distributions,
    however few the sets. Of more than `BLOCK` sets it is the mean over blocks of them, each unbiased.
    """

    needs = ("made_nkc", "real_nkc")
    better = "lower"
    BLOCK: ClassVar[int] = 1000

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the distance between generated and real images of every place."""
        made_nkc, real_nkc = features.get("made_nkc"), features.get("real_nkc")

        def at(indices_s: np.ndarray) -> np.ndarray:
            blocks = np.array_split(indices_s, max(-(-len(indices_s) // self.BLOCK), 1))
            places = range(made_nkc.shape[1])
            return np.array(
                [np.mean([polynomial_mmd(made_nkc[:, k], real_nkc[:, k], block) for block in blocks]) for k in places]
            )

        return {"kid": Measured(at, len(made_nkc))}


def directions(dim: int, count: int = 1000) -> np.ndarray:
    """Return unit vectors [count, dim], the same ones every time."""
    drawn = np.random.Generator(np.random.Philox(0)).standard_normal((count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def sliced_wasserstein(first_sp: np.ndarray, second_sp: np.ndarray, dim: int) -> float:
    """Return 3 dim times the mean squared 2-Wasserstein distance of samples projected to p directions."""
    return float(3 * dim * np.mean((np.sort(first_sp, axis=0) - np.sort(second_sp, axis=0)) ** 2, dtype=np.float64))


@SCORES.register("mind")
class Mind(Score):
    """Sliced 2-Wasserstein distance of features, along 1,000 directions (Berthet et al., "MIND", arXiv 2605.06797).

    "MIND" only with the Inception network. Needs far fewer sets than the Fréchet distance, and sees more than means and
    covariances; but it falls with N, too: compare equal N alone.
    """

    needs = ("made_nkc", "real_nkc")
    better = "lower"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the distance between generated and real images of every place."""
        dim = features.get("made_nkc").shape[-1]
        along_cp = directions(dim).T
        made_nkp, real_nkp = (np.asarray(features.get(x), np.float32) @ along_cp for x in self.needs)

        def at(indices_s: np.ndarray) -> np.ndarray:
            places = range(made_nkp.shape[1])
            return np.array(
                [sliced_wasserstein(made_nkp[indices_s, k], real_nkp[indices_s, k], dim) for k in places], np.float64
            )

        return {"mind": Measured(at, len(made_nkp))}


def inception_score(logits_sl: np.ndarray) -> float:
    """Return exp of the mean divergence of a classifier's distributions from their mean; one split."""
    log_sl = scipy.special.log_softmax(np.asarray(logits_sl, np.float64), axis=1)
    mean_l = scipy.special.logsumexp(log_sl, axis=0) - np.log(len(log_sl))
    return float(np.exp((np.exp(log_sl) * (log_sl - mean_l)).sum(1).mean()))


@SCORES.register("inception_score")
class InceptionScore(Score):
    """Inception Score (Salimans et al., arXiv 1606.03498): sure and varied classes. One split; it grows with N.

    Of any classifier: "IS" only with the Inception network of that name.
    """

    needs = ("logits_nkl",)
    better = "higher"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the score of the generated images of every place."""
        logits_nkl = features.get("logits_nkl")

        def at(indices_s: np.ndarray) -> np.ndarray:
            return np.array([inception_score(logits_nkl[indices_s, k]) for k in range(logits_nkl.shape[1])])

        return {"inception_score": Measured(at, len(logits_nkl))}
