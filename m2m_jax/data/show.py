"""A picture of image sets: one row a set, its caption beside it.

    python -m m2m_jax.data.show --config configs/emoji.py:demo --split=train --num_sets=16 --output=sets.png

Sets, choice of images and augmentation are those that the config's input pipeline would give for that split; more
images a set with --config.data.images_per_set.
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import SetSheet

CONFIG = define_config_flag()
OPTIONS = define_flags(SetSheet)


def main(argv):
    from m2m_jax.data.excerpt import draw_sets

    options = OPTIONS()
    draw_sets(CONFIG.value, options)
    print(options.output)


if __name__ == "__main__":
    run_program(main, CONFIG.take)
