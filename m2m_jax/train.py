"""Train: `python -m m2m_jax.train --config configs/emoji.py --workdir runs/emoji`.

From Python: `m2m_jax.training.run.train(config, workdir)`.

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
          often it happens, as long as each start saves something (GKE counts these, too).
    130   stopped by Ctrl-C: once, after a step that all processes saved; twice, at once. Not started again.
    else  it crashed or was killed. Started again, `--restarts` times.
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.training.options import TrainingRun

CONFIG = define_config_flag()
RUN = define_flags(TrainingRun)


def main(argv) -> int:
    from m2m_jax.training.run import train

    return train(CONFIG.value, RUN().workdir)


if __name__ == "__main__":
    run_program(main, CONFIG.take)
