"""Latents that `m2m_jax.data.precompute` wrote, as a source: `data.name=precomputed`."""

from __future__ import annotations

from pathlib import Path

from m2m_jax.configuration import Data
from m2m_jax.data import precomputed
from m2m_jax.data.precomputed import PrecomputedRecords
from m2m_jax.data.source import SOURCES, DataSource, RecordSource


@SOURCES.register("precomputed")
class PrecomputedSource(DataSource):
    """Latents, from m2m_jax.data.precompute."""

    gives_latents = True

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        return PrecomputedRecords(config.path, split, config.image_size, strict=config.on_error == "stop")

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        splits = sorted(file.stem.removeprefix("precomputed-") for file in path.glob("precomputed-*.json"))
        return [PrecomputedRecords(str(path), split, None, strict=False) for split in splits]

    @classmethod
    def autoencoder(cls, config: Data, split: str) -> dict:
        return precomputed.read_manifest(config.path, split).autoencoder
