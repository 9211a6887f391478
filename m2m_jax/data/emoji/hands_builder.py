"""The emoji data set of many hands: image sets of ten artists' or publishers' emoji, as a TFDS builder.

Two kinds of sets (records as in `records.py`, images are RGBA PNG with a transparent ground):

- "style": one family, up to 25 subjects of one group (Unicode's subgroup; what is left over, of one category);
- "content": one subject in the hands of all who drew it, one picture a hand.

A set has 4 to 25 images (content rows at least 3: so many hands there are without npm), no two of them copies of each
other by `likeness.py`. Longer rows are dealt out evenly into several sets. Splits:

| split                                | subjects (`subjects.tsv`)      | hands                      |
|--------------------------------------|--------------------------------|----------------------------|
| train                                | train                          | those that train           |
| validation, test                     | of their own                   | those that train           |
| hands                                | train                          | `UNSEEN_HANDS`, style rows |
| validation_hands, test_hands         | of validation, of test         | `UNSEEN_HANDS`, style rows |

What is held out, by subject or by hand, is left out where it is a copy of something in "train".
"""

import collections
import importlib.resources
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from m2m_jax.core.images import on_white
from m2m_jax.data import records
from m2m_jax.data.emoji import hands
from m2m_jax.data.emoji.builder import EmojiConfig, emoji_config
from m2m_jax.data.emoji.table import TableSubject, load_table
from m2m_jax.data.likeness import COPY, likeness, without_copies

MIN_IMAGES, MIN_HANDS = 4, 3
MAX_IMAGES = records.MAX_IMAGES_PER_RECORD
_NAMES_IN_CAPTION = 6
# Split -> that of its subjects, and whether its hands are the unseen ones.
SPLITS = {
    "train": ("train", False),
    "validation": ("validation", False),
    "test": ("test", False),
    "hands": ("train", True),
    "validation_hands": ("validation", True),
    "test_hands": ("test", True),
}

Pictures = Mapping[tuple[str, str], np.ndarray]  # (family, subject's name) -> uint8 RGBA [size, size, 4]


def make_hands_builder(image_size: int, directory: str, packages: str = "data/npm") -> "EmojiHands":
    """Returns the data set at one image size (pixels), prepared or not, in a directory of prepared data sets.

    packages: folder of npm packages, read where the data set is made.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every configuration that is not built in
    try:
        made = EmojiHands(config=emoji_config(image_size), data_dir=directory, file_format="array_record")
    finally:
        logging.set_verbosity(verbosity)
    made.packages = packages
    return made


class EmojiHands(tfds.core.GeneratorBasedBuilder):
    """The builder; see `make_hands_builder`. It needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Ten hands of eleven families."}
    BUILDER_CONFIG_CLASS = EmojiConfig
    code_path = None  # where TFDS looks for checksums of downloads, through a package that it does not itself require
    packages = "data/npm"
    # Called with (number drawn, number to draw) while the artwork is drawn; set by prepare.py.
    report_progress: Callable[[int, int], None] | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        # Shuffling is left to the reader: then the order of records is that of the metadata.
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(),
            license="Apache-2.0, CC-BY 4.0, CC-BY-SA 4.0, OFL 1.1, MIT: see LICENSES.md",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded: npm and pip have fetched the artwork
        subjects = load_table()
        families = hands.drawable_families(self.packages)
        size = self.builder_config.image_size
        drawn = hands.draw_pictures(self.packages, families, subjects, size, self.report_progress)
        drawn, dropped = drop_copies(subjects, drawn)
        sets = {split: build_sets(split, subjects, families, drawn) for split in SPLITS}
        sets = {split: made for split, made in sets.items() if made}
        self.info.metadata["families"] = families
        self.info.metadata["dropped_copies"] = dropped
        self.info.metadata["kinds"] = {split: [one.kind for one in made] for split, made in sets.items()}
        self.info.metadata["num_images"] = {split: [one.num_images for one in made] for split, made in sets.items()}
        licenses = importlib.resources.files("m2m_jax.data.emoji") / "hands_licenses.md"
        # self.data_path is TFDS's unfinished directory here: the licences appear together with the data.
        (self.data_path / "LICENSES.md").write_text(licenses.read_text(encoding="utf-8"))
        return {split: self._generate_examples(made) for split, made in sets.items()}

    def _generate_examples(self, sets: list[records.ImageSetRecord]) -> Iterator[tuple[int, dict]]:
        for index, record in enumerate(sets):
            yield index, records.encode_record(record)


def split_of(subject: TableSubject, family: str) -> str:
    """Names the split of one picture."""
    unseen = hands.hand_of(family) in hands.UNSEEN_HANDS
    return next(split for split, of in SPLITS.items() if of == (subject.split, unseen))


