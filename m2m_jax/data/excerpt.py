"""Some sets of a split as people look at them: a picture, or folders of PNGs.

Sets, choice of images and augmentation are those that the config's input pipeline gives for that split.
"""

from __future__ import annotations

import numpy as np

from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, reads_latents
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import write_png
from m2m_jax.data.options import SetExport, SetSheet
from m2m_jax.data.pipeline import make_dataset, open_examples
from m2m_jax.view.contact_sheet import Group, Row, contact_sheet


def draw_sets(config: Config, options: SetSheet) -> None:
    """Write a picture of sets: one row a set, its caption above it.

    Raises:
      UserError: the data cannot be used as the config asks, or the file cannot be written.
    """
    titles, images_bnhwc = read_sets(config, options.split, options.num_sets)
    rows = [Row(title, [Group("", list(images_nhwc))]) for title, images_nhwc in zip(titles, images_bnhwc, strict=True)]
    write_png(options.output, contact_sheet(rows))


def export_sets(config: Config, options: SetExport) -> None:
    """Write sets as a new folder of folders of PNGs, 000/000.png and so on, as the sampler and data.name=folder read.

    Raises:
      UserError: the data cannot be used as the config asks, or the folder exists or cannot be written.
    """
    disk.require_new(options.output)
    _, images_bnhwc = read_sets(config, options.split, options.num_sets)
    with disk.new_folder(options.output) as aside:
        for s, images_nhwc in enumerate(images_bnhwc):
            folder = aside / f"{s:03d}"
            folder.mkdir()
            for i, image_hwc in enumerate(images_nhwc):
                write_png(folder / f"{i:03d}.png", image_hwc)


def read_sets(config: Config, split: str, num_sets: int) -> tuple[list[str], np.ndarray]:
    """Return the first sets of a split: what each shows, and uint8 [num_sets, N, S, S, 3].

    Raises:
      UserError: the config names latents, or the data cannot be used as it asks.
    """
    validate(config.data)
    if reads_latents(config.data):
        raise UserError(
            f"config.data.name={config.data.name} gives latents; name the data set of images that they were made from"
        )
    examples = open_examples(config.data, split=split, seed=config.seed)
    batch = make_dataset(examples, batch_size=num_sets)[0]
    return examples.titles(batch["record_index_b"]), batch["images_bnhwc"]
