"""The prepared emoji data set as a source: `data.name=emoji`. `data/emoji/` draws it."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from m2m_jax.core.errors import UserError
from m2m_jax.data.shards import ShardRecords
from m2m_jax.data.source import SOURCES, DataSource, RecordSource


@SOURCES.register("emoji")
class EmojiSource(DataSource):
    """Sets of emoji at `config.image_size` below `config.directory`, of the kinds that `config.kinds` chooses."""

    @classmethod
    def open(cls, config: ConfigDict, split: str) -> RecordSource:
        return open_emoji(config.directory, config.image_size, split, strict=config.on_error == "stop")

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        sizes = sorted(int(one.name[:-2]) for one in path.glob("emoji/*px") if one.name[:-2].isdecimal())
        return [source for size in sizes for source in _every_split(str(path), size)]

    @classmethod
    def find_configured(cls, config: ConfigDict) -> list[RecordSource]:
        return _every_split(config.directory, config.image_size)


def open_emoji(directory: str, image_size: int, split: str, *, strict: bool) -> ShardRecords:
    """Open a split of the prepared emoji data set.

    Args:
      strict: as for `ShardRecords`.

    Raises:
      UserError: the data set has not been prepared at that size, or is damaged.
    """
    # Imported here: reading other data needs neither TFDS's builders nor the packages with artwork.
    from m2m_jax.data.emoji.builder import make_builder

    remedy = f"python -m m2m_jax.data.prepare --size={image_size} --directory={directory}"
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
    return ShardRecords(
        f"{builder.data_path} ({split})",
        files,
        counts,
        kinds,
        num_images,
        remedy=f"remove {builder.data_path} and make it again with {remedy}",
        strict=strict,
        version=str(builder.version),
    )


def _every_split(directory: str, image_size: int) -> list[RecordSource]:
    from m2m_jax.data.emoji.subjects import SPLITS

    return [open_emoji(directory, image_size, split, strict=False) for split in SPLITS]
