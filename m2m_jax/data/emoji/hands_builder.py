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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from m2m_jax.core.images import on_white
from m2m_jax.data import records
from m2m_jax.data.emoji import hands
from m2m_jax.data.emoji.table import TableSubject, load_table
from m2m_jax.data.likeness import COPY, likeness
from m2m_jax.data.set_builder import MIN_IMAGES, SetBuilder, deal, different, make_record, png, style_caption

MIN_HANDS = 3
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


class EmojiHands(SetBuilder):
    """Build the emoji data set of many hands: `EmojiHands.at(64, "data")`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Ten hands of eleven families."}
    licenses = "Apache-2.0, CC-BY 4.0, CC-BY-SA 4.0, OFL 1.1, MIT"
    license_file = "hands_licenses.md"
    packages = "data/npm"

    def make_sets(self) -> tuple[dict[str, list[records.ImageSetRecord]], dict[str, Any]]:
        subjects = load_table()
        families = hands.drawable_families(self.packages)
        drawn = hands.draw_pictures(self.packages, families, subjects, self.image_size, self.report_progress)
        drawn, dropped = drop_copies(subjects, drawn)
        sets = {split: build_sets(split, subjects, families, drawn) for split in SPLITS}
        return sets, {"families": families, "dropped_copies": dropped}

    def remark(self) -> str:
        there = self.info.metadata["families"]
        missing = [name for families in hands.HANDS.values() for name in families if name not in there]
        if not missing:
            return ""
        return (
            f", without {', '.join(missing)}; to have them, run make npm-emoji, remove the data set and make it again"
        )


def split_of(subject: TableSubject, family: str) -> str:
    """Name the split of one picture."""
    unseen = hands.hand_of(family) in hands.UNSEEN_HANDS
    return next(split for split, of in SPLITS.items() if of == (subject.split, unseen))


def drop_copies(subjects: Sequence[TableSubject], drawn: Pictures) -> tuple[dict, dict[str, int]]:
    """Leave out what is held out and a copy of something in "train"; return the rest, and how many of each split."""
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
    """Make all sets of a split: style rows, then content rows. drawn: without what must be left out."""
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
    """Yield rows of each group that fills one; of what is left, by category."""
    groups, left_over = collections.defaultdict(list), collections.defaultdict(list)
    for subject in members:
        if (family, subject.name) in drawn:
            groups[subject.group].append(subject)
    rows = {}
    for group, row in groups.items():
        row = different(row, (drawn[family, subject.name] for subject in row))
        if len(row) >= MIN_IMAGES:
            rows[group] = row
        else:
            for subject in row:
                left_over[subject.category].append(subject)
    for category, row in left_over.items():
        rows[category] = rows.get(category, []) + row
    for group, row in rows.items():
        row = different(row, (drawn[family, subject.name] for subject in row))
        for number, part in enumerate(deal(row)):
            caption = style_caption(group, family, [subject.caption for subject in part])
            images = (png(drawn[family, subject.name]) for subject in part)
            captions = (f"{subject.caption}, {subject.group}, {family}" for subject in part)
            yield make_record(f"style/{split}/{group}/{family}/{number}", "style", caption, images, captions)


def _content_rows(
    split: str, subject: TableSubject, families: Sequence[str], drawn: Pictures
) -> Iterator[records.ImageSetRecord]:
    """Yield the one row of a subject, or none."""
    by_hand = collections.defaultdict(list)
    for family in families:
        if (family, subject.name) in drawn:
            by_hand[hands.hand_of(family)].append((family, subject.name))
    # Of a hand with several families one, and not always the same: the subjects take turns, by their names' lengths.
    keys = [of_hand[len(subject.name) % len(of_hand)] for of_hand in by_hand.values()]
    if len(keys) < MIN_HANDS:
        return
    keys = different(keys, (drawn[key] for key in keys))
    if len(keys) >= MIN_HANDS:
        images = (png(drawn[key]) for key in keys)
        captions = (f"{subject.caption}, {subject.group}, {family}" for family, _ in keys)
        yield make_record(f"content/{split}/{subject.name}", "content", subject.caption, images, captions)
