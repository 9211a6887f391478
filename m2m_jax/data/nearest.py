"""Are samples copies? A sheet of generated images beside the nearest training image of each.

    python -m m2m_jax.data.nearest --config configs/emoji.py --samples runs/emoji/test_samples --output nearest.png

`--samples` is what `m2m_jax.sample --sets` wrote. Images are compared by their shape: luminance, normalised to zero
mean and unit variance, so that a copy in other colours, on another ground or mirrored is found as well.
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.evaluation.options import CopySearch

CONFIG = define_config_flag()
OPTIONS = define_flags(CopySearch)


def main(argv):
    from m2m_jax.evaluation.copies import find_copies

    options = OPTIONS()
    print(find_copies(CONFIG.value, options).text())
    print(options.output)


if __name__ == "__main__":
    run_program(main, CONFIG.take)
