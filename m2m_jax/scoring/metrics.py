"""Figures of generated sets: what a metric is given, what it returns, and which there are.

A metric is a class in a module of this package that registers in `SCORES`. It gives one value for every generated
position of a set, over all sets; intervals over sets, means over positions and tables are made by its caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class Features:
    """What there is of N sets to judge: features by one encoder, pixels, captions. All but `made_*` may be missing.

    Axes: n sets, k generated positions, m given images, c features of the encoder, t images of the training set.

    Attributes:
      encoder: its name; empty where there are pixels alone.
      made_nkc: generated images. real_nkc: the real images of the same places of the same sets.
      given_nmc: what the generated ones were made from; m may be 0.
      logits_nkl: a classifier's, of the generated images.
      text_nc: the caption of each set, in the space of the images (`SetEncoder.encode_text`).
      training_tc: images that the model was trained on.
      made_nkhwc, real_nkhwc, given_nmhwc, training_thwc: uint8 pixels of the same.
    """

    encoder: str = ""
    made_nkc: np.ndarray | None = None
    real_nkc: np.ndarray | None = None
    given_nmc: np.ndarray | None = None
    logits_nkl: np.ndarray | None = None
    text_nc: np.ndarray | None = None
    training_tc: np.ndarray | None = None
    made_nkhwc: np.ndarray | None = None
    real_nkhwc: np.ndarray | None = None
    given_nmhwc: np.ndarray | None = None
    training_thwc: np.ndarray | None = None

    def get(self, name: str) -> np.ndarray:
        """Return a field that is there.

        Raises:
          UserError: it is missing.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"this figure needs {name}, which is missing")
        return value

    def has(self, name: str) -> bool:
        """Return whether a field is there, with an image in it at least."""
        value = getattr(self, name)
        return value is not None and 0 not in value.shape[:-1]

    @property
    def num_sets(self) -> int:
        """N."""
        made = self.made_nkhwc if self.made_nkc is None else self.made_nkc
        return 0 if made is None else len(made)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One figure of all positions, over all sets or over some.

    Attributes:
      at: (indices of sets [s], repeated ones too) -> values [k], as if these were the sets.
      num_sets: N.
      per_set_nk: a value of every set, where the figure is their mean; None for a figure of distributions.

    Example, a bootstrap interval:
        draws = [measured.at(rng.integers(0, measured.num_sets, measured.num_sets)) for _ in range(200)]
    """

    at: Callable[[np.ndarray], np.ndarray]
    num_sets: int
    per_set_nk: np.ndarray | None = None

    @classmethod
    def mean(cls, per_set_nk: np.ndarray) -> Measured:
        """Return the mean over sets."""
        per_set_nk = np.asarray(per_set_nk, np.float64)
        return cls(lambda indices_s: per_set_nk[indices_s].mean(0), len(per_set_nk), per_set_nk)

    @property
    def values_k(self) -> np.ndarray:
        """Of all sets."""
        return self.at(np.arange(self.num_sets))

    def slope(self, indices_s: np.ndarray | None = None) -> float:
        """Return the drift: the slope of the least-squares line through the values, per position; 0 for one position.

        Args:
          indices_s: of sets, for intervals; None: all.
        """
        values_k = self.values_k if indices_s is None else self.at(indices_s)
        centred_k = np.arange(len(values_k)) - (len(values_k) - 1) / 2
        return float(centred_k @ values_k / max(centred_k @ centred_k, 1e-12))


class Score:
    """A base of metrics. A subclass says what it needs and gives figures.

    Attributes:
      needs: fields of `Features` that must be there.
      better: "lower" or "higher"; of real sets, where the figure is neither good nor bad by itself: "as real".
      weights: the program that makes the folder that the constructor takes; empty: it takes none.
    """

    needs: ClassVar[tuple[str, ...]]
    better: ClassVar[str]
    weights: ClassVar[str] = ""

    def __init__(self, folder: Path | None = None):
        """Make the metric.

        Args:
          folder: of weights, for those that name a program in `weights`.
        """
        self.folder = folder

    def minimum(self, features: Features) -> int:
        """Return the fewest sets that this figure can bear."""
        return 2

    def applies(self, features: Features) -> bool:
        """Return whether all that it needs is there."""
        return all(features.has(name) for name in self.needs)

    def __call__(self, features: Features) -> dict[str, Measured]:
        """Measure sets.

        Returns:
          {name: figure}; a name ends with that of the encoder, where features were used.

        Raises:
          UserError: what it needs is missing.
        """
        missing = [name for name in self.needs if not features.has(name)]
        if missing:
            raise UserError(f"{type(self).__name__} needs {' and '.join(missing)}, which these sets don't have")
        suffix = (
            f"/{features.encoder}"
            if any(name.endswith(("c", "l")) and "hwc" not in name for name in self.needs)
            else ""
        )
        return {f"{name}{suffix}": measured for name, measured in self.measure(features).items()}

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return {name: figure}, without the encoder's name."""
        raise NotImplementedError


SCORES = Registry[type[Score]]("score", package="m2m_jax.scoring")
