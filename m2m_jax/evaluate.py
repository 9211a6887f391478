"""Is the context used, on any image sets? Several runs side by side, on the same sets, noise and timesteps.

    python -m m2m_jax.evaluate --config configs/emoji.py:demo --checkpoints=runs/a,runs/b --output=table.json

The config says what the sets are: its data source, images a set, augmentation, seed and the size of a batch; of a run
all but the parameters and what its checkpoint says of them is ignored. For the last image of each set: the denoising
loss with the images before it as context, with those of another set in their place, and with fewer of its own
(`evaluation/context.py`). Losses of runs with different autoencoders or noise schedules are not of one kind, and
refused. All devices of `config.mesh` share each batch; a launch of several processes makes the same table.
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.evaluation.options import ContextEvaluation

CONFIG = define_config_flag()
OPTIONS = define_flags(ContextEvaluation)


def main(argv):
    from m2m_jax.evaluation.context import evaluate_context

    if report := evaluate_context(CONFIG.value, OPTIONS()):
        print(report.text())


if __name__ == "__main__":
    run_program(main, CONFIG.take)
