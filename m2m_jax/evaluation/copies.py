"""Are samples copies? Generated images beside the nearest training image of each, by shape.

    report = find_copies(config, CopySearch(samples="runs/emoji/test_samples", output="nearest.png"))
    report.similarity["nearest in training"]  # float32, one a generated image

Images are compared by luminance, normalised to zero mean and unit variance, and mirrored, too: a copy in other colours,
on another ground or the other way round is found as well.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, Data
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square, on_white, read_image, write_png
from m2m_jax.data.likeness import COPY, likeness, likeness_to, shapes
from m2m_jax.data.pipeline import open_source
from m2m_jax.evaluation.options import CopySearch
from m2m_jax.view.contact_sheet import Row, contact_sheet, context, generated, nearest


@dataclasses.dataclass(frozen=True)
class CopyReport:
    """How alike generated images are to others.

    Attributes:
      similarity: {to what: [generated images], the correlation with the one that is most alike}; 1 is the same up to
        colour.
    """

    similarity: dict[str, np.ndarray]

    def text(self) -> str:
        """Return a line on each kind of image that they were compared with."""
        lines = ["shape similarity of generated images (1: the same up to colour)"]
        for name, values in self.similarity.items():
            lines.append(
                f"  {name}, {len(values)} images: median {np.median(values):.3f}, largest {max(values):.3f}, "
                f"{np.mean(values > COPY):.0%} above {COPY}"
            )
        return "\n".join(lines)


def find_copies(config: Config, options: CopySearch) -> CopyReport:
    """Compare samples with all training images, and with their context, and write a sheet of both.

    Args:
      config: names the data set that was trained on, and the size at which images are compared.

    Raises:
      UserError: there are no samples, or the data set holds no images.
    """
    validate(config.data)
    size = config.data.image_size
    records = sorted(options.samples.glob("*/sample.json"))
    if not records:
        raise UserError(
            f"--samples={options.samples} holds no folder with a sample.json; make it with m2m_jax.sample --sets"
        )
    training_nhwc = training_images(config.data)
    training_shapes = shapes(training_nhwc)
    rows: list[Row] = []
    to_training: list[float] = []
    to_context: list[float] = []
    for record in records:
        given = [read_image(file, size) for file in _context_files(record)]
        new = [read_image(file, size) for file in sorted(record.parent.glob("[0-9]*.png"))]
        similarity_gn = likeness_to(np.stack(new), training_shapes)
        to_training.extend(similarity_gn.max(1))
        if given:
            to_context.extend(likeness(np.stack(new), np.stack(given)).max(1))
        nearest_ghwc = training_nhwc[similarity_gn.argmax(1)]
        rows.append(Row(record.parent.name, [context(given), generated(new), nearest(nearest_ghwc)]))
    write_png(options.output, contact_sheet(rows))
    found = {"nearest in training": to_training, "nearest in the context": to_context}
    return CopyReport({name: np.array(values) for name, values in found.items() if values})


def training_images(data: Data) -> np.ndarray:
    """Return every training image of a data set, as stored, on white: uint8 [n, size, size, 3].

    Args:
      data: the `data` part of a config.

    Raises:
      UserError: it holds latents alone.
    """
    source = open_source(data, data.train_split)
    if not source.has_images:
        raise UserError(f"{source.name} holds latents alone; name the data set of images that they were made from")
    pixels = []
    for record in map(source.__getitem__, range(len(source.kinds))):
        for image, encoded in enumerate(record.images):
            pixels.append(fit_square(decode_image(encoded, record.image_name(image)), data.image_size))
    return on_white(np.stack(pixels))


def _context_files(record: Path) -> list[str]:
    """Return what a sample.json says was the context. Raises UserError where it is damaged."""
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["context"]
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise ValueError("context is no list of files")
        return files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}): sample again") from error
