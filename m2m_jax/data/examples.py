"""Examples: image sets as training sees them: chosen (choose.py), fetched (fetch.py), augmented (transform.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from m2m_jax.configuration import Data, build, reads_latents
from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.images import on_white
from m2m_jax.data import transform
from m2m_jax.data.augmentation import SetAugmentation
from m2m_jax.data.choose import Chooser, Stream, drop_tags
from m2m_jax.data.fetch import HostFetch
from m2m_jax.data.records import BadRecord
from m2m_jax.data.resident import ResidentImages
from m2m_jax.data.source import RecordSource, open_source

# With data.on_error=skip: so many sets are tried in the place of a damaged one, and so many are told of.
_MAX_SUBSTITUTES, _MAX_TOLD = 10, 10


def open_examples(
    config: Data,
    *,
    split: str,
    seed: int,
    attributes: Mapping[str, int] = MappingProxyType({}),
    **how: Any,
) -> SetExamples:
    """Open the examples of a split of the data set that `config`, the `data` part of a configuration, names.

    Args:
      attributes: {name: numbers an image} that the source must have.
      how: further arguments of `SetExamples`.

    Raises:
      UserError: the data cannot be used as the configuration asks.
    """
    examples = SetExamples(open_source(config, split), config, split=split, seed=seed, **how)
    examples.require_attributes(attributes)
    return examples


class SetExamples:
    """Example i of a split, for any i: a dict of arrays, whose names `loader.batched_name` turns into a batch's.

    images_nhwc: uint8 [N, S, S, 3], where images are wanted; or, where the step augments them, rgba_nhwc, uint8
      [N, S, S, 4], or place_n, int32 [N], in `resident`; and augmentation_s, int32 [p];
    latents_nhwc: float32 [N, h, w, c], where the source gives latents;
    token_ids_ns: int32 [N, s], with a tokenizer: of each image's caption or, where there is none, its set's;
    attribute_NAME_nc: float32 [N, c], of each attribute of the source;
    example_index, record_index, substituted: which example it is, of which record, and whether that record stands in
      for a damaged one.

    A damaged record raises BadRecord. With data.on_error=skip another one takes its place, which is drawn from
    (seed, split, i) alone: the same on every resume and for any number of processes.

    Attributes:
      split: its name.
      resident: the images that the devices have to hold, where the step picks its own; else None.

    Example:
        examples = open_examples(config.data, split="train", seed=0)
        examples[17]["images_nhwc"]
    """

    def __init__(
        self,
        source: RecordSource,
        config: Data,
        *,
        split: str,
        seed: int,
        augment: bool = True,
        whole_captions: bool = False,
        tokenizer: Callable[[Sequence[str]], np.ndarray] | None = None,
        with_images: bool = False,
        in_step: bool = False,
    ):
        """
        Args:
          augment: False composites on white, leaves captions whole, and does nothing else.
          whole_captions: no tag is dropped, also where images are augmented: those of held-out sets.
          tokenizer: captions to ids, int32 [captions, s], where they are wanted.
          with_images: images are wanted also where `config` names latents.
          in_step: with data.augment.on_device, images are left for `transform.finish` in the step to augment; with
            data.resident, to pick, too.

        Raises:
          UserError: the data cannot be used as the configuration asks.
        """
        if config.images_per_set < 1:
            raise UserError(f"data.images_per_set={config.images_per_set}: must be at least 1")
        self._latents = reads_latents(config)
        self._images = with_images or not self._latents
        if self._images and not source.has_images:
            raise UserError(
                f"{source.name} holds latents alone, and images are wanted: make it with both, by "
                "m2m_jax.data.precompute --keep_images or m2m_jax.data.build_mis --store=both"
            )
        self.split = split
        self._source, self._image_size = source, config.image_size
        usable = _usable(source, config.kinds, config.images_per_set)
        self._chooser = Chooser(np.asarray(source.num_images), config.images_per_set, seed, split, usable)
        self._fetch = HostFetch(source, config.image_size)
        self._augmentation = None
        if augment and config.augment.enabled:
            self._augmentation = build(SetAugmentation, config.augment)
        self.resident = None
        if in_step and self._images and config.resident:
            self.resident = ResidentImages(source, config.image_size, self._chooser.usable, config.threads)
            self._augmentation = self._augmentation or SetAugmentation()  # which changes nothing
        self._in_step = in_step and self._augmentation is not None and config.augment.on_device
        self._tokenizer = tokenizer
        self._tag_dropout = config.caption_tag_dropout if augment and not whole_captions else 0.0
        self._skip = config.on_error == "skip"
        self._told, self._lock = 0, threading.Lock()

    @property
    def epoch_length(self) -> int:
        """Examples until every set (with one image a set: every image) has been used once."""
        return self._chooser.epoch_length

    @property
    def num_sets(self) -> int:
        """How many different sets examples are of."""
        return len(self._chooser.usable)

    @property
    def fingerprint(self) -> str:
        """Hash of the listing of the split: another one means that sets came or went, and examples are others."""
        return self._source.fingerprint

    def require_attributes(self, widths: Mapping[str, int]) -> None:
        """Raise UserError unless the source says all of these of every image. widths: {name: numbers an image}."""
        has = self._source.attributes
        for name, width in widths.items():
            if has.get(name) != width:
                found = f"{has[name]} numbers as its" if name in has else "no"
                raise UserError(
                    f"the model is told {name} of every image, {width} numbers, and {self._source.name} has {found} "
                    f"attribute {name}: name other data, or leave it out of config.model.global_embeddings"
                )

    def choose(self, index: int) -> tuple[int, np.ndarray]:
        """Return the record of example `index`, and which of its images in which order: int [N]."""
        return self._chooser.choose(index)

    def set_ids(self, record_index_b: Iterable[int]) -> list[str]:
        """Return the ids of the records of a batch, for messages. Reads those records, and decodes no image."""
        return [self._source[int(index)].set_id for index in record_index_b]

    def titles(self, record_index_b: Iterable[int]) -> list[str]:
        """Return the captions of the records of a batch or, where there is none, their ids."""
        sets = [self._source[int(index)] for index in record_index_b]
        return [one.caption or one.set_id for one in sets]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raise BadRecord, or, with data.on_error=skip, UserError where all substitutes are damaged, too."""
        index = int(index)
        first_error = None
        for attempt in range(_MAX_SUBSTITUTES + 1):
            record, images = self._chooser.choose(index, attempt)
            try:
                return {
                    **self._content(index, record, images),
                    "example_index": np.array(index, np.int64),
                    "record_index": np.array(record, np.int64),
                    "substituted": np.array(attempt > 0),
                }
            except BadRecord as error:
                if not self._skip:
                    raise
                first_error = first_error or error
                self._tell(index, error)
        raise UserError(
            f"example {index}: its set and {_MAX_SUBSTITUTES} others in its place are damaged, the first being "
            f"{first_error}; see what is wrong with python -m m2m_jax.data.check"
        )

    def _content(self, index: int, record: int, images: np.ndarray) -> dict[str, np.ndarray]:
        """Raise BadRecord."""
        content: dict[str, np.ndarray] = {}
        if self._latents:
            content["latents_nhwc"] = self._fetch.latents(record, images)
        if self._images:
            content |= self._pixels(index, record, images)
        if self._tokenizer is not None:
            rng = self._chooser.rng(Stream.CAPTION, index)
            captions = self._fetch.captions(record, images)
            content["token_ids_ns"] = self._tokenizer([drop_tags(text, self._tag_dropout, rng) for text in captions])
        attributes = self._fetch.attributes(record, images)
        return content | {f"attribute_{name}_nc": values for name, values in attributes.items()}

    def _pixels(self, index: int, record: int, images: np.ndarray) -> dict[str, np.ndarray]:
        if self._augmentation is None:
            return {"images_nhwc": on_white(self._fetch.images(record, images))}
        parameters = self._augmentation.draw(self._chooser.rng(Stream.AUGMENTATION, index), self._image_size)
        if self.resident is not None:
            return {"place_n": self.resident.places(record, images), "augmentation_s": parameters}
        rgba_nhwc = self._fetch.images(record, images)
        if self._in_step:
            return {"rgba_nhwc": rgba_nhwc, "augmentation_s": parameters}
        return {"images_nhwc": transform.augment(rgba_nhwc, parameters)}

    def _tell(self, index: int, error: BadRecord) -> None:
        with self._lock:
            self._told += 1
            if self._told <= _MAX_TOLD:
                more = "; further ones are only counted" if self._told == _MAX_TOLD else ""
                warn(f"example {index} gets another set: {error}{more}")

    def __getstate__(self) -> dict:
        """For worker processes."""
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _usable(source: RecordSource, kinds: Sequence[str], images_per_set: int) -> np.ndarray:
    """Return the records that may be used. Of a source of several kinds `kinds` chooses; others have but their own.

    Raises:
      UserError: there is none.
    """
    of_kind, counts = np.asarray(source.kinds), np.asarray(source.num_images)
    known = sorted(set(of_kind.tolist()))
    chosen = np.isin(of_kind, list(kinds)) if len(known) > 1 else np.ones(len(of_kind), bool)
    if not chosen.any():
        raise UserError(f"data.kinds={tuple(kinds)}: {source.name} has {known}")
    enough = counts >= images_per_set
    if not (chosen & enough).any():
        most = counts[chosen].max()
        raise UserError(f"data.images_per_set={images_per_set}: the largest set of {source.name} has {most} images")
    if left_out := int((chosen & ~enough).sum()):
        warn(f"{source.name}: {left_out} sets with fewer than {images_per_set} images are left out")
    return np.flatnonzero(chosen & enough)
