"""Read a whole data set, every image of it, and say what is wrong with it.

    python -m m2m_jax.data.check DIR
    python -m m2m_jax.data.check --config configs/emoji.py --config.data.name=folder --config.data.path=DIR

DIR is a folder of folders of images, the output of `m2m_jax.data.precompute` or of `m2m_jax.data.build_mis`, or the
directory of prepared data sets.
A config names the data set as for training, and its data.images_per_set is asked of every set. All splits are read.
Prints a report and writes a sheet of thumbnails, sets with problems first. Exit code 0: clean, 1: problems, 2: DIR
can't be checked.
"""

from collections.abc import Sequence

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import DataCheck

CONFIG = define_config_flag(required=False)
OPTIONS = define_flags(DataCheck)


def main(argv: Sequence[str]) -> int:
    from m2m_jax.data.checking import check_data, configured_sources
    from m2m_jax.data.source import find_sources

    options, config = OPTIONS(), CONFIG.value
    if (config is None) == (len(argv) < 2):
        raise UserError("name the data set once: python -m m2m_jax.data.check DIR, or --config")
    if config is None:
        summary = check_data(find_sources(argv[1]), options)
    else:
        summary = check_data(configured_sources(config), options, config.data.images_per_set)
    print(summary.text(options.max_problems))
    if options.output:
        print(options.output)
    return 1 if summary.problems else 0


if __name__ == "__main__":
    run_program(main, CONFIG.take, arguments=1)