def drop_copies(subjects: Sequence[TableSubject], drawn: Pictures) -> tuple[dict, dict[str, int]]:
    """Leaves out what is held out and a copy of something in "train". Returns the rest, and how many of each split."""
    by_split = collections.defaultdict(list)
    by_name = {subject.name: subject for subject in subjects}
    for family, name in drawn:
        by_split[split_of(by_name[name], family)].append((family, name))
    kept, dropped = {key: drawn[key] for key in by_split["train"]}, {}
    trains = on_white(np.stack(list(kept.values())))
    for split in list(SPLITS)[1:]:
        keys = by_split[split]
        if not keys:
            continue
        copies = likeness(on_white(np.stack([drawn[key] for key in keys])), trains).max(1) > COPY
        kept |= {key: drawn[key] for key, copy in zip(keys, copies, strict=True) if not copy}
        dropped[split] = int(copies.sum())
    return kept, dropped


def build_sets(
    split: str, subjects: Sequence[TableSubject], families: Sequence[str], drawn: Pictures
) -> list[records.ImageSetRecord]:
    """Makes all sets of a split: style rows, then content rows. drawn: without what must be left out."""
    of_subjects, unseen = SPLITS[split]
    members = [subject for subject in subjects if subject.split == of_subjects]
    families = [family for family in families if (hands.hand_of(family) in hands.UNSEEN_HANDS) == unseen]
    sets = [record for family in families for record in _style_rows(split, family, members, drawn)]
    if not unseen:
        sets.extend(record for subject in members for record in _content_rows(split, subject, families, drawn))
    return sets


def _style_rows(
    split: str, family: str, members: Sequence[TableSubject], drawn: Pictures
) -> Iterator[records.ImageSetRecord]:
    """Rows of each group that fills one; what is left, by category."""
    groups, left_over = collections.defaultdict(list), collections.defaultdict(list)
    for subject in members:
        if (family, subject.name) in drawn:
            groups[subject.group].append(subject)
    rows = {}
    for group, row in groups.items():
        row = _different(family, row, drawn)
        if len(row) >= MIN_IMAGES:
            rows[group] = row
        else:
            for subject in row:
                left_over[subject.category].append(subject)
    for category, row in left_over.items():
        rows[category] = rows.get(category, []) + row
    for group, row in rows.items():
        row = _different(family, row, drawn)
        for number, part in enumerate(_parts(row)):
            names = [subject.caption for subject in part]
            caption = f"{group} in the style of {family}: {', '.join(names[:_NAMES_IN_CAPTION])}"
            caption += ", ..." if len(names) > _NAMES_IN_CAPTION else ""
            keys = [(family, subject.name) for subject in part]
            captions = [f"{subject.caption}, {subject.group}, {family}" for subject in part]
            yield _record(f"style/{split}/{group}/{family}/{number}", "style", caption, keys, captions, drawn)


def _content_rows(
    split: str, subject: TableSubject, families: Sequence[str], drawn: Pictures
) -> Iterator[records.ImageSetRecord]:
    """The one row of a subject, or none."""
    by_hand = collections.defaultdict(list)
    for family in families:
        if (family, subject.name) in drawn:
            by_hand[hands.hand_of(family)].append((family, subject.name))
    # Of a hand with several families one, and not always the same: the subjects take turns, by their names' lengths.
    keys = [of_hand[len(subject.name) % len(of_hand)] for of_hand in by_hand.values()]
    if len(keys) < MIN_HANDS:
        return
    keys = [keys[i] for i in without_copies(on_white(np.stack([drawn[key] for key in keys])))]
    if len(keys) >= MIN_HANDS:
        captions = [f"{subject.caption}, {subject.group}, {family}" for family, _ in keys]
        yield _record(f"content/{split}/{subject.name}", "content", subject.caption, keys, captions, drawn)


def _different(family: str, row: list[TableSubject], drawn: Pictures) -> list[TableSubject]:
    """Those of a row that are no copies of one before."""
    if not row:
        return row
    return [row[i] for i in without_copies(on_white(np.stack([drawn[family, subject.name] for subject in row])))]


def _parts(row: Sequence[TableSubject]) -> list[Sequence[TableSubject]]:
    """Deals a row out evenly to the fewest sets; none if it is too short."""
    if len(row) < MIN_IMAGES:
        return []
    num_parts = -(-len(row) // MAX_IMAGES)
    return [row[part::num_parts] for part in range(num_parts)]


def _record(
    set_id: str, kind: str, caption: str, keys: Iterable, captions: Sequence[str], drawn: Pictures
) -> records.ImageSetRecord:
    """An image's caption is a list of tags: what it depicts, its group, its family."""
    return records.ImageSetRecord(
        set_id=set_id.replace(" ", "-"),
        kind=kind,
        caption=caption,
        images=tuple(_png(drawn[key]) for key in keys),
        image_captions=tuple(captions),
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()
