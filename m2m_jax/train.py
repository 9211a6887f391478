"""Trains: `python -m m2m_jax.train --config configs/emoji.py --workdir runs/emoji`.

One program for four models, chosen by the config: the autoencoder, the single-image U-Net, the text-to-image U-Net and
M2M. It resumes by itself where the workdir holds a checkpoint. The workdir receives

    checkpoints/       Orbax, with the config inside
    metrics.jsonl      one JSON object a line: step, train/..., eval/..., timings
    tensorboard/       the same, and the sample grids
    samples/           the sample grids as PNG
    examples/          with `config.data.log_examples`: which sets each process saw at which step
    profile/PROCESS/   a trace of `config.profile.steps`, for TensorBoard or Perfetto

Exit codes, and what the scripts in launch/ do:

    0     the run is complete
    2     something that starting again does not mend, named in one line: bad input, or numbers that are not finite
          (`config.train.on_nonfinite`). Not started again.
    75    stopped by SIGTERM or by a TPU's maintenance, after a step that all processes saved. Started again, however
          often it happens (GKE counts these, too).
    130   stopped by Ctrl-C: once, after a step that all processes saved; twice, at once. Not started again.
    else  it crashed or was killed. Started again, `--restarts` times.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from m2m_jax import runtime
from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.checkpoints.saved_model import FOLDER
from m2m_jax.config_flag import check_arguments, define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.data.pipeline import batches, held_out_inputs, inputs, make_dataset, open_examples
from m2m_jax.errors import UserError
from m2m_jax.images import write_png
from m2m_jax.models.frozen import of_models
from m2m_jax.models.parameters import count, fingerprint
from m2m_jax.program import run_program
from m2m_jax.tasks import sample_grid
from m2m_jax.tasks.autoencoding import Autoencoding
from m2m_jax.tasks.evaluation import warn_of_one_set
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.tasks.text_to_image import TextToImageTask
from m2m_jax.training import sharding
from m2m_jax.training.divergence import Divergence
from m2m_jax.training.example_log import ExampleLog
from m2m_jax.training.interruption import Interruption
from m2m_jax.training.metrics import MetricWriter
from m2m_jax.training.profiler import Profiler
from m2m_jax.training.setup import set_up
from m2m_jax.training.throughput import Throughput
from m2m_jax.training.watchdog import Watchdog

TASKS = {"autoencoder": Autoencoding, "set_diffusion": SetDiffusion, "text_to_image": TextToImageTask}

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and samples.", required=True)


def main(argv):
    validate(CONFIG.value)
    runtime.start()
    with Interruption() as interruption, Watchdog() as watchdog, ExitStack() as stack:
        return train(CONFIG.value, Path(WORKDIR.value), interruption, watchdog, stack)


def train(config, workdir, interruption, watchdog, stack):
    """The whole run, or what is left of it. Returns the exit code. `stack`: closes what was open, however it ends."""
    # Mesh
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.data.batch_size, mesh, "data.batch_size", parts=config.train.accumulation)
    sharding.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")

    # Task
    task = TASKS[config.task](config)

    # Data
    def batched(examples, batch_size, rows=None):
        rows = sharding.local_rows(mesh, batch_size) if rows is None else rows
        return make_dataset(examples, batch_size=batch_size, rows=rows, threads=config.data.threads)

    options = {"seed": config.seed, "tokenizer": task.tokenizer, "with_images": task.needs_images}
    train_examples = open_examples(config.data, split=config.data.train_split, **options)
    eval_examples = open_examples(config.data, split=config.data.eval_split, whole_captions=True, **options)
    train_data = batched(train_examples, config.data.batch_size)
    eval_data = batched(eval_examples, config.eval.batch_size)
    grid_size = min(sample_grid.SETS, config.eval.batch_size)
    grid_rows = sample_grid.rows_of_process(grid_size)
    grid_data = batched(eval_examples, config.eval.batch_size, grid_rows)

    # Optimizer, state; restored where the workdir holds a checkpoint
    setup = set_up(task, config, mesh)
    frozen = sharding.replicate(task.frozen, mesh)
    # A new run makes its parameters first: where it cannot start, nothing is written.
    params = None if (workdir / FOLDER).exists() else task.init()
    try:
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from error
    kept = {name: config.checkpoint[name] for name in ("keep", "keep_every", "keep_best", "fallback")}
    checkpoints = stack.enter_context(Checkpointer(workdir, **kept))

    metadata = task.metadata | {
        "sha256": {name: fingerprint(params) for name, params in of_models(task.frozen).items()}
    }

    def start_state(params=None):
        if checkpoints.latest_step() is None:
            # From NumPy, which every process holds alike and JAX may place anywhere.
            return setup.create(jax.tree.map(np.asarray, params or task.init()))
        return checkpoints.restore_train_state(setup.state, metadata=metadata)

    state = start_state(params)
    del params
    first_step, skipped_batches = int(state.step), int(state.skipped_batches)
    writer = MetricWriter(workdir, config.train.steps, resumed_step=first_step)
    example_log = ExampleLog(workdir, train_examples.set_ids, first_step) if config.data.log_examples else None
    writer.message(sharding.describe(task.shapes, mesh))
    start = f"resumed at step {first_step}" if first_step else f"from {config.init.path or 'scratch'}"
    trained = count({name: shape for name, shape in task.shapes.items() if setup.trains(name)})
    writer.message(f"{task.summary}: {count(task.shapes):,} parameters, {trained:,} of them train, {start}")
    if config.task == "set_diffusion" and config.data.images_per_set > 1:
        warn_of_one_set(eval_examples.num_sets, config.data.eval_split)

    # Steps
    def evaluate_batch(params, *arguments):
        return task.evaluate(sharding.gathered(params, mesh, task.compute_dtype), *arguments)

    eval_step = jax.jit(sharding.traced_on(mesh, evaluate_batch))

    def write_samples(step, ema_params):
        try:
            samples = task.samples(ema_params, inputs(grid_data[0]), grid_rows, step)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            samples = None
        samples = sample_grid.gather(samples, grid_size)
        if samples is None:
            # A picture is not worth a run.
            elsewhere = "; `python -m m2m_jax.sample` makes one from the checkpoint, on another machine"
            writer.message(
                f"step {step}: no memory is left for the sample grid, and the run goes on without it"
                + (elsewhere if config.task == "set_diffusion" else "")
            )
            return
        if jax.process_index() == 0:
            grid = task.sheet(samples)
            writer.image(step, "samples", np.asarray(grid))
            write_png(workdir / "samples" / f"{step:07d}.png", grid)

    def evaluate(step):
        held_out = [eval_data[i] for i in range(config.eval.batches)]
        placed = (
            sharding.make_global_batch(mesh, held_out_inputs(batch), config.eval.batch_size) for batch in held_out
        )
        results = [eval_step(state.ema_params, frozen, batch, i) for i, batch in enumerate(placed)]
        means = {f"eval/{name}": np.mean([float(r[name]) for r in results]) for name in results[0]}
        writer.scalars(step, means)
        shown = {name: value for name, value in means.items() if "/loss_by" not in name}
        writer.message(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        write_samples(step, sharding.on_this_process(state.ema_params, mesh))
        return task.score(means)

    # Loop
    def stream_from(batch_index):
        return batches(train_data, batch_index, config.data.prefetch)

    divergence = Divergence(config, train_examples, checkpoints, writer.message)
    throughput = Throughput(config)
    profiler = Profiler(config.profile.steps, workdir / "profile" / str(jax.process_index()))
    stack.callback(profiler.close)
    stream, step, compiled = stream_from(first_step + skipped_batches), first_step, None
    substituted = 0  # sets of this process since the last line of the log
    while step < config.train.steps:
        step += 1
        watchdog.step(step)
        with throughput.waiting():
            host_batch = next(stream)
            substituted += int(host_batch["substituted_b"].sum())
            if example_log:
                example_log.write(step, host_batch["example_index_b"], host_batch["record_index_b"])
            batch = sharding.make_global_batch(mesh, inputs(host_batch), config.data.batch_size)
        if compiled is None:
            # Once: a batch of another shape is an error, and not a second compilation.
            began = time.monotonic()
            with watchdog.allowing("compilation"):
                compiled = setup.step.lower(state, frozen, batch).compile()
            writer.message(f"compiled in {time.monotonic() - began:.0f} s")
            throughput.restart()
        profiler.begin(step)
        with jax.transfer_guard("disallow"):  # what the loop does not place itself would stall every step
            state, metrics = compiled(state, frozen, batch)
        profiler.end(step, metrics)
        throughput.count_step()

        last, stopping = step == config.train.steps, interruption.requested(step)
        logs = last or step % config.train.log_every == 0
        evaluates = last or step % config.eval.every == 0
        saves = last or stopping or step % config.checkpoint.every == 0
        # The host stays one step ahead of the device, and no more: a batch in flight holds memory. But what is written
        # of a step, its numbers have been looked at.
        divergence.add(step, metrics)
        bad_step = divergence.look(until=step if logs or evaluates or saves else step - 1)

        if bad_step:
            # Back to the last checkpoint, and on with the batch after the bad one.
            with watchdog.allowing("the rollback"):
                state = batch = metrics = None  # first, for there is no room for two
                checkpoints.wait()
                state = start_state()
                step = int(state.step)
                skipped_batches += bad_step - step
                state = state.replace(skipped_batches=sharding.replicate(np.int32(skipped_batches), mesh))
            writer.rewind(step)
            if example_log:
                example_log.rewind(step)
            writer.message(f"rolled back to step {step}; {skipped_batches} batches are left out by now")
            stream, substituted = stream_from(step + skipped_batches), 0
            throughput.restart()
            continue

        if logs:
            scalars = {name: float(value) for name, value in metrics.items() if name != "finite"}
            updates = step - int(scalars["skipped_steps"]) - int(metrics["finite"])  # before this step
            scalars |= {"learning_rate": setup.learning_rate(updates), "gradient_spikes": divergence.take_spikes()}
            if config.data.on_error == "skip":
                # Processes that share rows, along the axes of tensor and context, each count them.
                rows = np.int32([substituted, len(host_batch["substituted_b"])])
                found, read = multihost_utils.process_allgather(rows).reshape(-1, 2).sum(axis=0)
                scalars["substituted_sets"] = int(found) * config.data.batch_size // int(read)
                substituted = 0
            timings = throughput.take()
            writer.scalars(step, {f"train/{name}": value for name, value in (scalars | timings).items()})
            shown = {name: timings[name] for name in ("images_per_second", "data_wait_share")}
            writer.progress(step, loss=scalars["loss"], **shown)

        # Evaluated before it is saved: a run that dies between the two evaluates again, one that resumes skips nothing.
        with throughput.paused():
            score = None
            if evaluates:
                with watchdog.allowing("the evaluation"):
                    score = evaluate(step)
            if saves:
                with watchdog.allowing("saving"):
                    checkpoints.save(step, state, frozen=of_models(frozen), metadata=metadata, score=score)
                divergence.saved()
        if stopping:
            break

    with watchdog.allowing("saving"):
        checkpoints.wait()
    if example_log:
        example_log.close()
    complete = step == config.train.steps
    if not complete:
        writer.message(f"stopped after step {step}, which is saved: the same command goes on from there")
    writer.close()
    return 0 if complete else interruption.exit_code()


if __name__ == "__main__":
    run_program(main, check_arguments)
