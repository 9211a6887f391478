"""Numbers that go bad: how a run goes on where loss or gradient are not finite, and warnings of gradients that jump.

The step itself has left such numbers out already (`training/step.py`); here is decided how the run goes on, by
`config.train.on_nonfinite`. All processes decide alike, for they look at the same metrics.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable

import jax

from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.configuration import Config
from m2m_jax.core.errors import UserError
from m2m_jax.data.pipeline import SetExamples, make_dataset

ROLLBACKS = 3  # from one checkpoint
SKIPS = 20  # in a row
SPIKE = 10.0  # times the median of
WINDOW = 100  # steps, of which
KNOWN_AFTER = 20  # must be there
_NAMED_SETS = 64  # in a message
_REMEDY = (
    "continue with --config.train.on_nonfinite=skip, which leaves out such steps, or rollback, which also takes back "
    "those since the last checkpoint; where it happens again, lower --config.optimizer.learning_rate"
)


class Divergence:
    """Look at the metrics of every step, in order, as soon as there is no need to wait for them.

    Example:
        divergence.add(step, metrics)
        bad_step = divergence.look(until=step - 1)
    """

    def __init__(
        self,
        config: Config,
        examples: SetExamples,
        checkpoints: Checkpointer,
        message: Callable[[str], None],
    ):
        """Begin with no step seen.

        Args:
          examples: what the run is trained on.
          checkpoints: of the run; messages name the newest.
          message: prints a line.
        """
        self._policy, self._batch_size = config.train.on_nonfinite, config.data.batch_size
        self._examples, self._checkpoints, self._message = examples, checkpoints, message
        self._unseen: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._norms: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._spikes = self._skips = self._rollbacks = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Note the metrics of a step, which may not be computed yet."""
        self._unseen.append((step, metrics))

    def look(self, until: int) -> int | None:
        """Wait for the metrics of all steps up to one, and judge them.

        Returns:
          The number of a step that the run must go back behind; None: it goes on.

        Raises:
          UserError: a step is not finite, and the policy says "stop", or has been tried for long enough.
        """
        while self._unseen and self._unseen[0][0] <= until:
            step, metrics = self._unseen.popleft()
            finite, norm = jax.device_get((metrics["finite"], metrics["gradient_norm"]))
            if finite:
                self._skips = 0
                self._compare(step, float(norm))
            elif self._policy == "skip" and self._skips < SKIPS:
                self._skips += 1
                self._message(f"{self._describe(step, metrics)}: skipped")
            elif self._policy == "rollback" and self._rollbacks < ROLLBACKS:
                self._rollbacks += 1
                self._unseen.clear()
                self._message(f"{self._describe(step, metrics)}: rolling back")
                return step
            else:
                raise UserError(f"{self._describe(step, metrics)}; {self._kept()}; {_REMEDY}")
        return None

    def saved(self) -> None:
        """Note that there is a checkpoint of the step that was looked at last."""
        self._rollbacks = 0

    def take_spikes(self) -> int:
        """Return how many gradients jumped since the last call."""
        spikes, self._spikes = self._spikes, 0
        return spikes

    def _compare(self, step: int, norm: float) -> None:
        if len(self._norms) >= KNOWN_AFTER:
            median = statistics.median(self._norms)
            if norm > SPIKE * median:
                self._spikes += 1
                times = f"{norm / median:.0f} times the median of the last {len(self._norms)} steps"
                self._message(f"step {step}: the norm of the gradient is {norm:.3g}, {times}")
        self._norms.append(norm)

    def _describe(self, step: int, metrics: dict[str, jax.Array]) -> str:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        prefix = "gradient_norm/"
        modules = ", ".join(f"{k.removeprefix(prefix)} {v:.3g}" for k, v in values.items() if k.startswith(prefix))
        # Not all of a large batch: it would be read on every host.
        named = range(min(self._batch_size, _NAMED_SETS))
        dataset = make_dataset(self._examples, batch_size=self._batch_size, rows=named)
        ids = self._examples.set_ids(dataset[step - 1 + int(values["skipped_batches"])]["record_index_b"])
        more = f" and {self._batch_size - len(ids)} more" if self._batch_size > len(ids) else ""
        return (
            f"step {step}: the loss is {values['loss']:.4g} and the norm of the gradient {values['gradient_norm']:.3g} "
            f"({modules}), of the sets {', '.join(ids)}{more}"
        )

    def _kept(self) -> str:
        self._checkpoints.wait()
        step = self._checkpoints.latest_step()
        return "no checkpoint has been saved yet" if step is None else f"the checkpoint of step {step} is good"
