"""Shards of generated sets: the devices make the next images while threads clean, encode and write the last ones."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from PIL import Image

from m2m_jax.building import build_folder
from m2m_jax.building.cleaning import SafetyFilter, SetRules, clean_set
from m2m_jax.building.image_formats import encode_image
from m2m_jax.core.errors import UserError
from m2m_jax.core.printing import duration
from m2m_jax.data import mis, precomputed, records
from m2m_jax.data.mis import Shard

if TYPE_CHECKING:
    from m2m_jax.sampling.text_to_image import TextToImage

_CALLS_IN_FLIGHT = 2  # the devices have work while the results of the last call are fetched
_MAX_THREADS = 32
_SECONDS_BETWEEN_LINES = 5.0


@dataclasses.dataclass(frozen=True)
class SetMaker:
    """From the images of a set to its record.

    Attributes:
      store: one of `records.STORES`.
      image_format, quality: of `IMAGE_FORMATS`; 1 to 100, of "webp" alone.
      latents_dtype: one of `records.LATENT_DTYPES`.
      rules, safety_filter: `safety_filter` is what `rules.load_filter` gave.
    """

    store: str
    image_format: str
    quality: int
    latents_dtype: str
    rules: SetRules
    safety_filter: SafetyFilter | None = None

    def __call__(self, slot: Slot, latents_nhwc: np.ndarray, images_nhwc: np.ndarray) -> MadeSet:
        """Keep a set of latents float32 [n, h, w, c] and images uint8 [n, S, S, 3]."""
        with np.errstate(over="ignore"):  # found below
            latents_nhwc = latents_nhwc.astype(self.latents_dtype)
        if not np.isfinite(latents_nhwc).all():
            raise UserError(
                f"row {slot.row} of the captions, {slot.caption!r:.60}: its latents are not finite as "
                f"{self.latents_dtype}; is this the generator?"
            )
        kept, dropped = clean_set(images_nhwc, slot.caption, self.rules, self.safety_filter)
        if len(kept) < self.rules.min_images:
            return MadeSet(None, 0, dropped, "min_images")
        record = records.ImageSetRecord(
            set_id=f"{mis.KIND}-{slot.row:08d}",
            kind=mis.KIND,
            caption=slot.caption,
            images=() if self.store == "latents" else tuple(self._encoded(images_nhwc[number]) for number in kept),
            latents=None if self.store == "images" else latents_nhwc[kept],
        )
        return MadeSet(precomputed.serialize(record), len(kept), dropped, None)

    def _encoded(self, image_hwc: np.ndarray) -> bytes:
        return encode_image(image_hwc, self.image_format, self.quality)


class Slot(NamedTuple):
    """A set to be made.

    Attributes:
      row: of its caption in the file, which its noise depends on.
      ends_shard: whether it is the last of its shard.
    """

    shard: Shard
    row: int
    caption: str
    ends_shard: bool


class MadeSet(NamedTuple):
    """serialized: its record; None: dropped by the rule `dropped_by`. dropped_images: by rule."""

    serialized: bytes | None
    num_images: int
    dropped_images: Mapping[str, int]
    dropped_by: str | None


@dataclasses.dataclass(frozen=True)
class Batching:
    """How sets are put into calls of the generator. The numbers of a set do not depend on the number of devices.

    Attributes:
      sets_at_once: a device makes together, all of one shard.
      images_at_once: of each set.
    """

    images_per_set: int
    sets_at_once: int
    images_at_once: int
    seed: int

    def slots(self, shards: Sequence[Shard], captions: Mapping[str, list[tuple[int, str]]]) -> Iterator[Slot | None]:
        """Yield the sets of these shards, in order. None fills the last device that works on a shard.

        captions: (row, caption) of each split.
        """
        for shard in shards:
            last = shard.captions[-1]
            for place in shard.captions:
                yield Slot(shard, *captions[shard.split][place], ends_shard=place == last)
            yield from [None] * (-len(shard.captions) % self.sets_at_once)

    def generate(
        self, slots: Iterable[Slot | None], generator: TextToImage
    ) -> Iterator[tuple[list[Slot | None], np.ndarray, np.ndarray]]:
        """Yield (slots, latents float32 [b, n, h, w, c], images uint8 [b, n, S, S, 3]) of one batch after another."""
        calls = self.calls(iter(slots), generator)
        in_flight: collections.deque = collections.deque()
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        while True:
            in_flight.extend(itertools.islice(calls, _CALLS_IN_FLIGHT - len(in_flight)))
            if not in_flight:
                return
            batch, is_last, arrays = in_flight.popleft()
            latents, images = arrays
            parts.append((np.asarray(latents), np.asarray(images)))
            if is_last:
                # Before anybody works on what is yielded, the devices get theirs.
                in_flight.extend(itertools.islice(calls, _CALLS_IN_FLIGHT - len(in_flight)))
                latents_bnhwc, images_bnhwc = (np.concatenate(part, axis=1) for part in zip(*parts))
                parts = []
                yield batch, latents_bnhwc, images_bnhwc

    def calls(
        self, slots: Iterator[Slot | None], generator: TextToImage
    ) -> Iterator[tuple[list[Slot | None], bool, tuple[jax.Array, jax.Array]]]:
        """Yield (slots, whether it has the last of their images, latents, images), on the devices, as they are made."""
        size = self.sets_at_once * generator.num_devices
        while batch := list(itertools.islice(slots, size)):
            batch += [None] * (size - len(batch))
            captions: list[str] = []
            indices: list[int] = []
            for slot in batch:  # what stands for nothing is the set before it once more
                captions.append(slot.caption if slot else captions[-1])
                indices.append(slot.row if slot else indices[-1])
            for first in range(0, self.images_per_set, self.images_at_once):
                end = first + self.images_at_once
                numbers_n = np.arange(first, end, dtype=np.uint32)
                arrays = generator.generate(captions, np.array(indices, np.uint32), numbers_n, self.seed)
                for array in arrays:
                    array.copy_to_host_async()
                yield batch, end >= self.images_per_set, arrays


def build_shards(
    directory: str | Path,
    shards: Sequence[Shard],
    captions: Mapping[str, list[tuple[int, str]]],
    generator: TextToImage,
    batching: Batching,
    make_set: SetMaker,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], object] = print,
) -> bool:
    """Make these shards, one after another.

    Args:
      captions: (row, caption) of each split.
      should_stop: asked after every batch. What was begun is then left out.
      report: given a line every few seconds.

    Returns:
      Whether all are made.

    Raises:
      UserError: the disk is full, what the generator makes is not finite, the safety filter is none.
    """
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    pool, disk = ThreadPoolExecutor(threads, "encode"), ThreadPoolExecutor(1, "write")
    written = _Written(directory, _made_on())
    progress = _Progress(sum(len(shard.captions) for shard in shards), batching.images_per_set, report)
    pending: collections.deque[Future[None]] = collections.deque()
    try:
        for batch, latents_bnhwc, images_bnhwc in batching.generate(batching.slots(shards, captions), generator):
            for slot, latents_nhwc, images_nhwc in zip(batch, latents_bnhwc, images_bnhwc, strict=True):
                if slot is not None:
                    made = pool.submit(make_set, slot, latents_nhwc, images_nhwc)
                    pending.append(disk.submit(written.add, slot, made))
            # So many may wait for the threads: more would fill the memory.
            while pending and (pending[0].done() or len(pending) > len(batch) + 2 * threads):
                pending.popleft().result()
            progress.tell(len(pending), batch)
            if should_stop():
                return False
        while pending:
            pending.popleft().result()
        return True
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        disk.shutdown(wait=True, cancel_futures=True)
        written.abandon()


class _Written:
    """Put sets into their shards, in the thread that writes."""

    def __init__(self, directory: str | Path, made_on: str):
        self._directory, self._made_on = directory, made_on
        self._writer: build_folder.ShardWriter | None = None

    def add(self, slot: Slot, made: Future[MadeSet]) -> None:
        done = made.result()
        if self._writer is None:
            self._writer = build_folder.ShardWriter(self._directory, slot.shard, self._made_on)
        if done.serialized is not None:
            self._writer.add(done.serialized, done.num_images)
        self._writer.count_dropped(done.dropped_images, done.dropped_by)
        if slot.ends_shard:
            self._writer.finish()
            self._writer = None

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()


class _Progress:
    """A line every few seconds. Rates are since the first batch: what came before is compilation."""

    def __init__(self, total: int, images_per_set: int, report: Callable[[str], object]):
        self._total, self._images_per_set, self._report = total, images_per_set, report
        self._made = self._made_first = 0
        self._first = self._told = 0.0

    def tell(self, waiting: int, batch: list[Slot | None]) -> None:
        now = time.monotonic()
        self._made += sum(slot is not None for slot in batch)
        if not self._first:
            self._first, self._made_first = now, self._made
        if now - self._told < _SECONDS_BETWEEN_LINES and self._made < self._total:
            return
        self._told = now
        line = f"{self._made}/{self._total} sets generated, {waiting} of them to be written"
        if now > self._first and self._made > self._made_first:
            rate = (self._made - self._made_first) / (now - self._first)
            seconds = (self._total - self._made) / rate
            line += f"  {rate:.2f} sets/s  {rate * self._images_per_set:.1f} images/s  {duration(seconds)} left"
        self._report(line)


def _made_on() -> str:
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, pillow {Image.__version__}"
