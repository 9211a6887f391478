"""Make the emoji splits: subjects that are alike, by name or by picture, fall into one split together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from m2m_jax.core import disk
from m2m_jax.core.images import decode_image, on_white
from m2m_jax.data import splits
from m2m_jax.data.emoji import artwork, builder, hands, iconify, naming, subjects, table
from m2m_jax.data.likeness import like_pairs

SIZES = (32, 64)  # pixels at which drawings are compared: those of the data sets that there are
# Of subjects in a component; larger ones train. The largest are all round faces, with half of all flags, and all men.
LARGEST = 40
FLAGS = "flags"  # this category is one component: most flags are rectangles, and alike by shape


def link_named(named: Sequence[naming.NamedSubject]) -> Iterator[tuple[str, str]]:
    """Yield pairs of subjects that are one by their names, kin or flags."""
    for key in (lambda one: one.kin, lambda one: one.category if one.category == FLAGS else None):
        members = defaultdict(list)
        for one in named:
            members[key(one)].append(one.name)
        members.pop(None, None)
        for first, *others in members.values():
            yield from ((first, other) for other in others)


def link_alike(owners: Sequence[str], images_nhwc: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield pairs of subjects that have pictures alike. owners: the subject of each image."""
    for i, j in like_pairs(images_nhwc):
        if owners[i] != owners[j]:
            yield owners[i], owners[j]


def split_hands(folder: str | Path) -> tuple[list[naming.NamedSubject], dict[str, str], dict[str, str]]:
    """Return all families' subjects, their components and splits. Raises UserError where a package is missing."""
    families = [iconify.load_family(folder, name) for name in iconify.PACKAGES]
    named = naming.name_subjects(families)
    links = list(link_named(named))
    everyone = [table.TableSubject(one.name, one.others, one.codepoints, "", "", "", "") for one in named]
    for size in SIZES:
        drawn = hands.draw_pictures(folder, hands.drawable_families(folder), everyone, size)
        links.extend(link_alike([name for _, name in drawn], on_white(np.stack(list(drawn.values())))))
    components = splits.connected_components((one.name for one in named), links)
    return named, components, splits.split_by_component(components, largest=LARGEST)


def moved_subjects() -> dict[str, str]:
    """Return those subjects of `subjects.py` that must change their split, and the split that they go to."""
    everyone = subjects.load_subjects(mended=False)
    drawn = builder.draw_artwork(everyone, SIZES[0])
    owners = {(variant.codepoints, style): one.subject_id for one in everyone for variant in one.variants
              for style in artwork.STYLES}  # fmt: skip
    images = on_white(np.stack([np.asarray(decode_image(png, str(job))) for job, png in drawn.items()]))
    links = link_alike([owners[job] for job in drawn], images)
    old = {one.subject_id: one.split for one in everyone}
    mended = splits.mend_split(old, splits.connected_components(old, links))
    return {subject_id: split for subject_id, split in mended.items() if split != old[subject_id]}


def write_splits(packages: Path) -> tuple[dict[str, int], int]:
    """Write `table.FILE` and `subjects.MOVED_FILE` beside the code that reads them.

    Args:
      packages: folder of npm packages, all of them.

    Returns:
      How many subjects of all families each split has, and how many of `subjects.py` change theirs.

    Raises:
      UserError: a package is missing.
    """
    named, components, split_of = split_hands(str(packages))
    table.write_table(named, components, split_of)
    moved = moved_subjects()
    disk.write(subjects.MOVED_FILE, "".join(f"{key} {moved[key]}\n" for key in sorted(moved)).encode())
    return {split: list(split_of.values()).count(split) for split in splits.SPLITS}, len(moved)
