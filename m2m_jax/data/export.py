"""Writes image sets as a folder of folders of PNGs, as `m2m_jax.sample --sets` and `data.name=folder` read them.

    python -m m2m_jax.data.export --config configs/emoji.py:demo --split=test --num_sets=12 --output=runs/demo/test_sets

Sets, choice of images and augmentation are those that the config's input pipeline would give for that split.
"""

from pathlib import Path

from absl import flags

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import reads_latents
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import write_png
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import make_dataset, open_examples

CONFIG = define_config_flag()
SPLIT = flags.DEFINE_string("split", "test", "Which split of the data set.")
NUM_SETS = flags.DEFINE_integer("num_sets", 12, "How many sets.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)


def main(argv):
    config, output = CONFIG.value, Path(OUTPUT.value)
    validate(config)
    if reads_latents(config.data):
        raise UserError(
            f"config.data.name={config.data.name} gives latents; name the data set of images that they were made from"
        )
    if NUM_SETS.value < 1:
        raise UserError(f"--num_sets must be at least 1, not {NUM_SETS.value}")
    disk.require_new(output)
    examples = open_examples(config.data, split=SPLIT.value, seed=config.seed)
    sets = make_dataset(examples, batch_size=NUM_SETS.value)[0]

    with disk.new_folder(output) as aside:
        for s, images_nhwc in enumerate(sets["images_bnhwc"]):
            folder = aside / f"{s:03d}"
            folder.mkdir()
            for i, image_hwc in enumerate(images_nhwc):
                write_png(folder / f"{i:03d}.png", image_hwc)
    print(f"{output}: {NUM_SETS.value} sets of {config.data.images_per_set} images")


if __name__ == "__main__":
    run_program(main, CONFIG.take)
