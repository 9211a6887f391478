"""Sets to be scored, whoever made them: generated records, folders of sets, splits of data sets.

    made = open_sets("made")                       # what m2m_jax.generate wrote, or a folder of folders
    made, real = pair(made, open_sets("data:test"), given=4)
    made.images(0)                                 # uint8 [images, size, size, 3]

The first images of a set are those that were given, the others those that are judged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.images import decode_image, fit_square, on_white
from m2m_jax.core.paths import expand_home
from m2m_jax.data import generated
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.data.source import RecordSource, open_named


@dataclasses.dataclass(frozen=True)
class Sets:
    """Sets of equally many images of one size.

    Attributes:
      name: what messages and pages call them.
      source: what they are read from.
      numbers: which of its records, in order.
      set_ids, captions: of each.
      num_images: that are used of each set, the first.
      image_size: pixels a side; None until the first image says it.
      scaled: whether images of other sizes are brought to `image_size`; else they are refused.
      made_by: what a generated folder says of its making; empty for others.
    """

    name: str
    source: RecordSource
    numbers: Sequence[int]
    set_ids: Sequence[str]
    captions: Sequence[str]
    num_images: int
    image_size: int | None = None
    scaled: bool = False
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def images(self, index: int) -> np.ndarray:
        """Return the images of one set: uint8 [num_images, size, size, 3].

        Raises:
          UserError: one is damaged or, where they are not scaled, of another size.
        """
        record = self.source[self.numbers[index]]
        found = []
        for number in range(self.num_images):
            name = record.image_name(number)
            image = decode_image(record.images[number], name)
            size = self.image_size or image.width
            if not self.scaled and image.size != (size, size):
                raise UserError(
                    f"{name}: is {image.width} x {image.height} px, and {size} x {size} are expected: "
                    f"--image_size={size} scales all images"
                )
            found.append(on_white(fit_square(image, size)))
        return np.stack(found)

    def choose(self, indices: Sequence[int]) -> Sets:
        """Return some of the sets, in this order."""
        of: dict[str, Any] = {
            name: [getattr(self, name)[i] for i in indices] for name in ("numbers", "set_ids", "captions")
        }
        return dataclasses.replace(self, **of)

    @functools.cached_property
    def content(self) -> str:
        """A hash of all images and of how they are read. Decodes none."""
        digest = hashlib.sha256(f"{self.num_images} {self.image_size} {self.scaled}".encode())
        for number in self.numbers:
            record = self.source[number]
            for image in range(self.num_images):
                digest.update(hashlib.sha256(record.images[image]).digest())
        return digest.hexdigest()


def open_sets(text: str, num_images: int | None = None, image_size: int | None = None) -> Sets:
    """Open what `text` names, as `open_named` does.

    Args:
      num_images: so many of each set; sets with fewer are left out, and that is told. None: all, which must be equally
        many.
      image_size: scale images to so many pixels a side. None: they are that of the first.

    Raises:
      UserError: there is nothing, sets have different numbers of images, or one lacks an image between others.
    """
    source = open_named(text)
    if not source.has_images:
        raise UserError(f"{text} holds latents alone; name the data set of images that they were made from")
    counts = list(source.num_images)
    for number in (number for number, count in enumerate(counts) if not count):
        source[number]  # which says what is wrong with it
    if num_images is None:
        num_images = counts[0]
        if other := next((number for number, count in enumerate(counts) if count != num_images), None):
            raise UserError(
                f"{text}: set {source[0].set_id} has {num_images} images and set {source[other].set_id} has "
                f"{counts[other]}: --num_images says how many of each set, after those that were given, are scored"
            )
    numbers = [number for number, count in enumerate(counts) if count >= num_images]
    if few := len(counts) - len(numbers):
        warn(f"{text}: {few} sets with fewer than {num_images} images are left out")
    if not numbers:
        raise UserError(f"{text}: no set has {num_images} images; the largest has {max(counts)}")
    by_folder = _made_by(text)
    ids, captions = [], []
    for number in numbers:
        record = source[number]
        _require_every_place(record.files)
        ids.append(generated.set_id(record.set_id) if by_folder and record.files else record.set_id)
        captions.append(record.caption)
    size = image_size
    sets = Sets(text, source, numbers, ids, captions, num_images, size, image_size is not None, by_folder)
    return sets if size else dataclasses.replace(sets, image_size=int(sets.images(0).shape[1]))


def open_images(text: str, image_size: int | None) -> Sets:
    """Open every image of a data set as a set of its own, scaled to so many pixels a side."""
    source = open_named(text)
    if not source.has_images:
        raise UserError(f"{text} holds latents alone; name the data set of images that they were made from")
    singles = _Singles(source)
    names = [""] * len(singles)
    return Sets(text, singles, range(len(singles)), names, names, 1, image_size, True)


class _Singles(RecordSource):
    """The images of a source, each as a record."""

    def __init__(self, source: RecordSource):
        self._source, self.name = source, source.name
        self._places = [(record, image) for record, count in enumerate(source.num_images) for image in range(count)]
        self.kinds, self.num_images = [""] * len(self._places), [1] * len(self._places)

    def __getitem__(self, index: int) -> ImageSetRecord:
        number, image = self._places[index]
        record = self._source[number]
        files = record.files[image : image + 1]
        return dataclasses.replace(record, images=(record.images[image],), files=files, latents=None, attributes={})


def pair(made: Sets, real: Sets) -> tuple[Sets, Sets, bool]:
    """Return as many sets of both, in one order, and whether they are the same sets: their names say so.

    Sets of other names have no place in common but their number; the first of the larger are used.

    Raises:
      UserError: some names agree and some don't, or images have two sizes.
    """
    if made.image_size != real.image_size:
        raise UserError(
            f"{made.name} holds images of {made.image_size} px, and {real.name} of {real.image_size}: "
            f"--image_size={made.image_size} scales all"
        )
    places = {set_id: index for index, set_id in enumerate(real.set_ids)}
    missing = [set_id for set_id in made.set_ids if set_id not in places]
    if not missing:
        return made, real.choose([places[set_id] for set_id in made.set_ids]), True
    if len(missing) < len(made):
        raise UserError(
            f"{len(missing)} of {len(made)} sets of {made.name} are not among the usable ones of {real.name}, "
            f"{missing[0]} for one: name the sets that they were made from"
        )
    count = min(len(made), len(real))
    return made.choose(range(count)), real.choose(range(count)), False


def _require_every_place(files: Sequence[str]) -> None:
    """Refuse a folder whose images are numbered with a number left out."""
    stems = [Path(file).stem for file in files]
    if not all(stem.isdecimal() for stem in stems):
        return
    for stem, after, file in zip(stems, stems[1:], files):
        if int(after) != int(stem) + 1:
            wanted = f"{int(stem) + 1:0{len(stem)}d}"
            raise UserError(f"{Path(file).parent}: image {wanted} is missing, between {stem} and {after}")


def _made_by(text: str) -> dict[str, Any]:
    folder = expand_home(text)
    return generated.read_manifest(folder).made_by if (folder / generated.MANIFEST).exists() else {}
