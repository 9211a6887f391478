"""Image sets made from captions, as training reads them: `data.name=mis`. Layout of the folder: `data/mis.py`."""

from __future__ import annotations

from pathlib import Path

from m2m_jax.configuration import Data
from m2m_jax.core.errors import UserError
from m2m_jax.data import mis
from m2m_jax.data.shards import ShardRecords
from m2m_jax.data.source import SOURCES, DataSource, RecordSource


@SOURCES.register("mis")
class MisSource(DataSource):
    """Image sets made from captions, from m2m_jax.data.build_mis."""

    has_choice_of_latents = True

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        size, strict = config.image_size, config.on_error == "stop"
        return MisRecords(config.path, split, latents=config.latents, image_size=size, strict=strict)

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        splits = mis.read_manifest(path).splits if mis.folder(path).is_dir() else ()
        return [MisRecords(str(path), split, latents=None, image_size=None, strict=False) for split in splits]

    @classmethod
    def autoencoder(cls, config: Data, split: str) -> dict:
        made_with = mis.read_manifest(config.path).settings.get("autoencoder")
        return made_with if isinstance(made_with, dict) else {}


class MisRecords(ShardRecords):
    """A split of what `m2m_jax.data.build_mis` made.

    latents: what is wanted of the records: their latents, their images, or (None) whatever they hold.
    image_size: pixels a side that latents must be of; images are resized. None: any.
    strict: as for `ShardRecords`. Raises UserError where the data set is not finished, or has not what is wanted.
    """

    def __init__(
        self, directory: str, split: str, *, latents: bool | None, image_size: int | None, strict: bool = True
    ):
        manifest = mis.read_manifest(directory)
        store, made_at = manifest.settings["store"], manifest.settings["image_size"]
        if split not in manifest.splits:
            raise UserError(f"data.path={directory!r} has no split {split!r}; it has {', '.join(manifest.splits)}")
        if latents and store == "images":
            raise UserError(
                f"config.data.latents is True, and {directory} holds images alone: set --config.data.latents=False, or "
                "build it with --store=both"
            )
        if latents is False and store == "latents":
            raise UserError(
                f"config.data.latents is False, and {directory} holds latents alone: set --config.data.latents=True"
            )
        if latents and image_size not in (None, made_at):
            raise UserError(
                f"data.path={directory!r} holds latents of images of {made_at} px: "
                f"set --config.data.image_size={made_at}, not {image_size}"
            )
        self.has_images = store != "latents"
        shards, num_images = manifest.splits[split], manifest.num_images(split)
        super().__init__(
            f"{mis.folder(directory)} ({split})",
            [mis.folder(directory) / shard.name for shard in shards],
            [len(shard.num_images) for shard in shards],
            [mis.KIND] * len(num_images),
            num_images,
            remedy="remove what is damaged, and build_mis, called as before, makes it again",
            strict=strict,
            split=split,
            version=" ".join([store, *(shard.sha256 for shard in shards)]),
            latent_shape=None if store == "images" else tuple(manifest.settings["latent_shape"]),
        )
