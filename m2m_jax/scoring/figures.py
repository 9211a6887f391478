"""Figures of generated sets beside their anchors, position by position, with intervals over sets.

figures = measure(score, features)             # a `Score`, and the features of what was made and of the real sets
figures[0].arms["ours"].values_k               # by position
figures[0].closeness                           # (shuffled - ours) / (shuffled - real): 1 is as good as real
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from m2m_jax.scoring import anchors
from m2m_jax.scoring.metrics import Features, Measured, Score

_DEVIATIONS = 1.96  # of bootstrap draws: 95 %
_OF_SPLITS = 2.26  # of `anchors.SPLITS` means, 9 degrees of freedom: 95 %
_SEED = 0  # of bootstrap draws: every arm of every figure sees the same


@dataclasses.dataclass(frozen=True)
class Arm:
    """One figure of one arm.

    Attributes:
      values_k: by position.
      draws_dk: as it would be of other sets, drawn from these; empty: no interval was wanted.
    """

    values_k: np.ndarray
    draws_dk: np.ndarray
    deviations: float = _DEVIATIONS

    @property
    def mean(self) -> float:
        """Over positions."""
        return float(self.values_k.mean())

    @property
    def deviation(self) -> float:
        """Over positions, as in table 1 of arXiv 2404.03109: of the values, not of their mean."""
        return float(self.values_k.std())

    @property
    def slope(self) -> float:
        """Of the least-squares line through the values, per position: how it drifts."""
        return Measured(lambda _: self.values_k, 1).slope()

    @property
    def half_widths_k(self) -> np.ndarray | None:
        """Of the 95 % interval of each value; None: no interval was wanted."""
        return self.deviations * self.draws_dk.std(0, ddof=1) if len(self.draws_dk) > 1 else None

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean."""
        return float(self.deviations * self.draws_dk.mean(1).std(ddof=1)) if len(self.draws_dk) > 1 else None


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of all arms.

    Attributes:
      name: with the encoder.
      better: "lower", "higher" or "as real".
      num_sets: N, the same in every arm and position.
      minimum: the fewest sets that it can bear; with fewer it was only measured because that was asked for.
      arms: {name in `anchors.ARMS`: its values}; empty where there were too few sets.
      of_sets_nk: the value of each set, where it is a mean over them.
    """

    name: str
    better: str
    num_sets: int
    minimum: int
    arms: Mapping[str, Arm]
    of_sets_nk: np.ndarray | None = None

    @property
    def too_few(self) -> bool:
        return self.num_sets < self.minimum

    @property
    def closeness(self) -> float | None:
        """(shuffled - ours) / (shuffled - real), of means over positions: 0 as sets torn apart, 1 as real ones.

        None where the two hardly differ: within the interval of their difference the figure cannot tell them apart.
        """
        if not {"ours", "real", "shuffled"} <= set(self.arms):
            return None
        shuffled, ours, real = (self.arms[name] for name in ("shuffled", "ours", "real"))
        noise = math.hypot(shuffled.half_width or 0.0, real.half_width or 0.0)
        if abs(shuffled.mean - real.mean) <= max(noise, 1e-9):
            return None
        return (shuffled.mean - ours.mean) / (shuffled.mean - real.mean)

    @property
    def closeness_half_width(self) -> float | None:
        """Of the 95 % interval of `closeness`; the arms of a draw are of the same sets."""
        if self.closeness is None or self.arms["ours"].half_width is None:
            return None
        shuffled_d, ours_d, real_d = (self.arms[name].draws_dk.mean(1) for name in ("shuffled", "ours", "real"))
        closeness_d = (shuffled_d - ours_d) / (shuffled_d - real_d)
        return float(self.arms["ours"].deviations * closeness_d.std(ddof=1))

    def as_json(self) -> dict[str, Any]:
        """Return everything as `json` can write it, without the values of single sets."""
        return {
            "name": self.name,
            "better": self.better,
            "num_sets": self.num_sets,
            "minimum_sets": self.minimum,
            "closeness": self.closeness,
            "closeness_half_width": self.closeness_half_width,
            "arms": {
                name: {
                    "by_position": arm.values_k.tolist(),
                    "half_widths": None if arm.half_widths_k is None else arm.half_widths_k.tolist(),
                    "mean": arm.mean,
                    "half_width": arm.half_width,
                    "deviation_over_positions": arm.deviation,
                    "slope": arm.slope,
                }
                for name, arm in self.arms.items()
            },
        }


def measure(
    score: Score,
    features: Features,
    beside: Mapping[str, np.ndarray] = anchors.NOTHING,
    *,
    draws: int = 200,
    allow_few: bool = False,
) -> list[Figure]:
    """Measure what was made, and its anchors.

    Args:
      features: of what was made, with the real images of the same places.
      beside: see `anchors.arms`.
      draws: of the bootstrap over sets, of figures that are means; 0: no intervals.
      allow_few: measure also where there are fewer sets than the figure can bear.
    """
    if not score.applies(features):
        return []
    measured, minimum, n = score(features), score.minimum(features), features.num_sets
    if not (_of_distributions(score) or any(one.per_set_nk is None for one in measured.values())):
        judged = anchors.arms(features, beside)
        of_arms = {arm: score(of_arm) for arm, of_arm in judged.items() if score.applies(of_arm)}
        return [
            Figure(name, score.better, n, minimum, arms, ours.per_set_nk)
            for name, ours in measured.items()
            if (arms := {arm: _of_means(found[name], draws) for arm, found in of_arms.items() if name in found})
        ]
    half = n // 2
    of_halves = _of_halves(score, features, beside, draws) if half >= minimum or allow_few else {}
    figures = [Figure(name, score.better, half, minimum, of_halves.get(name, {})) for name in measured]
    if n >= minimum or allow_few:
        for name, ours in measured.items():
            whole = {"ours": Arm(ours.values_k, np.zeros((0, 0)))}
            figures.append(Figure(f"{name}, all sets", score.better, n, minimum, whole))
    return figures


def _of_distributions(score: Score) -> bool:
    """Whether a score compares with all real images: those of the same sets would be compared with themselves."""
    return "real_nkc" in score.needs or "real_nkhwc" in score.needs


def _of_means(measured: Measured, draws: int) -> Arm:
    per_set_nk = np.asarray(measured.per_set_nk, np.float64)
    n, rng = len(per_set_nk), np.random.default_rng(_SEED)
    weights_dn = rng.multinomial(n, np.full(n, 1 / n), draws) / n
    return Arm(per_set_nk.mean(0), weights_dn @ per_set_nk)


def _of_halves(
    score: Score, features: Features, beside: Mapping[str, np.ndarray], draws: int
) -> dict[str, dict[str, Arm]]:
    """Half-sampling: of a mean, values of random halves spread as the mean of all would over other sets."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for judged_s, real_s in anchors.halves(features.num_sets):
        for arm, of_arm in anchors.arms_of_half(features, beside, judged_s, real_s).items():
            if score.applies(of_arm):
                for name, measured in score(of_arm).items():
                    found.setdefault(name, {}).setdefault(arm, []).append(measured.values_k)
    return {name: {arm: _arm(np.stack(values), draws) for arm, values in arms.items()} for name, arms in found.items()}


def _arm(split_dk: np.ndarray, draws: int) -> Arm:
    return Arm(split_dk.mean(0), split_dk if draws else split_dk[:0], _OF_SPLITS)
