"""The input pipeline: image sets -> batches, with an order that is computed rather than remembered.

Everything about global example i (which record, which of its images in which order, which augmentation) is a
function of (seed, i). Batch s holds the examples s * B to (s + 1) * B - 1, whatever the number of hosts; so a
run resumes from its step alone, also on another number of hosts.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import grain
import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from m2m_jax.data import augmentation, folder, precomputed, records
from m2m_jax.errors import UserError
from m2m_jax.images import decode_image, fit_square, on_white

# Independent random streams of one example.
_ORDER_STREAM, _CHOICE_STREAM, _AUGMENTATION_STREAM = 0, 1, 2
# Decoded and resized images are kept up to this much; the whole emoji data set at 32 px takes 75 MB.
_CACHE_BYTES = 256 * 2**20
# Names of an example's parts -> of a batch's.
_BATCHED = {
    "images_nhwc": "images_bnhwc",
    "latents_nhwc": "latents_bnhwc",
    "example_index": "example_index_b",
    "record_index": "record_index_b",
}
# What a step computes with. The rest of a batch says what it is, and stays on the host.
_INPUTS = ("images_bnhwc", "latents_bnhwc")
_ENDLESS = 2**48  # number of examples: more than any run takes


class RecordSource(Protocol):
    """Random access to the records of one split."""

    name: str  # for messages
    kinds: Sequence[str]  # of each record
    num_images: Sequence[int]  # of each record

    def __getitem__(self, index: int) -> records.ImageSetRecord: ...


class EmojiRecords:
    """A split of the prepared emoji data set. Raises UserError if it has not been prepared."""

    def __init__(self, directory: str, image_size: int, split: str):
        # Imported here: reading folders needs neither TFDS's builders nor the packages with artwork.
        from m2m_jax.data import emoji

        builder = emoji.make_builder(image_size, directory)
        if not builder.is_prepared():
            raise UserError(
                f"no emoji data set of {image_size} px in {directory!r}: make it with "
                f"python -m m2m_jax.data.prepare --size={image_size} --directory={directory}"
            )
        if split not in builder.info.splits:
            raise UserError(f"split {split!r}: the emoji data set has {', '.join(builder.info.splits)}")
        self.name = f"{builder.data_path} ({split})"
        self.kinds = builder.info.metadata["kinds"][split]
        self.num_images = builder.info.metadata["num_images"][split]
        self._examples = builder.as_data_source(split)

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        return records.decode_record(self._examples[index], source=self.name, index=index)


def _open_emoji(config: ConfigDict, split: str) -> RecordSource:
    return EmojiRecords(config.directory, config.image_size, split)


def _open_folder(config: ConfigDict, split: str) -> RecordSource:
    return folder.load(config.path, split, config.images_per_set)


def _open_precomputed(config: ConfigDict, split: str) -> RecordSource:
    return precomputed.PrecomputedRecords(config.path, split, config.image_size)


# data.name -> opens a split of it.
SOURCES: dict[str, Callable[[ConfigDict, str], RecordSource]] = {
    "emoji": _open_emoji,
    "folder": _open_folder,
    "precomputed": _open_precomputed,
}


class SetExamples:
    """Example i, for any i: {"images_nhwc": uint8 [N, S, S, 3], "example_index": int, "record_index": int}.

    Of precomputed latents, {"latents_nhwc": float32 [N, h, w, c]} in the place of the images.
    With one image a set (N = 1) an epoch goes through all images, otherwise through all sets.
    """

    def __init__(self, source: RecordSource, config: ConfigDict, *, seed: int, augment: bool):
        wanted = config.images_per_set
        if wanted < 1:
            raise UserError(f"data.images_per_set={wanted}: must be at least 1")
        kinds, counts = np.asarray(source.kinds), np.asarray(source.num_images)
        # Kinds to choose from are the emoji data set's, as images or as latents: a folder has but its own.
        of_kind = np.isin(kinds, [*config.kinds, folder.KIND])
        if not of_kind.any():
            known = sorted(set(kinds.tolist()))
            raise UserError(f"data.kinds={tuple(config.kinds)}: {source.name} has {known}")
        self._usable = np.flatnonzero(of_kind & (counts >= wanted))
        if not len(self._usable):
            most = counts[of_kind].max()
            raise UserError(f"data.images_per_set={wanted}: the largest set of {source.name} has {most} images")
        self._counts = counts
        self._ends = np.cumsum(counts[self._usable])  # where each record's images end in a list of all
        self._epoch_length = int(self._ends[-1]) if wanted == 1 else len(self._usable)
        self._source, self._seed = source, seed
        self._images_per_set, self._image_size = wanted, config.image_size
        self._precomputed = config.name == "precomputed"
        self._augment = None
        if augment and config.augment.enabled:
            self._augment = augmentation.SetAugmentation.from_config(config.augment)
        # A cache of one instance: a decorated method would keep every instance alive.
        cached = functools.lru_cache(maxsize=_CACHE_BYTES // (4 * self._image_size**2))
        self._load_image = cached(self._load_image)

    @property
    def epoch_length(self) -> int:
        """Examples until every set (with N = 1: every image) has been used once."""
        return self._epoch_length

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        record, chosen = self.choose(index)
        indices = {"example_index": np.int64(index), "record_index": np.int64(record)}
        if self._precomputed:
            return {"latents_nhwc": self._source[record].latents[chosen].astype(np.float32), **indices}
        images = np.stack([self._load_image(record, image) for image in chosen])
        if self._augment is None:
            images = on_white(images)
        else:
            images = self._augment(images, self._rng(_AUGMENTATION_STREAM, index))
        return {"images_nhwc": images, **indices}

    def set_ids(self, record_index_b: Iterable[int]) -> list[str]:
        """What the records of a batch are called, for messages. Reads those records, and decodes no image."""
        return [self._source[int(index)].set_id for index in record_index_b]

    def choose(self, index: int) -> tuple[int, np.ndarray]:
        """Example index -> (record of the source, which of its images, in order: int [N])."""
        epoch, position = divmod(index, self._epoch_length)
        shuffled = index_shuffle(position, max_index=self._epoch_length - 1, seed=self._epoch_seed(epoch), rounds=4)
        if self._images_per_set == 1:
            which = int(np.searchsorted(self._ends, shuffled, side="right"))
            record = int(self._usable[which])
            return record, np.array([shuffled - (self._ends[which] - self._counts[record])])
        record = int(self._usable[shuffled])
        rng = self._rng(_CHOICE_STREAM, index)
        return record, rng.permutation(self._counts[record])[: self._images_per_set]

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self._seed, _ORDER_STREAM, epoch]).generate_state(1)[0])

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream, index])

    def _load_image(self, record_index: int, image_index: int) -> np.ndarray:
        """uint8 RGBA [S, S, 4], read-only because it is shared."""
        record = self._source[record_index]
        where = f"{self._source.name}, set {record.set_id!r}, image {image_index}"
        if not record.images:
            raise UserError(f"{where}: holds latents; training on pixels needs encoded images")
        pixels = fit_square(decode_image(record.images[image_index], where), self._image_size)
        pixels.flags.writeable = False
        return pixels


def open_examples(data_config: ConfigDict, *, split: str, seed: int, augment: bool = True) -> SetExamples:
    """The examples of a split: "train", "validation" or "test".

    data_config: the `data` part of the configuration.
    augment: False composites on white and does nothing else.
    Raises UserError if the data cannot be used as the configuration asks.
    """
    if data_config.name not in SOURCES:
        raise UserError(f"data.name={data_config.name!r}: known are {', '.join(SOURCES)}")
    return SetExamples(SOURCES[data_config.name](data_config, split), data_config, seed=seed, augment=augment)


def make_dataset(examples: SetExamples, *, batch_size: int, rows: Sequence[int] | None = None) -> grain.MapDataset:
    """This process's share of every batch: dataset[s] is that of step s, for any s >= 0.

    batch_size: sets a batch, B, all processes together.
    rows: which of them, 0 to B - 1, are this process's; None: all.
    Elements, with b = len(rows): {"images_bnhwc": uint8 [b, N, S, S, 3], "example_index_b": int64 [b],
    "record_index_b": int64 [b], the records of the source that they were made from}; of precomputed latents
    "latents_bnhwc": float32 [b, N, h, w, c] in the place of the images.
    """
    rows = tuple(range(batch_size) if rows is None else rows)
    share = len(rows)

    def global_index(local_index: int) -> int:
        step, position = divmod(local_index, share)
        return step * batch_size + rows[position]

    return (
        grain.MapDataset.range(_ENDLESS // batch_size * share)
        .map(lambda local_index: examples[global_index(int(local_index))])
        .batch(share, drop_remainder=True)
        .map(lambda batch: {_BATCHED[name]: value for name, value in batch.items()})
    )


def inputs(batch: dict) -> dict:
    """What of a batch goes to the devices: images or latents."""
    return {name: value for name, value in batch.items() if name in _INPUTS}


def batches(dataset: grain.MapDataset, start_step: int, prefetch: int, threads: int) -> Iterator[dict]:
    """Batches from `start_step` on, made ahead of use in the background.

    prefetch: batches made ahead; 0 makes each when it is asked for. threads: that make them, >= 1.
    """
    options = grain.ReadOptions(num_threads=threads if prefetch else 0, prefetch_buffer_size=prefetch)
    return iter(dataset[start_step:].to_iter_dataset(options))
