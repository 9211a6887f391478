"""Trains: `python -m m2m_jax.train --config configs/emoji.py --workdir runs/emoji`.

One program for the three models, chosen by the config: the autoencoder, the single-image U-Net and M2M. It resumes by
itself where the workdir holds a checkpoint. The workdir receives

    checkpoints/       Orbax, with the config inside
    metrics.jsonl      one JSON object a line: step, train/..., eval/..., timings
    tensorboard/       the same, and the sample grids
    samples/           the sample grids as PNG
    profile/           a trace of `config.profile.steps`, for TensorBoard or Perfetto
"""

import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from m2m_jax import runtime
from m2m_jax.configuration import check_arguments, define_config_flag, validate
from m2m_jax.data.pipeline import batches, inputs, make_dataset, open_examples
from m2m_jax.errors import UserError
from m2m_jax.images import write_png
from m2m_jax.models.parameters import count
from m2m_jax.program import run_program
from m2m_jax.training import sharding
from m2m_jax.training.autoencoding import Autoencoding
from m2m_jax.training.checkpoint import FOLDER, Checkpointer
from m2m_jax.training.metrics import MetricWriter
from m2m_jax.training.set_diffusion import SetDiffusion
from m2m_jax.training.setup import set_up

PREVIEW_SETS = 8  # in a sample grid
TASKS = {"autoencoder": Autoencoding, "set_diffusion": SetDiffusion}

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and samples.", required=True)


def main(argv):
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    validate(config)
    runtime.start()

    # Mesh
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.data.batch_size, mesh, "data.batch_size", parts=config.train.accumulation)
    sharding.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")

    # Data
    def batched(examples, batch_size):
        return make_dataset(examples, batch_size=batch_size, rows=sharding.local_rows(mesh, batch_size))

    train_examples = open_examples(config.data, split=config.data.train_split, seed=config.seed)
    eval_examples = open_examples(config.data, split=config.data.eval_split, seed=config.seed)
    train_data = batched(train_examples, config.data.batch_size)
    eval_data = batched(eval_examples, config.eval.batch_size)

    # Task, optimizer, state; restored where the workdir holds a checkpoint
    task = TASKS[config.task](config)
    setup = set_up(task, config, mesh)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    # A new run makes its parameters first: where it cannot start, nothing is written.
    params = None if (workdir / FOLDER).exists() else task.init()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from error
    checkpoints = Checkpointer(workdir, keep=config.checkpoint.keep)
    if checkpoints.latest_step() is None:
        # From NumPy, which every process holds alike and JAX may place anywhere.
        state = setup.create(jax.tree.map(np.asarray, params or task.init()))
        del params
    else:
        state = checkpoints.restore_train_state(setup.state)
    first_step = int(state.step)
    writer = MetricWriter(workdir, config.train.steps, resumed_step=first_step)
    writer.message(sharding.describe(task.shapes, mesh))
    start = f"resumed at step {first_step}" if first_step else f"from {config.init.path or 'scratch'}"
    trained = count({name: shape for name, shape in task.shapes.items() if setup.trains(name)})
    writer.message(f"{task.summary}: {count(task.shapes):,} parameters, {trained:,} of them train, {start}")

    # Steps
    eval_step = jax.jit(sharding.traced_on(mesh, task.evaluate))

    def evaluate(step):
        held_out = [eval_data[i] for i in range(config.eval.batches)]
        results = [
            eval_step(
                state.ema_params, frozen, sharding.make_global_batch(mesh, inputs(batch), config.eval.batch_size), i
            )
            for i, batch in enumerate(held_out)
        ]
        means = {f"eval/{name}": np.mean([float(r[name]) for r in results]) for name in results[0]}
        writer.scalars(step, means)
        shown = {name: value for name, value in means.items() if "/loss_by" not in name}
        writer.message(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        ema_params = sharding.on_this_process(state.ema_params, mesh)
        if jax.process_index() == 0:
            grid = task.preview(ema_params, {name: x[:PREVIEW_SETS] for name, x in held_out[0].items()}, step)
            writer.image(step, "samples", np.asarray(grid))
            (workdir / "samples").mkdir(exist_ok=True)
            write_png(workdir / "samples" / f"{step:07d}.png", grid)

    # Loop
    images_per_step = config.data.batch_size * config.data.images_per_set
    stream = batches(train_data, first_step, config.data.prefetch, config.data.threads)
    compiled, metrics, data_wait, steps_timed, clock = None, None, 0.0, 0, time.monotonic()
    substituted = 0  # sets of this process since the last line of the log
    for step in range(first_step + 1, config.train.steps + 1):
        waited = time.monotonic()
        host_batch = next(stream)
        substituted += int(host_batch["substituted_b"].sum())
        batch = sharding.make_global_batch(mesh, inputs(host_batch), config.data.batch_size)
        data_wait += time.monotonic() - waited
        previous_metrics = metrics
        if compiled is None:
            # Once: a batch of another shape is an error, and not a second compilation.
            compiled = setup.step.lower(state, frozen, batch).compile()
            device_flops = compiled.cost_analysis().get("flops", 0.0)
            writer.message(
                f"compiled in {time.monotonic() - clock:.0f} s: {device_flops / 1e9:,.1f} GFLOP a device and step"
            )
            clock = time.monotonic()
        if step == config.profile.steps[0]:
            jax.profiler.start_trace(str(workdir / "profile"))
        with jax.transfer_guard("disallow"):  # what the loop does not place itself would stall every step
            state, metrics = compiled(state, frozen, batch)
        if step == config.profile.steps[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
        # The host stays one step ahead of the device, and no more: a batch in flight holds memory.
        jax.block_until_ready(previous_metrics)
        steps_timed += 1

        if step % config.train.log_every == 0 or step == config.train.steps:
            scalars = {name: float(value) for name, value in metrics.items()}
            seconds = time.monotonic() - clock
            rate, share = images_per_step * steps_timed / seconds, data_wait / seconds
            timings = {
                "images_per_second": rate,
                "step_seconds": seconds / steps_timed,
                "data_wait_share": share,
                "device_flops_per_second": device_flops * steps_timed / seconds,
            }
            memory = jax.local_devices()[0].memory_stats()
            if memory:  # a CPU has none
                timings["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
            if config.data.on_error == "skip":
                timings["substituted_sets"] = multihost_utils.process_allgather(np.int32(substituted)).sum()
                substituted = 0
            logged = scalars | timings | {"learning_rate": setup.learning_rate(step - 1)}
            writer.scalars(step, {f"train/{name}": value for name, value in logged.items()})
            writer.progress(step, loss=scalars["loss"], images_per_second=rate, data_wait_share=share)
            if not np.isfinite(scalars["loss"]):
                raise FloatingPointError(f"the loss of step {step} is {scalars['loss']}; the last checkpoint is whole")
            data_wait, steps_timed, clock = 0.0, 0, time.monotonic()

        # Evaluated before it is saved: a run that dies between the two evaluates again, one that resumes skips nothing.
        last, paused = step == config.train.steps, time.monotonic()
        if last or step % config.eval.every == 0:
            evaluate(step)
        if last or step % config.checkpoint.every == 0:
            checkpoints.save(step, state, frozen=frozen, metadata=task.metadata)
        clock += time.monotonic() - paused

    checkpoints.close()
    writer.close()


if __name__ == "__main__":
    run_program(main, check_arguments)
