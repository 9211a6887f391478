"""What an example is made of: which record, which of its images in which order, which augmentation.

Everything is a function of (seed, split, example index), computed and not remembered: a run resumes from its step
alone, on any number of processes. Nothing here reads data.
"""

from __future__ import annotations

import enum
import hashlib

import numpy as np
from grain.experimental import index_shuffle


class Stream(enum.IntEnum):
    """Independent random streams of an example. The numbers are part of a run's randomness: never change one."""

    ORDER = 0
    CHOICE = 1
    AUGMENTATION = 2
    SUBSTITUTE = 3
    CAPTION = 4


class Chooser:
    """Chooses sets of `images_per_set` images; with 1 an epoch goes through all images, otherwise through all sets.

    Example:
        chooser = Chooser(np.array([5, 3, 7]), images_per_set=4, seed=0, split="train")
        record, images = chooser.choose(0)        # 2, array([6, 0, 3, 1])
        rng = chooser.rng(Stream.AUGMENTATION, 0)
    """

    def __init__(
        self, num_images: np.ndarray, images_per_set: int, seed: int, split: str, usable: np.ndarray | None = None
    ):
        """
        Args:
          num_images: of each record of the split.
          usable: which records may be chosen, in order; None: all with enough images.
        """
        self._num_images, self._images_per_set = np.asarray(num_images), images_per_set
        enough = np.flatnonzero(self._num_images >= images_per_set)
        self.usable = enough if usable is None else np.intersect1d(usable, enough)
        if not len(self.usable):
            raise ValueError("no record has enough images")
        self._ends = np.cumsum(self._num_images[self.usable])  # where each record's images end in a list of all
        self._seed = (seed, split_number(split))

    @property
    def epoch_length(self) -> int:
        """Examples until every set (of single images: every image) has been used once."""
        return int(self._ends[-1]) if self._images_per_set == 1 else len(self.usable)

    def choose(self, index: int, attempt: int = 0) -> tuple[int, np.ndarray]:
        """Return the record of example `index`, and which of its images in which order: int [images_per_set].

        attempt: above 0, the set that stands in for one that is damaged (and for the substitute before). It is drawn
          at random, lest the set that comes next be seen twice in a row.
        """
        if attempt:
            rng = self.rng(Stream.SUBSTITUTE, index, attempt - 1)
            return self._at(int(rng.integers(self.epoch_length)), rng)
        epoch, position = divmod(index, self.epoch_length)
        seed = int(np.random.SeedSequence([*self._seed, Stream.ORDER, epoch]).generate_state(1)[0])
        place = index_shuffle(position, max_index=self.epoch_length - 1, seed=seed, rounds=4)
        return self._at(place, self.rng(Stream.CHOICE, index))

    def rng(self, stream: Stream, *indices: int) -> np.random.Generator:
        """Return the random stream of an example (and of what else `indices` say)."""
        return np.random.default_rng([*self._seed, stream, *indices])

    def _at(self, place: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """place: in the list of all usable sets or, of single images, of all their images."""
        if self._images_per_set == 1:
            which = int(np.searchsorted(self._ends, place, side="right"))
            record = int(self.usable[which])
            return record, np.array([place - (self._ends[which] - self._num_images[record])])
        record = int(self.usable[place])
        return record, rng.permutation(self._num_images[record])[: self._images_per_set]


def split_number(split: str) -> int:
    """Return 32 bits of the name of a split: no two splits share a random stream."""
    return int.from_bytes(hashlib.blake2s(split.encode(), digest_size=4).digest(), "little")


def drop_tags(caption: str, share: float, rng: np.random.Generator) -> str:
    """Return a caption without each of its tags, which commas part, with probability `share`; one stays in any case.

    So a model learns what each tag says by itself, and what a caption leaves open.
    """
    if not share:
        return caption
    tags = caption.split(",")
    keep = rng.random(len(tags)) >= share
    keep[rng.integers(len(tags))] |= not keep.any()
    return ",".join(tag for tag, kept in zip(tags, keep, strict=True) if kept).strip()
