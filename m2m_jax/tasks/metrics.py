"""Metrics: further figures of held-out sets, which `config.eval.metrics` chooses by name, beside those of the task.

A metric is a class in a module of this package, or in a config file of one's own, that registers under its name. It may
judge held-out batches, the generated images of the sample grid, or both.

Example, how far colours of generated images are from the middle, and how large the parameters are:

    @METRICS.register("contrast")
    class Contrast(Metric):
        def evaluate(self, params, frozen, batch, batch_index):
            return {"parameter_norm": jnp.sqrt(sum(jnp.sum(x**2) for x in params.values()))}

        def judge(self, samples):
            return {"contrast": samples["generated_bnhwc"].std() / 255}

        def score(self, means):  # what --config.eval.score=contrast chooses checkpoints by: lower is better
            return -means["eval/contrast"]
"""

from __future__ import annotations

import jax

from m2m_jax.core.parameters import Params
from m2m_jax.core.registry import Registry
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.tasks.protocol import Task
from m2m_jax.tasks.sample_grid import Samples


class Metric:
    """A base without figures. A subclass that has a `score`, as a task has it, can be named by `config.eval.score`.

    Attributes:
      task: of the run; its models, schedule and config are there to be used.
    """

    def __init__(self, task: Task):
        self.task = task

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Return figures of one held-out batch: scalars, or one value a set, [b]. Traceable.

        Random draws depend on the batch's index alone: every evaluation sees the same.
        """
        return {}

    def judge(self, samples: Samples) -> dict[str, float]:
        """Return figures of the images of the sample grid, as the task's `samples` names them, of all processes."""
        return {}

    def judge_sets(self, sets: Samples) -> dict[str, float]:
        """Return figures of many held-out sets that were continued, every config.eval.generate_every steps.

        Args:
          sets: "given_bmhwc", "generated_bnhwc" and, of the same places, "real_bnhwc"; of all processes.
        """
        return {}


METRICS = Registry[type[Metric]]("metric", package="m2m_jax.tasks")
