"""Scores of generated sets while a run trains: cheap ones, of a few hundred sets, beside those of real ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import fingerprint
from m2m_jax.models.frozen import IMAGE_ENCODER
from m2m_jax.scoring.encoders import SET_ENCODERS, require_unseen
from m2m_jax.scoring.figures import Figure, measure
from m2m_jax.scoring.judging import make_named
from m2m_jax.scoring.metrics import SCORES, Features
from m2m_jax.tasks.metrics import METRICS, Metric
from m2m_jax.tasks.protocol import Task
from m2m_jax.tasks.sample_grid import Samples


@METRICS.register("generated")
class Generated(Metric):
    """What config.eval.generate_scores says of sets that are continued every config.eval.generate_every steps.

    Of each figure: its mean over positions; /real, the same of the real images; /drift, how much more it changes from
    position to position than that of real images does.
    """

    def __init__(self, task: Task):
        """Read the weights that the config names.

        Raises:
          UserError: there is no such encoder or score, the encoder is the one that the model attends to, or the task
            continues no sets.
        """
        super().__init__(task)
        of_task: Any = task  # whose config is there, whatever the protocol says
        config, frozen = of_task.config, task.frozen
        images, given = config.data.images_per_set, config.eval.generate_given
        if not hasattr(task, "continued"):
            raise UserError(f"config.eval.metrics has generated, and task={config.task} continues no sets")
        if images < 2 or given >= images:
            raise UserError(
                f"config.eval.generate_given is {given}, and config.data.images_per_set {images}: none is left to make"
            )
        self._encoder = make_named(SET_ENCODERS.choose, config.eval.generate_encoder)
        if IMAGE_ENCODER in frozen:
            require_unseen(self._encoder, {fingerprint(frozen[IMAGE_ENCODER])})
        self._scores = [make_named(SCORES.choose, text) for text in config.eval.generate_scores]
        self._judge: Figure | None = None  # what ranks checkpoints: the first figure

    def judge_sets(self, sets: Samples) -> dict[str, float]:
        """Return all figures of the continued sets."""
        encoded = {name: self._encode(images) for name, images in sets.items()}
        features = Features(
            encoder=self._encoder.name,
            made_nkc=encoded["generated_bnhwc"],
            real_nkc=encoded["real_bnhwc"],
            given_nmc=encoded["given_bmhwc"],
            made_nkhwc=sets["generated_bnhwc"],
            real_nkhwc=sets["real_bnhwc"],
            given_nmhwc=sets["given_bmhwc"],
        )
        found: dict[str, float] = {}
        self._judge = None
        for score in self._scores:
            for figure in measure(score, features, draws=0, allow_few=True) if score.applies(features) else ():
                if not {"ours", "real"} <= figure.arms.keys():
                    continue
                self._judge = self._judge or figure
                ours, real = figure.arms["ours"], figure.arms["real"]
                found |= {figure.name: ours.mean, f"{figure.name}/real": real.mean}
                found[f"{figure.name}/drift"] = ours.slope - real.slope
        return {f"generated/{name}": value for name, value in found.items()}

    def score(self, means: dict[str, float]) -> float:
        """Return how bad the first figure is: where it should be as of real sets, how far from theirs."""
        if self._judge is None:
            raise KeyError("generated")  # none were made at this step
        ours = means[f"eval/generated/{self._judge.name}"]
        if self._judge.better == "as real":
            return abs(ours - means[f"eval/generated/{self._judge.name}/real"])
        return ours if self._judge.better == "lower" else -ours

    def _encode(self, images_bnhwc: np.ndarray) -> np.ndarray:
        b, n, *image = images_bnhwc.shape
        return self._encoder(images_bnhwc.reshape(-1, *image)).reshape(b, n, -1)
