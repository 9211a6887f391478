"""Are samples copies? A sheet of generated images beside the nearest training image of each.

    python -m m2m_jax.data.nearest --config configs/emoji.py --samples runs/emoji/test_samples --output nearest.png

`--samples` is what `m2m_jax.sample --sets` wrote. Images are compared by their shape: luminance, normalised to zero
mean and unit variance, so that a copy in other colours, on another ground or mirrored is found as well.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from m2m_jax.config_flag import check_arguments, define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.data.likeness import COPY, likeness, likeness_to, shapes
from m2m_jax.data.pipeline import SOURCES
from m2m_jax.errors import UserError
from m2m_jax.images import decode_image, fit_square, on_white, read_image, write_png
from m2m_jax.program import run_program
from m2m_jax.sampling.contact_sheet import Row, contact_sheet, context, generated, nearest

CONFIG = define_config_flag()
SAMPLES = flags.DEFINE_string("samples", None, "Output folder of m2m_jax.sample --sets.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)


def main(argv):
    config = CONFIG.value
    validate(config)
    size = config.data.image_size
    records = sorted(Path(SAMPLES.value).glob("*/sample.json"))
    if not records:
        raise UserError(
            f"--samples={SAMPLES.value} holds no folder with a sample.json; make it with m2m_jax.sample --sets"
        )
    training_nhwc = training_images(config.data)
    training_shapes = shapes(training_nhwc)

    rows, similarities = [], {"nearest in training": [], "nearest in the context": []}
    for record in records:
        given = [read_image(file, size) for file in context_files(record)]
        new = [read_image(file, size) for file in sorted(record.parent.glob("[0-9]*.png"))]
        similarity_gn = likeness_to(np.stack(new), training_shapes)
        found = similarity_gn.argmax(1)
        similarities["nearest in training"].extend(similarity_gn.max(1))
        if given:
            similarities["nearest in the context"].extend(likeness(np.stack(new), np.stack(given)).max(1))
        rows.append(Row(record.parent.name, [context(given), generated(new), nearest(list(training_nhwc[found]))]))
    write_png(OUTPUT.value, contact_sheet(rows))
    print("shape similarity of generated images (1: the same up to colour)")
    for name, values in similarities.items():
        if values:
            copies = np.mean(np.array(values) > COPY)
            print(
                f"  {name}, {len(values)} images: median {np.median(values):.3f}, largest {max(values):.3f}, "
                f"{copies:.0%} above {COPY}"
            )
    print(OUTPUT.value)


def context_files(record: Path) -> list[str]:
    """What a sample.json says was the context. Raises UserError where it is damaged."""
    try:
        files = json.loads(record.read_text())["context"]
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise ValueError("context is no list of files")
        return files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}): sample again") from error


def training_images(data_config) -> np.ndarray:
    """Every training image, as stored, on white: uint8 [n, size, size, 3]."""
    source = SOURCES[data_config.name](data_config, data_config.train_split)
    if not source.has_images:
        raise UserError(f"{source.name} holds latents alone; name the data set of images that they were made from")
    pixels = []
    for i in range(len(source.kinds)):
        record = source[i]
        for image, data in enumerate(record.images):
            pixels.append(fit_square(decode_image(data, record.image_name(image)), data_config.image_size))
    return on_white(np.stack(pixels))


if __name__ == "__main__":
    run_program(main, check_arguments)
