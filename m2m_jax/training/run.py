"""A training run, from start or checkpoint to its end. `python -m m2m_jax.train` is this with flags.

From Python, where nothing has asked JAX for devices yet:

    from m2m_jax.configuration import Config, to_json
    from m2m_jax.training.run import train

    config = Config()
    config.train.steps = 1000
    exit_code = train(config, "runs/mine")
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.checkpoints.saved_model import FOLDER
from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, to_json
from m2m_jax.core import disk, runtime
from m2m_jax.core.compilation import compiling
from m2m_jax.core.errors import UserError
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.parameters import HostParams, count, fingerprint
from m2m_jax.core.paths import expand_home
from m2m_jax.data import transform
from m2m_jax.data.pipeline import batches, inputs, make_dataset, open_examples
from m2m_jax.models.frozen import of_models
from m2m_jax.tasks.evaluation import warn_of_one_set
from m2m_jax.tasks.registry import TASKS
from m2m_jax.training import sharding
from m2m_jax.training.divergence import Divergence
from m2m_jax.training.example_log import ExampleLog
from m2m_jax.training.held_out import HeldOut, sets_of_all_processes
from m2m_jax.training.metrics import MetricWriter
from m2m_jax.training.profiler import Profiler
from m2m_jax.training.setup import set_up
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import RESIDENT
from m2m_jax.training.throughput import Throughput
from m2m_jax.training.time_limit import TimeLimit
from m2m_jax.training.watchdog import Watchdog

COMPLETE = 0
TOTAL_STEPS = "total_steps"  # in the metadata of a checkpoint, where a time limit decided on them


def train(config: Config, workdir: str | Path) -> int:
    """Train what `config` says, or go on where the workdir holds a checkpoint.

    Call from the main thread of a process that has asked JAX for nothing yet: this sets up compilation cache, devices
    and the other processes of a launch, and listens for SIGTERM and Ctrl-C until it returns.

    Args:
      workdir: folder for checkpoints, metrics and samples; what is in it: `m2m_jax/train.py`.

    Returns:
      The exit code: 0 of a run that is complete; 75 or 130 of one that was asked to stop, and saved itself.

    Raises:
      UserError: the config, the workdir or the data are no good, or numbers are not finite.
    """
    validate(config)
    workdir = expand_home(workdir)
    disk.require_plain(workdir, "--workdir")
    runtime.start()
    with Interruption() as interruption, Watchdog() as watchdog, ExitStack() as stack:
        return Run(config, workdir, watchdog, stack).finish(interruption)


class Run:
    """One run: its fields are what it consists of, its methods what is done to them.

    Attributes:
      config, workdir: what and where.
      mesh, task, setup, frozen: devices, what is trained on them, and how; parameters of the models that do not train.
      state: all that a step changes. Not there while it is rolled back.
      step: how many steps were taken; known without waiting for the device.
      skipped_batches: how many batches no step has seen.
      checkpoints, writer, example_log: what is written.
      held_out: evaluations.
      limit: after how many steps the run ends.
      divergence, throughput, profiler, watchdog: what looks on.

    Example, one step and its evaluation:
        with ExitStack() as stack, Watchdog() as watchdog:
            run = Run(config, workdir, watchdog, stack)
            metrics = run.take_step()
            run.evaluate()
    """

    def __init__(self, config: Config, workdir: Path, watchdog: Watchdog, stack: ExitStack):
        """Make or restore the state. Where a run cannot start, nothing is written.

        Args:
          stack: closes what was open, however the run ends.
        """
        self.config, self.workdir, self.watchdog = config, workdir, watchdog
        self.mesh = sharding.make_mesh(config.mesh)
        parts = config.train.accumulation
        sharding.check_batch_size(config.data.batch_size, self.mesh, "data.batch_size", parts=parts)
        sharding.check_batch_size(config.eval.batch_size, self.mesh, "eval.batch_size")
        self.task = TASKS.choose(config.task)(config)
        train_examples, eval_examples = self._open_data()
        self.setup = set_up(self.task, config, self.mesh)
        resident = train_examples.resident
        store = {RESIDENT: {transform.RGBA: resident.rgba_nhwc}} if resident is not None else {}
        self.frozen = sharding.replicate(self.task.frozen | store, self.mesh)
        params = None if (workdir / FOLDER).exists() else self.task.init()
        self._make_workdir()
        kept = {name: getattr(config.checkpoint, name) for name in ("keep", "keep_every", "keep_best", "fallback")}
        self.checkpoints = stack.enter_context(Checkpointer(workdir, **kept))
        digests = {name: fingerprint(params) for name, params in of_models(self.task.frozen).items()}
        listings = {examples.split: examples.fingerprint for examples in (train_examples, eval_examples)}
        self.metadata = self.task.metadata | {"sha256": digests, "listings": listings}
        resumes = self.checkpoints.latest_step() is not None
        decided = self.checkpoints.metadata().get(TOTAL_STEPS) if resumes else None
        self.limit = TimeLimit(config, decided)
        self._last = self._last_step()
        self.metadata |= {TOTAL_STEPS: decided} if self.limit.decided else {}
        self.state = self._start(params)
        del params
        self.step, self.skipped_batches = int(self.state.step), int(self.state.skipped_batches)
        self.writer = MetricWriter(workdir, self.limit.total_steps, resumed_step=self.step)
        self.example_log = ExampleLog(workdir, train_examples.set_ids, self.step) if config.data.log_examples else None
        self._describe()
        if config.task == "set_diffusion" and config.data.images_per_set > 1:
            warn_of_one_set(eval_examples.num_sets, config.data.eval_split)

        trained = self.setup.trained
        self.held_out = HeldOut(config, self.task, trained, self.mesh, eval_examples, self.writer, workdir)
        self.divergence = Divergence(config, train_examples, self.checkpoints, self.writer.message)
        self.throughput = Throughput(config, self.task.compute_dtype)
        self.profiler = Profiler(config.profile.steps, workdir / "profile" / str(jax.process_index()))
        stack.callback(self.profiler.close)
        self._compiled: jax.stages.Compiled | None = None
        self._substituted = 0  # sets of this process since the last line of the log
        self._read_on()

    def finish(self, interruption: Interruption) -> int:
        """Take all steps that are left, or those until an interruption is asked for. Returns the exit code."""
        config, stopping = self.config, False
        if self.step >= self.limit.total_steps:
            self.writer.message(f"step {self.step} is saved, of {self.limit.total_steps}: nothing is left")
        while self.step < self.limit.total_steps and not stopping:
            metrics = self.take_step()
            self._look_at_the_clock(metrics)
            last, stopping = self.step == self.limit.total_steps, interruption.requested(self.step)
            logs = last or self.step % config.train.log_every == 0
            evaluates = last or self.step % config.eval.every == 0
            saves = last or stopping or self.step % config.checkpoint.every == 0
            # The host stays one step ahead of the device, and no more: a batch in flight holds memory. But what is
            # written of a step, its numbers have been looked at.
            self.divergence.add(self.step, metrics)
            bad_step = self.divergence.look(until=self.step if logs or evaluates or saves else self.step - 1)
            if bad_step:
                del metrics  # there is no room for two states, and what belongs to them
                self.roll_back(bad_step)
                stopping = False  # asked again after the next step, which can be saved
                continue
            if logs:
                self.log(metrics)
            # Evaluated before it is saved: a run that dies between the two evaluates again, one that resumes skips
            # nothing.
            with self.throughput.paused():
                score = self.evaluate() if evaluates else None
                if saves:
                    self.save(score)
        self._close()
        return interruption.exit_code() if stopping and self.step < self.limit.total_steps else COMPLETE

    def take_step(self) -> dict[str, jax.Array]:
        """Train on the next batch. Returns scalars, which may not be computed yet."""
        self.step += 1
        self.watchdog.step(self.step)
        with self.throughput.waiting():
            batch = self._next_batch()
        if self._compiled is None:
            self._compiled = self._compile(batch)
        self.profiler.begin(self.step)
        with jax.transfer_guard("disallow"):  # what the loop does not place itself would stall every step
            self.state, metrics = self._compiled(self.state, self.frozen, batch, *self._last)
        self.profiler.end(self.step, metrics)
        self.throughput.count_step()
        return metrics

    def log(self, metrics: dict[str, jax.Array]) -> None:
        """Write what a step returned, and how fast steps were since the last line."""
        scalars = {name: float(value) for name, value in metrics.items() if name != "finite"}
        updates = self.step - int(scalars["skipped_steps"]) - int(metrics["finite"])  # before this step
        scalars |= {
            "learning_rate": float(self.setup.learning_rate(updates, self.limit.total_steps)),
            "gradient_spikes": self.divergence.take_spikes(),
        }
        if self.config.data.on_error == "skip":
            sets = self._substituted, self._rows, self.config.data.batch_size
            scalars["substituted_sets"] = sets_of_all_processes(*sets)
            self._substituted = 0
        timings = self.throughput.take()
        self.writer.scalars(self.step, {f"train/{name}": value for name, value in (scalars | timings).items()})
        shown = {name: timings[name] for name in ("images_per_second", "data_wait_share")}
        self.writer.progress(self.step, loss=scalars["loss"], **shown)

    def evaluate(self) -> float | None:
        """Log the figures of held-out sets and draw some. Returns the score, as `HeldOut.evaluate`."""
        with self.watchdog.allowing("the evaluation"):
            return self.held_out.evaluate(self.step, self.state, self.frozen)

    def save(self, score: float | None) -> None:
        """Begin to save the state in the background. score: of this step's evaluation, if there was one."""
        with self.watchdog.allowing("saving"):
            frozen = of_models(self.frozen)
            self.checkpoints.save(self.step, self.state, frozen=frozen, metadata=self.metadata, score=score)
        self.divergence.saved()

    def roll_back(self, bad_step: int) -> None:
        """Go back to the last checkpoint, or the start, and on with the batch after that of the bad step."""
        with self.watchdog.allowing("the rollback"):
            del self.state  # first, for there is no room for two
            self.checkpoints.wait()
            self.state = self._start()
            self.step = int(self.state.step)
            self.skipped_batches += bad_step - self.step
            skipped = sharding.replicate(np.int32(self.skipped_batches), self.mesh)
            self.state = self.state.replace(skipped_batches=skipped)
        self.writer.rewind(self.step)
        if self.example_log:
            self.example_log.rewind(self.step)
        self.writer.message(f"rolled back to step {self.step}; {self.skipped_batches} batches are left out by now")
        self._read_on()
        self.throughput.restart()

    def _open_data(self) -> tuple:
        config = self.config
        options = {"seed": config.seed, "tokenizer": self.task.tokenizer, "with_images": self.task.needs_images}
        options |= {"attributes": self.task.attributes}
        train_examples = open_examples(config.data, split=config.data.train_split, in_step=True, **options)
        options |= {"whole_captions": True, "augment": config.eval.augment}
        eval_examples = open_examples(config.data, split=config.data.eval_split, **options)
        size, threads, workers = config.data.batch_size, config.data.threads, config.data.workers
        rows = sharding.local_rows(self.mesh, size)
        self._rows = len(rows)
        self._data = make_dataset(train_examples, batch_size=size, rows=rows, threads=threads, workers=workers)
        return train_examples, eval_examples

    def _make_workdir(self) -> None:
        try:
            (self.workdir / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.workdir} cannot be made: {error.strerror}") from error

    def _start(self, params: HostParams | None = None) -> TrainState:
        """Return the newest saved state, or the first. params: of the model at step 0, where they were made already."""
        if self.checkpoints.latest_step() is not None:
            return self.checkpoints.restore_train_state(self.setup.state, metadata=self.metadata)
        return self.setup.create(params or self.task.init())

    def _describe(self) -> None:
        self.writer.message(sharding.describe(self.setup.state.params, self.mesh))
        start = f"resumed at step {self.step}" if self.step else f"from {self.config.init.path or 'scratch'}"
        shapes = self.setup.state.params
        trained = count(self.setup.trained.of(shapes))
        self.writer.message(f"{self.task.summary}: {count(shapes):,} parameters, {trained:,} of them train, {start}")

    def _read_on(self) -> None:
        """Begin to read the batches after those that were trained on or left out."""
        self._stream = batches(self._data, self.step + self.skipped_batches, self.config.data.prefetch)
        self._substituted = 0

    def _next_batch(self) -> dict[str, jax.Array]:
        host_batch = next(self._stream)
        self._substituted += int(host_batch["substituted_b"].sum())
        if self.example_log:
            self.example_log.write(self.step, host_batch["example_index_b"], host_batch["record_index_b"])
        return sharding.make_global_batch(self.mesh, inputs(host_batch), self.config.data.batch_size)

    def _last_step(self) -> tuple[jax.Array, ...]:
        """Return what a step is told of the end: nothing where the config says it, for then it is compiled in."""
        if not self.config.train.minutes:
            return ()
        return (sharding.replicate(np.int32(self.limit.total_steps), self.mesh),)

    def _look_at_the_clock(self, metrics: dict[str, jax.Array]) -> None:
        if not self.limit.look(self.step, metrics):
            return
        self._last = self._last_step()
        self.metadata |= {TOTAL_STEPS: self.limit.decided}
        self.writer.total_steps = self.limit.total_steps
        self.writer.message(
            f"{self.limit.total_steps} steps fit into config.train.minutes={self.config.train.minutes:g}"
        )

    def _compile(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        """Compile the step, once: a batch of another shape is an error, and not a second compilation."""
        began = time.monotonic()
        about = {**to_json(self.config), **dict.fromkeys(("init", "seed", "checkpoint", "eval", "profile", "sample"))}
        with self.watchdog.allowing("compilation"), compiling("the training step", about):
            compiled = self.setup.step.lower(self.state, self.frozen, batch, *self._last).compile()
        self.writer.message(f"compiled in {time.monotonic() - began:.0f} s")
        self.throughput.restart()
        return compiled

    def _close(self) -> None:
        with self.watchdog.allowing("saving"):
            self.checkpoints.wait()
        if self.example_log:
            self.example_log.close()
        if self.step < self.limit.total_steps:
            self.writer.message(f"stopped after step {self.step}, which is saved: the same command goes on from there")
        self.writer.close()
