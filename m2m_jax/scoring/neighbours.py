"""Precision, recall, density and coverage: what share of images lies among the other kind's nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score

NEIGHBOURS = 5
_ROWS_AT_ONCE = 1024


def _distances(rows_nc: np.ndarray, others_mc: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of the rows and their squared distances to all others, in float64."""
    rows_nc, others_mc = np.asarray(rows_nc, np.float64), np.asarray(others_mc, np.float64)
    norm_m = (others_mc**2).sum(1)
    for first in range(0, len(rows_nc), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        x_rc = rows_nc[part]
        yield part, (x_rc**2).sum(1)[:, None] + norm_m - 2 * x_rc @ others_mc.T


def _radii(x_nc: np.ndarray) -> np.ndarray:
    """Return the squared distance [n] of each to its `NEIGHBOURS`th neighbour; it is not its own."""
    return np.concatenate([np.partition(d, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for _, d in _distances(x_nc, x_nc)])


def prdc(made_nc: np.ndarray, real_nc: np.ndarray) -> dict[str, np.ndarray]:
    """Return what each image [n] adds to precision and density (generated ones), recall and coverage (real ones)."""
    n = len(real_nc)
    made_radius_n, real_radius_n = _radii(made_nc), _radii(real_nc)
    found = {name: np.zeros(n) for name in ("precision", "recall", "density", "coverage")}
    for part, distance_rn in _distances(made_nc, real_nc):
        inside_rn = distance_rn < real_radius_n
        found["precision"][part], found["density"][part] = inside_rn.any(1), inside_rn.sum(1) / NEIGHBOURS
    for part, distance_rn in _distances(real_nc, made_nc):
        found["recall"][part] = (distance_rn < made_radius_n).any(1)
        found["coverage"][part] = distance_rn.min(1) < real_radius_n[part]
    return found


@SCORES.register("prdc")
class NearestNeighbours(Score):
    """Precision and recall (arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797), 5 neighbours.

    Precision, density: generated images lie among real ones. Recall: real ones among generated ones. Coverage: real
    ones with a generated one nearby. Intervals are over which images are counted; the neighbourhoods stay those of all.
    """

    needs = ("made_nkc", "real_nkc")
    better = "higher"

    def minimum(self, features: Features) -> int:
        """Return one more than neighbours are looked at."""
        return NEIGHBOURS + 1

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return the four, of every place."""
        made_nkc, real_nkc = features.get("made_nkc"), features.get("real_nkc")
        by_place = [prdc(made_nkc[:, k], real_nkc[:, k]) for k in range(made_nkc.shape[1])]
        return {name: Measured.mean(np.stack([one[name] for one in by_place], axis=1)) for name in by_place[0]}
