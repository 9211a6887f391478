"""A picture of image sets: one row a set, its caption beside it.

    python -m m2m_jax.data.show --config configs/emoji.py:demo --split=train --num_sets=16 --output=sets.png

Sets, choice of images and augmentation are those that the config's input pipeline would give for that split; more
images a set with --config.data.images_per_set.
"""

from absl import flags

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import reads_latents
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import write_png
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import make_dataset, open_examples
from m2m_jax.view.contact_sheet import Group, Row, contact_sheet

CONFIG = define_config_flag()
SPLIT = flags.DEFINE_string("split", "train", "Which split of the data set.")
NUM_SETS = flags.DEFINE_integer("num_sets", 16, "How many sets.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)


def main(argv):
    config = CONFIG.value
    validate(config)
    if reads_latents(config.data):
        raise UserError("config.data names latents; name the images that they were made from")
    examples = open_examples(config.data, split=SPLIT.value, seed=config.seed)
    batch = make_dataset(examples, batch_size=NUM_SETS.value)[0]
    titles = examples.titles(batch["record_index_b"])
    sets = zip(titles, batch["images_bnhwc"], strict=True)
    write_png(OUTPUT.value, contact_sheet([Row(title, [Group("", list(images_nhwc))]) for title, images_nhwc in sets]))
    print(OUTPUT.value)


if __name__ == "__main__":
    run_program(main, CONFIG.take)
