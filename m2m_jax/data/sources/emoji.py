"""Emoji data sets that TFDS prepares, as sources: `data.name=emoji`. `data/emoji/` draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2m_jax.configuration import Data
from m2m_jax.core.errors import UserError
from m2m_jax.data.shards import ShardRecords
from m2m_jax.data.source import SOURCES, DataSource, RecordSource


class PreparedSource(DataSource):
    """Hold sets at `config.image_size` below `config.directory`, of the kinds that `config.kinds` chooses.

    Attributes:
      folder: of the data set, within the directory; the source's name, too.
    """

    needs_path = False
    folder: str

    @classmethod
    def make_builder(cls, image_size: int, directory: str) -> Any:
        """Return the TFDS builder. Imports it here: reading other data needs no packages with artwork."""
        raise NotImplementedError

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        return cls.open_split(config.directory, config.image_size, split, strict=config.on_error == "stop")

    @classmethod
    def open_split(cls, directory: str, image_size: int, split: str, *, strict: bool) -> ShardRecords:
        """Open a split.

        Args:
          strict: as for `ShardRecords`.

        Raises:
          UserError: the data set has not been prepared at that size, has no such split, or is damaged.
        """
        remedy = f"python -m m2m_jax.data.prepare --name={cls.folder} --size={image_size} --directory={directory}"
        try:
            builder = cls.make_builder(image_size, directory)
            if not builder.is_prepared():
                what = f"no data set {cls.folder} of {image_size} px in {directory!r}"
                raise UserError(f"{what}: make it with {remedy}")
            if split not in builder.info.splits:
                raise UserError(f"split {split!r}: the data set {cls.folder} has {', '.join(builder.info.splits)}")
            of_split = builder.info.splits[split]
            files, counts = [Path(path) for path in of_split.filepaths], list(of_split.shard_lengths)
            if any(file.parent != Path(builder.data_path) for file in files):
                raise ValueError("files outside of its folder")
            kinds, num_images = (list(builder.info.metadata[name][split]) for name in ("kinds", "num_images"))
        except UserError:
            raise
        except Exception as error:  # TFDS reads its JSON files without a check
            raise UserError(
                f"the data set {cls.folder} of {image_size} px in {directory!r} is damaged ({error!r:.200}): remove it "
                f"and make it again with {remedy}"
            ) from error
        return ShardRecords(
            f"{builder.data_path} ({split})",
            files,
            counts,
            kinds,
            num_images,
            remedy=f"remove {builder.data_path} and make it again with {remedy}",
            strict=strict,
            split=split,
            version=str(builder.version),
        )

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        sizes = sorted(int(one.name[:-2]) for one in path.glob(f"{cls.folder}/*px") if one.name[:-2].isdecimal())
        return [source for size in sizes for source in cls._every_split(str(path), size)]

    @classmethod
    def find_configured(cls, config: Data) -> list[RecordSource]:
        return cls._every_split(config.directory, config.image_size)

    @classmethod
    def _every_split(cls, directory: str, image_size: int) -> list[RecordSource]:
        try:
            splits = list(cls.make_builder(image_size, directory).info.splits)
        except Exception:  # as damaged as `open_split` says
            splits = []
        return [cls.open_split(directory, image_size, split, strict=False) for split in splits or ("train",)]


@SOURCES.register("emoji")
class EmojiSource(PreparedSource):
    """Emoji of a few styles, recoloured set by set, from m2m_jax.data.prepare."""

    folder = "emoji"

    @classmethod
    def make_builder(cls, image_size: int, directory: str) -> Any:
        from m2m_jax.data.emoji.builder import Emoji

        return Emoji.at(image_size, directory)
