"""Latents on disk, also with their images: `m2m_jax.data.precompute` writes and `data.name=precomputed` reads them.

    DIR/precomputed-train.json                     how the split was made, and each record's kind and number of images
    DIR/train-00000-of-00012.array_record  ...     its records, as in `records.py`, in the order of the split

A shard is an array_record file of serialized TFDS examples. It is written aside and renamed when it is whole, so a
split is complete where all its shards exist. Each split has a manifest of its own: those who write different splits,
or different shards of one, never change the same file.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorflow_datasets.proto import tf_example_pb2

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, fingerprint
from m2m_jax.data import records
from m2m_jax.data.descriptions import MAX_SIDE, is_whole, read_description
from m2m_jax.data.record_writer import RecordWriter
from m2m_jax.data.shards import ShardRecords
from m2m_jax.models.autoencoder import AutoencoderConfig

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `precomputed-SPLIT.json` says.

    version: of this layout, `VERSION`.
    image_size: pixels a side of what was encoded.
    autoencoder: `describe_autoencoder` of the one that encoded.
    latent_shape, latent_dtype: [h, w, c] of one image; "float16" or "float32".
    has_images: whether the records hold the encoded images, too.
    records_per_shard: in every shard but the last.
    kinds, num_images: of each record, in order.
    made_from, command: the data set, and what completes the split; for people.
    attributes: {name: numbers an image} of every record.
    """

    version: int
    image_size: int
    autoencoder: dict
    latent_shape: list[int]
    latent_dtype: str
    has_images: bool
    records_per_shard: int
    kinds: list[str]
    num_images: list[int]
    made_from: str
    command: str
    attributes: dict = dataclasses.field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        return -(-len(self.kinds) // self.records_per_shard)

    def check(self) -> None:
        """Raise ValueError for values that `precompute` does not write."""
        if not all(is_whole(x, 1, records.MAX_IMAGES_PER_RECORD) for x in _items(self.num_images)):
            raise ValueError("num_images")
        if not all(isinstance(kind, str) for kind in _items(self.kinds)) or len(self.kinds) != len(self.num_images):
            raise ValueError("kinds")
        if len(_items(self.latent_shape)) != 3 or not all(is_whole(x, 1, MAX_SIDE) for x in self.latent_shape):
            raise ValueError("latent_shape")
        if not is_whole(self.image_size, 1, MAX_SIDE) or not is_whole(self.records_per_shard, 1, 2**48):
            raise ValueError("image_size, records_per_shard")
        if type(self.has_images) is not bool:
            raise ValueError("has_images")
        if self.latent_dtype not in records.LATENT_DTYPES or not isinstance(self.autoencoder, dict):
            raise ValueError("latent_dtype, autoencoder")
        if not isinstance(self.attributes, dict) or not all(is_whole(x, 1, 2**16) for x in self.attributes.values()):
            raise ValueError("attributes")

    def shard_records(self, shard: int) -> range:
        """Return the records of one shard."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, len(self.kinds)))


class PrecomputedRecords(ShardRecords):
    """A split of latents.

    strict: as for `ShardRecords`. Raises UserError where the split is missing, incomplete (if strict), or of another
    image size (pixels a side); None takes any.
    """

    def __init__(self, directory: str, split: str, image_size: int | None, *, strict: bool = True):
        manifest = read_manifest(directory, split)
        if image_size not in (None, manifest.image_size):
            raise UserError(
                f"data.path={directory!r} holds latents of images of {manifest.image_size} px: "
                f"set --config.data.image_size={manifest.image_size}, not {image_size}"
            )
        self.has_images = manifest.has_images
        super().__init__(
            f"{directory} ({split})",
            [shard_path(directory, split, i, manifest.num_shards) for i in range(manifest.num_shards)],
            [len(manifest.shard_records(i)) for i in range(manifest.num_shards)],
            manifest.kinds,
            manifest.num_images,
            remedy=f"remove what is damaged and make it again with: {manifest.command}",
            strict=strict,
            split=split,
            version=json.dumps([manifest.autoencoder, manifest.latent_dtype, manifest.has_images]),
            attributes=manifest.attributes,
            latent_shape=tuple(manifest.latent_shape),
        )


def read_manifest(directory: str | Path, split: str) -> Manifest:
    """Return the manifest of a split. Raises UserError where there is none that can be read."""
    path = manifest_path(directory, split)
    try:
        return read_description(path, _make_manifest, VERSION, "precompute the latents again")
    except FileNotFoundError:
        found = sorted(p.name for p in Path(directory).glob(manifest_path("", "*").name))
        remedy = f"it has {', '.join(found)}" if found else "make them with python -m m2m_jax.data.precompute"
        raise UserError(
            f"data.path={str(directory)!r} holds no precomputed latents of split {split!r}: {remedy}"
        ) from None


def _make_manifest(**values: Any) -> Manifest:
    manifest = Manifest(**values)
    manifest.check()
    return manifest


def write_manifest(directory: Path, split: str, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all.

    One that is there already stays as it is. UserError where it says that the shards beside it are others.
    """
    path = manifest_path(directory, split)
    if path.exists():
        there = read_manifest(directory, split)
        for field in dataclasses.fields(Manifest):
            if field.name in ("made_from", "command"):
                continue
            old, new = getattr(there, field.name), getattr(manifest, field.name)
            if old != new:
                values = "" if isinstance(old, list | dict) else f" ({old}, now {new})"
                raise UserError(
                    f"{path} is of other latents: {field.name} differs{values}; name another --output, or remove that"
                )
        return
    disk.require_plain(directory, "--output")
    with disk.errors(f"--output={directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        disk.write(path, f"{json.dumps(dataclasses.asdict(manifest))}\n".encode())


def write_shard(path: Path, image_sets: Iterable[records.ImageSetRecord]) -> None:
    """Write one shard, whole or not at all; the same records make the same bytes."""
    with RecordWriter(path) as writer:
        for record in image_sets:
            writer.write(serialize(record))


def manifest_path(directory: str | Path, split: str) -> Path:
    return Path(directory) / f"precomputed-{split}.json"


def shard_path(directory: str | Path, split: str, shard: int, num_shards: int) -> Path:
    return Path(directory) / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"


def describe_autoencoder(config: AutoencoderConfig, params: Params) -> dict:
    """Return {"config": its architecture and scaling factor, "sha256": of all its weights}; what JSON holds."""
    return {"config": json.loads(json.dumps(dataclasses.asdict(config))), "sha256": fingerprint(params)}


def serialize(record: records.ImageSetRecord) -> bytes:
    features = records.features(attributes=bool(record.attributes))
    serialized = features.serialize_example(records.encode_record(record))
    # The fields of a TFDS example are in an order of each process's own; this one is the same everywhere.
    return tf_example_pb2.Example.FromString(serialized).SerializeToString(deterministic=True)


def _items(values: Any) -> list:
    if not isinstance(values, list):
        raise ValueError(f"{values!r:.40} is no list")
    return values
