"""How many steps a run of so many minutes takes: found from the speed of its first ones, once, and kept."""

from __future__ import annotations

import math
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from m2m_jax.configuration import Config

# The first steps after compilation still fill queues and caches. Those between these two are timed.
BEGIN, END = 5, 25
STEPS_SHARE = 0.9  # of the time that is left; evaluations, samples and checkpoints have the rest


class TimeLimit:
    """Decide after how many steps a run ends that `config.train.minutes` limits.

    The learning rate has to reach zero with the last step, so a run cannot just stop when its time is up. It counts
    from when the model is there, compilation included, and is decided when the 25th step has been taken: a run of
    `train.steps` of that number has the same numbers. A run that is stopped and resumed keeps what was decided, so its
    minutes are those of computing, not of the clock on the wall. All processes decide alike.

    Example:
        limit = TimeLimit(config, decided=None)
        while step < limit.total_steps:
            metrics = take_step()
            limit.look(step, metrics)
    """

    def __init__(self, config: Config, decided: int | None):
        """Begin to count. decided: what the checkpoint says that was decided; None of a new run."""
        self._minutes, self._warmup = config.train.minutes, config.optimizer.warmup_steps
        self._began, self._timed_from, self._first = time.monotonic(), 0.0, 0
        self.decided = decided if self._minutes else None
        self.total_steps = min(config.train.steps, self.decided or config.train.steps)

    def look(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Look at the clock after a step, which returned `metrics`. Returns whether the number was decided just now."""
        if not self._minutes or self.decided:
            return False
        self._first = self._first or step
        if step - self._first not in (BEGIN, END):
            return False
        jax.block_until_ready(metrics)
        if step - self._first == BEGIN:
            self._timed_from = time.monotonic()
            return False
        now = time.monotonic()
        step_seconds = (now - self._timed_from) / (END - BEGIN)
        left = STEPS_SHARE * (60 * self._minutes - (now - self._began))
        total = max(step + math.floor(left / step_seconds), step + 1, self._warmup + 1)
        total = min(total, self.total_steps)
        self.decided = self.total_steps = int(multihost_utils.broadcast_one_to_all(np.int32(total)))
        return True
