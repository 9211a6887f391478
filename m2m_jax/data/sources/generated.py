"""Generated sets as a source: `data.name=generated`. Layout of the folder: `data/generated.py`."""

from __future__ import annotations

from pathlib import Path

from m2m_jax.configuration import Data
from m2m_jax.core.errors import UserError
from m2m_jax.data import generated
from m2m_jax.data.shards import ShardRecords
from m2m_jax.data.source import SOURCES, DataSource, RecordSource

SPLIT = "all"


@SOURCES.register("generated")
class GeneratedSource(DataSource):
    """Sets of given and made images, from m2m_jax.generate."""

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        if split != SPLIT:
            raise UserError(f"split {split!r}: generated sets have one, {SPLIT}")
        return _open(Path(config.path), strict=config.on_error == "stop")

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        if not (path / generated.MANIFEST).exists() or generated.read_manifest(path).format != "records":
            return []  # folders are data.name=folder
        return [_open(path, strict=False)]


def _open(path: Path, *, strict: bool) -> ShardRecords:
    manifest = generated.read_manifest(path)
    shards = manifest.shards
    return ShardRecords(
        f"{path} ({SPLIT})",
        [generated.shard_path(path, manifest, shard) for shard in range(len(shards))],
        [len(shard) for shard in shards],
        manifest.kinds,
        [manifest.given + manifest.num_images] * len(manifest.kinds),
        remedy=generated.REMEDY,
        strict=strict,
        split=SPLIT,
        version=str(manifest.made_by),
        attributes=manifest.attributes,
    )
