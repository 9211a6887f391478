"""The input pipeline: image sets -> batches, with an order that is computed rather than remembered.

Everything about global example i (which record, which of its images in which order, which augmentation) is a
function of (seed, i). Batch s holds the examples s * B to (s + 1) * B - 1, whatever the number of hosts; so a
run resumes from its step alone, also on another number of hosts.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from m2m_jax.configuration import reads_latents
from m2m_jax.data import augmentation, folder, mis, precomputed, records
from m2m_jax.data.mis_source import MisRecords
from m2m_jax.data.records import BadRecord
from m2m_jax.data.shards import ShardRecords
from m2m_jax.errors import UserError, warn
from m2m_jax.images import decode_image, fit_square, on_white

# Independent random streams of one example.
_ORDER_STREAM, _CHOICE_STREAM, _AUGMENTATION_STREAM, _SUBSTITUTE_STREAM, _CAPTION_STREAM = 0, 1, 2, 3, 4
# With data.on_error=skip: so many sets are tried in the place of a damaged one, and so many are told of.
_MAX_SUBSTITUTES, _MAX_TOLD = 10, 10
# Decoded and resized images are kept up to this much; the whole emoji data set at 32 px takes 75 MB.
_CACHE_BYTES = 256 * 2**20
_RECORDS_AT_ONCE = 32  # more than there are threads, data.threads
# Names of an example's parts -> of a batch's.
_BATCHED = {
    "images_nhwc": "images_bnhwc",
    "latents_nhwc": "latents_bnhwc",
    "token_ids_ns": "token_ids_bns",
    "example_index": "example_index_b",
    "record_index": "record_index_b",
    "substituted": "substituted_b",
}
# What a step computes with. The rest of a batch says what it is, and stays on the host.
_INPUTS = ("images_bnhwc", "latents_bnhwc", "token_ids_bns")
_ENDLESS = 2**48  # number of examples: more than any run takes


class RecordSource(Protocol):
    """Random access to the records of one split."""

    name: str  # for messages
    kinds: Sequence[str]  # of each record
    num_images: Sequence[int]  # of each record
    has_images: bool  # whether records hold images; else they hold latents alone

    def __getitem__(self, index: int) -> records.ImageSetRecord:
        """Raises BadRecord for what is damaged."""


def open_emoji(directory: str, image_size: int, split: str, *, strict: bool) -> ShardRecords:
    """A split of the prepared emoji data set; strict: as for `ShardRecords`. UserError if it has not been prepared."""
    # Imported here: reading folders needs neither TFDS's builders nor the packages with artwork.
    from m2m_jax.data.emoji.builder import make_builder

    return _open_prepared(make_builder, "", directory, image_size, split, strict=strict)


def open_emoji_hands(directory: str, image_size: int, split: str, *, strict: bool) -> ShardRecords:
    """A split of the prepared emoji data set of many hands; as `open_emoji`."""
    from m2m_jax.data.emoji.hands_builder import make_hands_builder

    return _open_prepared(make_hands_builder, "--hands ", directory, image_size, split, strict=strict)


def _open_prepared(
    make_builder: Callable, flag: str, directory: str, image_size: int, split: str, *, strict: bool
) -> ShardRecords:
    """flag: what `m2m_jax.data.prepare` needs to be told, to make it."""
    remedy = f"python -m m2m_jax.data.prepare {flag}--size={image_size} --directory={directory}"
    try:
        builder = make_builder(image_size, directory)
        if not builder.is_prepared():
            raise UserError(f"no emoji data set of {image_size} px in {directory!r}: make it with {remedy}")
        if split not in builder.info.splits:
            raise UserError(f"split {split!r}: the emoji data set has {', '.join(builder.info.splits)}")
        of_split = builder.info.splits[split]
        files, counts = [Path(path) for path in of_split.filepaths], list(of_split.shard_lengths)
        if any(file.parent != Path(builder.data_path) for file in files):
            raise ValueError("files outside of its folder")
        kinds, num_images = (list(builder.info.metadata[name][split]) for name in ("kinds", "num_images"))
    except UserError:
        raise
    except Exception as error:  # TFDS reads its JSON files without a check
        raise UserError(
            f"the emoji data set of {image_size} px in {directory!r} is damaged ({error!r:.200}): remove it and make "
            f"it again with {remedy}"
        ) from error
    remedy = f"remove {builder.data_path} and make it again with {remedy}"
    return ShardRecords(
        f"{builder.data_path} ({split})", files, counts, kinds, num_images, remedy=remedy, strict=strict
    )


def _open_emoji(config: ConfigDict, split: str) -> RecordSource:
    return open_emoji(config.directory, config.image_size, split, strict=_strict(config))


def _open_emoji_hands(config: ConfigDict, split: str) -> RecordSource:
    return open_emoji_hands(config.directory, config.image_size, split, strict=_strict(config))


def _open_folder(config: ConfigDict, split: str) -> RecordSource:
    return folder.load(config.path, split, config.images_per_set, strict=_strict(config))


def _open_precomputed(config: ConfigDict, split: str) -> RecordSource:
    return precomputed.PrecomputedRecords(config.path, split, config.image_size, strict=_strict(config))


def _open_mis(config: ConfigDict, split: str) -> RecordSource:
    size = config.image_size
    return MisRecords(config.path, split, latents=config.latents, image_size=size, strict=_strict(config))


def _strict(config: ConfigDict) -> bool:
    return config.on_error == "stop"


# data.name -> opens a split of it.
SOURCES: dict[str, Callable[[ConfigDict, str], RecordSource]] = {
    "emoji": _open_emoji,
    "emoji_hands": _open_emoji_hands,
    "folder": _open_folder,
    "precomputed": _open_precomputed,
    "mis": _open_mis,
}


class SetExamples:
    """Example i, for any i: {"images_nhwc": uint8 [N, S, S, 3], "example_index", "record_index", "substituted"}.

    Of precomputed latents, {"latents_nhwc": float32 [N, h, w, c]} in the place of the images or, `with_images`, beside
    them. With a tokenizer there are captions, too: {"token_ids_ns": int32 [N, s]}, each image's own or, where there is
    none, its set's.
    With one image a set (N = 1) an epoch goes through all images, otherwise through all sets.

    A damaged record raises BadRecord. With data.on_error=skip another one takes its place, which is drawn from
    (seed, i) alone: the same on every resume and for any number of processes. `substituted` says so.
    """

    def __init__(
        self,
        source: RecordSource,
        config: ConfigDict,
        *,
        seed: int,
        augment: bool,
        whole_captions: bool = False,
        tokenizer: Callable[[Sequence[str]], np.ndarray] | None = None,
        with_images: bool = False,
    ):
        wanted = config.images_per_set
        if wanted < 1:
            raise UserError(f"data.images_per_set={wanted}: must be at least 1")
        self._latents = reads_latents(config)
        self._images = with_images or not self._latents
        if self._images and not source.has_images:
            raise UserError(
                f"{source.name} holds latents alone, and images are wanted: make it with both, by "
                "m2m_jax.data.precompute --keep_images or m2m_jax.data.build_mis --store=both"
            )
        kinds, counts = np.asarray(source.kinds), np.asarray(source.num_images)
        # Kinds to choose from are the emoji data set's, as images or as latents: the others have but their own.
        of_kind = np.isin(kinds, [*config.kinds, folder.KIND, mis.KIND])
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
        self._skip = not _strict(config)
        self._told, self._lock = 0, threading.Lock()
        left_out = int((of_kind & (counts < wanted)).sum())
        if left_out:
            warn(f"{source.name}: {left_out} sets with fewer than {wanted} images are left out")
        self._images_per_set, self._image_size = wanted, config.image_size
        drops_tags = augment and not whole_captions
        self._tokenizer, self._tag_dropout = tokenizer, config.caption_tag_dropout if drops_tags else 0.0
        self._augment = None
        if augment and config.augment.enabled:
            self._augment = augmentation.SetAugmentation.from_config(config.augment)
        # A cache of one instance: a decorated method would keep every instance alive.
        cached = functools.lru_cache(maxsize=_CACHE_BYTES // (4 * self._image_size**2))
        self._load_image = cached(self._load_image)
        # A record is read once for all of its images that an example takes, in whichever thread.
        self._read = functools.lru_cache(maxsize=_RECORDS_AT_ONCE)(source.__getitem__)

    @property
    def epoch_length(self) -> int:
        """Examples until every set (with N = 1: every image) has been used once."""
        return self._epoch_length

    @property
    def num_sets(self) -> int:
        """How many different sets examples are of."""
        return len(self._usable)

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        record, chosen = self.choose(index)
        first_error = None
        for attempt in range(_MAX_SUBSTITUTES + 1):
            try:
                return {
                    **self._content(index, record, chosen),
                    **self._captions(index, record, chosen),
                    "example_index": np.int64(index),
                    "record_index": np.int64(record),
                    "substituted": np.bool_(attempt > 0),
                }
            except BadRecord as error:
                if not self._skip:
                    raise
                first_error = first_error or error
                self._tell(index, error)
            record, chosen = self._substitute(index, attempt)
        raise UserError(
            f"example {index}: its set and {_MAX_SUBSTITUTES} others in its place are damaged, the first being "
            f"{first_error}; see what is wrong with python -m m2m_jax.data.check"
        )

    def _content(self, index: int, record: int, chosen: np.ndarray) -> dict:
        """Raises BadRecord."""
        content = {}
        if self._latents:
            content["latents_nhwc"] = self._read(record).latents[chosen].astype(np.float32)
        if self._images:
            images = np.stack([self._load_image(record, image) for image in chosen])
            if self._augment is None:
                content["images_nhwc"] = on_white(images)
            else:
                content["images_nhwc"] = self._augment(images, self._rng(_AUGMENTATION_STREAM, index))
        return content

    def _captions(self, index: int, record: int, chosen: np.ndarray) -> dict:
        """Raises BadRecord."""
        if self._tokenizer is None:
            return {}
        of_set = self._read(record)
        captions = [of_set.image_captions[image] if of_set.image_captions else of_set.caption for image in chosen]
        rng = self._rng(_CAPTION_STREAM, index)
        return {"token_ids_ns": self._tokenizer([drop_tags(text, self._tag_dropout, rng) for text in captions])}

    def _tell(self, index: int, error: BadRecord) -> None:
        with self._lock:
            self._told += 1
            if self._told <= _MAX_TOLD:
                more = "; further ones are only counted" if self._told == _MAX_TOLD else ""
                warn(f"example {index} gets another set: {error}{more}")

    def set_ids(self, record_index_b: Iterable[int]) -> list[str]:
        """What the records of a batch are called, for messages. Reads those records, and decodes no image."""
        return [self._source[int(index)].set_id for index in record_index_b]

    def titles(self, record_index_b: Iterable[int]) -> list[str]:
        """What the records of a batch show: their captions or, where there is none, their names."""
        sets = [self._source[int(index)] for index in record_index_b]
        return [one.caption or one.set_id for one in sets]

    def choose(self, index: int) -> tuple[int, np.ndarray]:
        """Example index -> (record of the source, which of its images, in order: int [N])."""
        epoch, position = divmod(index, self._epoch_length)
        place = index_shuffle(position, max_index=self._epoch_length - 1, seed=self._epoch_seed(epoch), rounds=4)
        return self._choose_at(place, self._rng(_CHOICE_STREAM, index))

    def _substitute(self, index: int, attempt: int) -> tuple[int, np.ndarray]:
        """Drawn at random, lest the set that comes next be seen twice in a row."""
        rng = self._rng(_SUBSTITUTE_STREAM, index, attempt)
        return self._choose_at(int(rng.integers(self._epoch_length)), rng)

    def _choose_at(self, place: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """place: in the list of all usable sets or, with N = 1, of all their images."""
        if self._images_per_set == 1:
            which = int(np.searchsorted(self._ends, place, side="right"))
            record = int(self._usable[which])
            return record, np.array([place - (self._ends[which] - self._counts[record])])
        record = int(self._usable[place])
        return record, rng.permutation(self._counts[record])[: self._images_per_set]

    def _epoch_seed(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self._seed, _ORDER_STREAM, epoch]).generate_state(1)[0])

    def _rng(self, stream: int, *indices: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream, *indices])

    def _load_image(self, record_index: int, image_index: int) -> np.ndarray:
        """uint8 RGBA [S, S, 4], read-only because it is shared."""
        record = self._read(record_index)
        data = record.images[image_index]
        try:
            pixels = fit_square(decode_image(data, record.image_name(image_index)), self._image_size)
        except UserError as error:
            raise BadRecord(str(error)) from error
        pixels.flags.writeable = False
        return pixels


def drop_tags(caption: str, share: float, rng: np.random.Generator) -> str:
    """A caption without each of its tags, which commas part, with probability `share`; one stays in any case.

    So a model learns what each tag says by itself, and what a caption leaves open.
    """
    if not share:
        return caption
    tags = caption.split(",")
    keep = rng.random(len(tags)) >= share
    keep[rng.integers(len(tags))] |= not keep.any()
    return ",".join(tag for tag, kept in zip(tags, keep, strict=True) if kept).strip()


def open_examples(
    data_config: ConfigDict,
    *,
    split: str,
    seed: int,
    augment: bool = True,
    whole_captions: bool = False,
    tokenizer: Callable[[Sequence[str]], np.ndarray] | None = None,
    with_images: bool = False,
) -> SetExamples:
    """The examples of a split: "train", "validation" or "test".

    data_config: the `data` part of the configuration.
    augment: False composites on white, leaves captions whole, and does nothing else.
    whole_captions: no tag is dropped, also where images are augmented: those of held-out sets.
    tokenizer: captions to ids, int32 [captions, s], where they are wanted.
    with_images: images are wanted also where `data_config` names latents.
    Raises UserError if the data cannot be used as the configuration asks.
    """
    if data_config.name not in SOURCES:
        raise UserError(f"data.name={data_config.name!r}: known are {', '.join(SOURCES)}")
    source = SOURCES[data_config.name](data_config, split)
    return SetExamples(
        source,
        data_config,
        seed=seed,
        augment=augment,
        whole_captions=whole_captions,
        tokenizer=tokenizer,
        with_images=with_images,
    )


def make_dataset(
    examples: SetExamples, *, batch_size: int, rows: Sequence[int] | None = None, threads: int = 1
) -> grain.MapDataset:
    """This process's share of every batch: dataset[s] is that of step s, for any s >= 0.

    batch_size: sets a batch, B, all processes together.
    rows: which of them, 0 to B - 1, are this process's; None: all.
    threads: that read and decode, of however many batches at once.
    Elements, with b = len(rows): {"images_bnhwc": uint8 [b, N, S, S, 3], "example_index_b": int64 [b],
    "record_index_b": int64 [b], the records of the source that they were made from, "substituted_b": bool [b], which of
    them stand in the place of damaged ones}; of precomputed latents "latents_bnhwc": float32 [b, N, h, w, c] in the
    place of the images or beside them; of captions "token_ids_bns": int32 [b, N, s].
    """
    rows = tuple(range(batch_size) if rows is None else rows)
    # Not Grain's threads: they make a batch each, one example after another.
    pool = concurrent.futures.ThreadPoolExecutor(threads, "examples")

    def batch(step: int) -> dict:
        made = list(pool.map(lambda row: examples[int(step) * batch_size + row], rows))
        return {_BATCHED[name]: np.stack([example[name] for example in made]) for name in made[0]}

    return grain.MapDataset.range(_ENDLESS // batch_size).map(batch)


def inputs(batch: dict) -> dict:
    """What of a batch goes to the devices: images or latents, and captions."""
    return {name: value for name, value in batch.items() if name in _INPUTS}


def held_out_inputs(batch: dict) -> dict:
    """`inputs`, and which record each set is of: an evaluation shows a set the context of another."""
    return inputs(batch) | {"record_index_b": batch["record_index_b"].astype(np.int32)}


def batches(dataset: grain.MapDataset, start_step: int, prefetch: int) -> Iterator[dict]:
    """Batches from `start_step` on, so many of them made ahead of use in the background (0: none)."""
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    return iter(dataset[start_step:].to_iter_dataset(options))
