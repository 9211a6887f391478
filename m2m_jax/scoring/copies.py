"""Are generated images copies? Of a given image, of a training image; mirrored and in other colours, too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from m2m_jax.data.likeness import COPY, likeness, likeness_to, shapes
from m2m_jax.scoring.metrics import SCORES, Features, Measured, Score


def nearest_given(made_nkhwc: np.ndarray, given_nmhwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeness [n, k] of each image to the given one of its set that is most alike, and which [n, k]."""
    likeness_nkm = np.stack([likeness(made, given) for made, given in zip(made_nkhwc, given_nmhwc, strict=True)])
    return likeness_nkm.max(2), likeness_nkm.argmax(2)


def nearest_training(made_nkhwc: np.ndarray, training_thwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeness [n, k] of each image to the training image that is most alike, and which [n, k]."""
    training_td = shapes(training_thwc)
    best = [(x.max(1), x.argmax(1)) for x in (likeness_to(made_khwc, training_td) for made_khwc in made_nkhwc)]
    return np.stack([values for values, _ in best]), np.stack([where for _, where in best])


@SCORES.register("copy")
class Copy(Score):
    """Correlation of luminance with the nearest given and the nearest training image, mirrored ones, too.

    1: the same up to colour. copied_*: the share of images above 0.95 (`data.likeness.COPY`). Real sets say how much of
    it is no fault.
    """

    needs = ("made_nkhwc",)
    better = "as real"

    def measure(self, features: Features) -> Mapping[str, Measured]:
        """Return both, of whichever there is something to look in."""
        made_nkhwc, found = features.get("made_nkhwc"), {}
        if features.has("given_nmhwc"):
            found["given"] = nearest_given(made_nkhwc, features.get("given_nmhwc"))[0]
        if features.has("training_thwc"):
            found["training"] = nearest_training(made_nkhwc, features.get("training_thwc"))[0]
        return {f"likeness_to_{name}": Measured.mean(x_nk) for name, x_nk in found.items()} | {
            f"copied_{name}": Measured.mean(x_nk > COPY) for name, x_nk in found.items()
        }
