"""Image sets made from captions, on disk: what `m2m_jax.data.build_mis` writes and `data.name=mis` reads.

    DIR/mis/1.0.0/build.json                                      what is built; written before anything else
    DIR/mis/1.0.0/mis-train.array_record-00000-of-00012           sets, as in `records.py`, in the order of the captions
    DIR/mis/1.0.0/mis-train.array_record-00000-of-00012.json      what is in this shard, and what was dropped
    DIR/mis/1.0.0/features.json, dataset_info.json                for TFDS: tfds.builder("mis", data_dir=DIR)
    DIR/mis/1.0.0/manifest.json                                   counts, hashes and settings; written last

A shard holds what became of a fixed number of captions of one split. Every file is written aside and renamed: what has
its name is whole. A shard is done where the file that describes it is there; the data set is where the manifest is.
Processes that make different shards never change the same file, but for those that all of them write alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from m2m_jax.core.errors import UserError
from m2m_jax.data import records
from m2m_jax.data.descriptions import MAX_SIDE, is_whole, read_description
from m2m_jax.data.shards import count_records
from m2m_jax.data.splits import SPLITS

VERSION = 1
KIND = "mis"  # of every record
TFDS_VERSION = "1.0.0"
BUILD, MANIFEST = "build.json", "manifest.json"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
      number, count: which of how many of its split.
      captions: places in the split's list of captions.
    """

    split: str
    number: int
    count: int
    captions: range

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number, self.count)


@dataclasses.dataclass(frozen=True)
class Build:
    """What `build.json` says.

    Attributes:
      version: of this layout, `VERSION`.
      settings: everything that decides what the records are, as `build_mis.settings` has it; what JSON holds.
      captions: of each split that has any.
      dropped_captions: {rule: captions that it dropped}.
      command: that goes on with it; for people.
    """

    version: int
    settings: dict[str, Any]
    captions: dict[str, int]
    dropped_captions: dict[str, int]
    command: str

    @property
    def shards(self) -> list[Shard]:
        """All of them, split by split."""
        result, length = [], self.settings["sets_per_shard"]
        for split, total in self.captions.items():
            count = -(-total // length)
            result += [Shard(split, i, count, range(i * length, min((i + 1) * length, total))) for i in range(count)]
        return result


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What is in a shard: its file of the same name and `.json`.

    Attributes:
      sha256, num_bytes: of the file.
      captions: that it was made from.
      num_images: of each record.
      dropped_images, dropped_sets: {rule: how many it dropped}.
      made_on: device and versions that made it; for people.
    """

    name: str
    sha256: str
    num_bytes: int
    captions: int
    num_images: list[int]
    dropped_images: dict[str, int]
    dropped_sets: dict[str, int]
    made_on: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says: the build, and the reports of all its shards.

    Attributes:
      version, settings: those of `Build`.
      sets, images: how many there are.
      dropped: {"captions", "images", "sets": {rule: how many it dropped}}.
      splits: {split: its shards, in order}.
    """

    version: int
    settings: dict[str, Any]
    sets: int
    images: int
    dropped: dict[str, dict[str, int]]
    splits: dict[str, list[ShardReport]]

    def num_images(self, split: str) -> list[int]:
        """Return the number of images of each record of a split."""
        return [count for shard in self.splits[split] for count in shard.num_images]

    def check(self) -> None:
        """Raise ValueError for what `build_mis` does not write, of what reading depends on."""
        for split, reports in self.splits.items():
            names = [shard_name(split, number, len(reports)) for number in range(len(reports))]
            if split not in SPLITS or [report.name for report in reports] != names:
                raise ValueError(f"shards of {split!r}")
            if not all(is_whole(x, 1, records.MAX_IMAGES_PER_RECORD) for x in self.num_images(split)):
                raise ValueError(f"num_images of {split}")
        values = self.settings
        shape, dtype = values["latent_shape"], values["latents_dtype"]
        if len(shape) != 3 or not all(is_whole(x, 1, MAX_SIDE) for x in (values["image_size"], *shape)):
            raise ValueError("image_size, latent_shape")
        if values["store"] not in records.STORES or dtype not in (None, *records.LATENT_DTYPES):
            raise ValueError("store, latents_dtype")
        if (dtype is None) != (values["store"] == "images") or not isinstance(values["autoencoder"], dict):
            raise ValueError("latents_dtype, autoencoder")


def shard_name(split: str, number: int, count: int) -> str:
    """Return the name of the file, as TFDS wants it."""
    return f"mis-{split}.array_record-{number:05d}-of-{count:05d}"


def folder(directory: str | Path) -> Path:
    """Return where TFDS looks for the data set."""
    return Path(directory) / "mis" / TFDS_VERSION


def digest(caption: str) -> int:
    """Return 64 bits of a caption, the same for those that count as duplicates.

    Among 12 million captions the chance that any two that differ agree is 4 in a million.
    """
    if not caption.isascii():
        caption = " ".join(unicodedata.normalize("NFKC", caption).split())
    return int.from_bytes(hashlib.blake2b(caption.casefold().encode(), digest_size=8).digest(), "little")


def split_of(caption: str, validation_share: float, test_share: float) -> str:
    """Name the split of a caption, by a hash that duplicates share: no split has seen another's."""
    place = digest(caption) / 2**64
    if place < validation_share:
        return "validation"
    return "test" if place < validation_share + test_share else "train"


def is_done(directory: str | Path, shard: Shard) -> bool:
    """Say whether the shard is there and whole; its records are counted, and not read."""
    path = folder(directory) / shard.name
    try:
        report = read_report(directory, shard)
        whole = path.stat().st_size == report.num_bytes and count_records(path) == len(report.num_images)
    except (UserError, OSError):
        return False
    return whole and report.captions == len(shard.captions)


def read_build(directory: str | Path) -> Build:
    """Return what is built there. Raises UserError where nothing is."""
    return _read(folder(directory) / BUILD, Build)


def read_report(directory: str | Path, shard: Shard) -> ShardReport:
    """Return the report of a shard that is done. Raises UserError where it is not."""
    return _read(report_path(directory, shard), ShardReport)


def read_manifest(directory: str | Path) -> Manifest:
    """Return what is there. Raises UserError where there is no finished data set."""
    path = folder(directory) / MANIFEST
    if not path.exists() and (folder(directory) / BUILD).exists():
        command = read_build(directory).command
        raise UserError(f"{path.parent} is not finished: go on with {command}")
    return _read(path, _make_manifest)


def report_path(directory: str | Path, shard: Shard) -> Path:
    """Return the path of the file that describes a shard."""
    return folder(directory) / f"{shard.name}.json"


def _read(path: Path, make: Callable[..., T]) -> T:
    try:
        return read_description(path, make, VERSION, "build it again")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: make the data set with python -m m2m_jax.data.build_mis") from None


def _make_manifest(splits: Mapping[str, list], **others: Any) -> Manifest:
    reports = {split: [ShardReport(**report) for report in shards] for split, shards in splits.items()}
    manifest = Manifest(splits=reports, **others)
    manifest.check()
    return manifest
