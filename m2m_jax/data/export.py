"""Write image sets as a folder of folders of PNGs, as `m2m_jax.sample --sets` and `data.name=folder` read them.

    python -m m2m_jax.data.export --config configs/emoji.py:demo --split=test --num_sets=12 --output=runs/demo/test_sets

Sets, choice of images and augmentation are those that the config's input pipeline would give for that split.
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.data.options import SetExport

CONFIG = define_config_flag()
OPTIONS = define_flags(SetExport)


def main(argv):
    from m2m_jax.data.excerpt import export_sets

    config, options = CONFIG.value, OPTIONS()
    export_sets(config, options)
    print(f"{options.output}: {options.num_sets} sets of {config.data.images_per_set} images")


if __name__ == "__main__":
    run_program(main, CONFIG.take)
