"""How a run is judged while it trains: figures of held-out sets, and a sheet of what the model makes of some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from m2m_jax.configuration import to_json
from m2m_jax.core.compilation import saying_so
from m2m_jax.core.images import write_png
from m2m_jax.core.parameters import Params
from m2m_jax.data.pipeline import SetExamples, batches, held_out_inputs, inputs, make_dataset
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.models.trained import Trained
from m2m_jax.tasks import sample_grid
from m2m_jax.tasks.metrics import METRICS, Metric
from m2m_jax.training import sharding

if TYPE_CHECKING:
    from m2m_jax.configuration import Config
    from m2m_jax.tasks.protocol import Task
    from m2m_jax.training.metrics import MetricWriter
    from m2m_jax.training.state import TrainState


_DETAIL = re.compile("/loss_by|^eval/generated/.*/(real|drift)$")  # logged, and not printed


class HeldOut:
    """Evaluate the averaged parameters of a run on the same batches every time, and draw the same grid of sets.

    Example:
        held_out = HeldOut(config, task, trained, mesh, examples, writer, workdir)
        score = held_out.evaluate(step, state, frozen)
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        trained: Trained,
        mesh: Mesh,
        examples: SetExamples,
        writer: MetricWriter,
        workdir: Path,
    ):
        """Prepare evaluations; nothing is compiled or read yet.

        Args:
          trained: which parameters train, and how all become the model's.
          examples: of the held-out split.
          workdir: gets samples/STEP.png.
        """
        self._config, self._task, self._trained, self._mesh = config, task, trained, mesh
        self._writer, self._samples = writer, workdir / "samples"
        size, threads = config.eval.batch_size, config.data.threads
        self._data = make_dataset(examples, batch_size=size, rows=sharding.local_rows(mesh, size), threads=threads)
        self._grid_size = min(sample_grid.SETS, size)
        self._grid_rows = sample_grid.rows_of_process(self._grid_size)
        self._grid_data = make_dataset(examples, batch_size=size, rows=self._grid_rows, threads=threads)

        self._num_made = min(config.eval.generate_sets, examples.num_sets) if config.eval.generate_every else 0
        self._made_rows = sample_grid.rows_of_process(self._num_made) if self._num_made else []
        if self._num_made:
            self._made_data = make_dataset(examples, batch_size=self._num_made, rows=self._made_rows, threads=threads)
        self._metrics = {name: METRICS.choose(name)(task) for name in config.eval.metrics}
        judges: dict[str, Any] = {"task": task, **self._metrics}
        judge = judges[config.eval.score]
        self._score = judge.score
        self._scores_samples = isinstance(judge, Metric) and type(judge).judge is not Metric.judge
        self._scores_sets = isinstance(judge, Metric) and type(judge).judge_sets is not Metric.judge_sets

        def of_batch(params: Params, averages: Params, *arguments) -> dict[str, jax.Array]:
            own = sharding.gathered(trained.effective(params, averages), mesh, task.compute_dtype)
            of_metrics = [metric.evaluate(own, *arguments) for metric in self._metrics.values()]
            figures = _joined(task.evaluate(own, *arguments), *of_metrics)
            return {name: jnp.mean(value) for name, value in figures.items()}

        of_batch = jax.jit(sharding.traced_on(mesh, of_batch))
        self._of_batch = saying_so("the evaluation of a batch", to_json(config), of_batch)

    def evaluate(self, step: int, state: TrainState, frozen: FrozenParams) -> float | None:
        """Log the figures of `state`, draw its grid, and return its score: lower is better.

        None where the score is of images that were not made: for want of memory, or at this step.
        """
        size = self._config.eval.batch_size
        held_out = list(batches(self._data, 0, self._config.data.prefetch, self._config.eval.batches))
        placed = (sharding.make_global_batch(self._mesh, held_out_inputs(batch), size) for batch in held_out)
        results = [self._of_batch(state.params, state.ema_params, frozen, batch, i) for i, batch in enumerate(placed)]
        means = {name: float(np.mean([float(r[name]) for r in results])) for name in results[0]}
        substituted: dict[str, float] = {}
        if self._config.data.on_error == "skip":
            found = sum(int(batch["substituted_b"].sum()) for batch in held_out)
            read = sum(len(batch["substituted_b"]) for batch in held_out)
            substituted["eval/substituted_sets"] = sets_of_all_processes(found, read, size * len(held_out))
        params = self._trained.effective(state.params, state.ema_params)
        whole = sharding.on_this_process(params, self._mesh)
        samples, judged = self._draw(step, whole), []
        if samples is not None:
            judged += [metric.judge(samples) for metric in self._metrics.values()]
        sets = self._continue(step, whole)
        if sets is not None:
            judged += [metric.judge_sets(sets) for metric in self._metrics.values()]
        if judged:
            means = _joined(means, *({name: float(value) for name, value in figures.items()} for figures in judged))
        means = {f"eval/{name}": value for name, value in means.items()}
        self._writer.scalars(step, means | substituted)
        shown = {name: value for name, value in means.items() if not _DETAIL.search(name)}
        self._writer.message(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        missing = (samples is None and self._scores_samples) or (sets is None and self._scores_sets)
        return None if missing else self._score(means)

    def _continue(self, step: int, params: Params) -> sample_grid.Samples | None:
        """Return held-out sets that are continued, of all processes; None at other steps, and where memory lacks."""
        config = self._config
        if not self._num_made or step % config.eval.generate_every:
            return None
        given = config.eval.generate_given or config.data.images_per_set // 2
        task: Any = self._task  # which `tasks/generated.py` has made sure of
        try:
            sets = task.continued(params, inputs(self._made_data[0]), self._made_rows, step, given)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sets = None
        sets = sample_grid.gather(sets, self._num_made)
        if sets is None:
            self._writer.message(f"step {step}: no memory is left to generate sets, and the run goes on without scores")
        return sets

    def _draw(self, step: int, params: Params) -> sample_grid.Samples | None:
        """Return the samples of all processes, and write them as a sheet; None where there is no memory for them."""
        try:
            samples = self._task.samples(params, inputs(self._grid_data[0]), self._grid_rows, step)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            samples = None
        samples = sample_grid.gather(samples, self._grid_size)
        if samples is None:
            # A picture is not worth a run.
            elsewhere = "; `python -m m2m_jax.sample` makes one from the checkpoint, on another machine"
            self._writer.message(
                f"step {step}: no memory is left for the sample grid, and the run goes on without it"
                + (elsewhere if self._config.task == "set_diffusion" else "")
            )
            return None
        if jax.process_index() == 0:
            grid = self._task.sheet(samples)
            self._writer.image(step, "samples", np.asarray(grid))
            write_png(self._samples / f"{step:07d}.png", grid)
        return samples


def _joined(*figures: dict) -> dict:
    """Return the figures of a task and of metrics in one. Raises ValueError for two of one name."""
    joined: dict = {}
    for some in figures:
        if twice := sorted(joined.keys() & some.keys()):
            raise ValueError(f"two metrics, or one and the task, name a figure {', '.join(twice)}: rename one")
        joined |= some
    return joined


def sets_of_all_processes(found: int, read: int, sets: int) -> int:
    """Return how many of `sets` were found in all processes, which must all call, where this one found some.

    Processes that share rows, along the axes of tensor and context, each count them.

    Args:
      found, read: of this process: sets that count, and all that it read.
    """
    counts = np.array([found, read], np.int32)
    found, read = multihost_utils.process_allgather(counts).reshape(-1, 2).sum(axis=0)
    return int(found) * sets // int(read)
