"""Data sources: kinds of data sets, which register under the name that `config.data.name` chooses them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from m2m_jax.configuration import Data
from m2m_jax.core.errors import UserError
from m2m_jax.core.paths import expand_home
from m2m_jax.core.registry import Registry
from m2m_jax.data.records import ImageSetRecord


class RecordSource:
    """The records of one split, by their number. What `DataSource.open` returns; subclasses set the attributes.

    Attributes:
      name: what messages call it.
      split: the name of the split.
      kinds, num_images: of each record, in order; known without reading any.
      has_images: whether records hold images; else they hold latents alone.
      attributes: {name: numbers an image} that every record has; they reach batches as `attribute_NAME_bnc`.
      notes: lines for the report of `data.check` about the data set as a whole.
      fingerprint: hash of the listing of the split, by which a resumed run tells whether it is the same.
    """

    name: str
    split: str = ""
    kinds: Sequence[str]
    num_images: Sequence[int]
    has_images: bool = True
    attributes: Mapping[str, int] = MappingProxyType({})
    notes: Sequence[str] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> ImageSetRecord:
        """Return a record. Raises BadRecord for one that is damaged; may be called from several threads."""
        raise NotImplementedError


class DataSource:
    """A kind of data set. Never instantiated: a subclass is a name for its functions. Its docstring is its help.

    It may have a dataclass `Options` of what it alone reads, `config.data.options` (see `config_fields.options`).

    Example, a file in `data/sources/`, or in a config file of one's own:
        @SOURCES.register("numbers")
        class Numbers(DataSource):
            \"\"\"Digits, a set a font.\"\"\"

            @classmethod
            def open(cls, config, split):
                return NumberRecords(config.path, split)    # a RecordSource

    Attributes:
      needs_path: whether `config.path` must name something.
      gives_latents: whether records hold latents to train on, in any case.
      has_choice_of_latents: whether they may, and `config.latents` asks for them.
    """

    needs_path: ClassVar[bool] = True
    gives_latents: ClassVar[bool] = False
    has_choice_of_latents: ClassVar[bool] = False

    @classmethod
    def check_config(cls, config: Data) -> None:
        """Raise UserError where the `data` part of a configuration makes no sense for this source."""
        name = config.name
        if cls.needs_path and not config.path:
            raise UserError(f"config.data.path is empty; data.name={name} needs --config.data.path=DIR")
        if config.latents and not cls.has_choice_of_latents:
            raise UserError(f"config.data.latents is True; data.name={name} has no choice of them")

    @classmethod
    def open(cls, config: Data, split: str) -> RecordSource:
        """Open a split of the data set that `config`, the `data` part of a configuration, names.

        Raises:
          UserError: it cannot be used as the configuration asks. With data.on_error=skip damaged files and records are
            no reason: they raise BadRecord when they are read.
        """
        raise NotImplementedError

    @classmethod
    def find(cls, path: Path, *, follow_links: bool = False) -> list[RecordSource]:
        """Return all splits of the data set at `path`, damaged or not, for `data.check`; none if it is another kind."""
        return []

    @classmethod
    def find_configured(cls, config: Data) -> list[RecordSource]:
        """Return every split of the data set that `config`, the `data` part of a configuration, names; as `find`."""
        found = cls.find(expand_home(config.path), follow_links=config.follow_links)
        if not found:
            raise UserError(f"data.path={config.path!r} holds no data set of data.name={config.name}")
        return found

    @classmethod
    def autoencoder(cls, config: Data, split: str) -> dict:
        """Return what made the latents, as `precomputed.describe_autoencoder` says it. Only asked of latents."""
        return {}


_LEVELS = 3  # between a data set's files and the directory that is named: NAME/32px/1.0.0

SOURCES = Registry[type[DataSource]]("data source", package="m2m_jax.data.sources")


def open_source(config: Data, split: str) -> RecordSource:
    """Open a split of the data set that `config`, the `data` part of a configuration, names.

    Raises:
      UserError: there is no such source, or it cannot be used as the configuration asks.
    """
    return SOURCES.choose(config.name).open(config, split)


def open_named(text: str) -> RecordSource:
    """Open what `text` names: a folder with a folder for each set, or a data set and one of its splits, DIR:SPLIT.

    DIR is what `data.directory` or `data.path` is, or a folder within: data, data/emoji or data/emoji/32px, where the
    first holds several data sets. Damaged files and records raise BadRecord when they are read.

    Raises:
      UserError: there is no such data set or split, or several.
    """
    path, _, split = text.rpartition(":")
    if not path or expand_home(text).exists():
        path, split = text, ""
    found = _find_at_or_above(path)
    if not found and split:  # a folder of folders, which is parted by the names of sets
        find_sources(path)  # which refuses what is none
        config = Data(name="folder", path=path, images_per_set=1, on_error="skip")
        return open_source(config, split)
    found = found or find_sources(path)
    splits = ", ".join(dict.fromkeys(source.split for source in found))
    fitting = [source for source in found if split in ("", source.split)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UserError(f"{text}: no split {split!r}; {path} has {splits}")
    if len({_place(source) for source in fitting}) > 1:
        places = ", ".join(f"{_place(source)}:{source.split}" for source in fitting)
        raise UserError(f"{text} is in several data sets: name one of {places}")
    raise UserError(f"{text} has several splits ({splits}): name one, {text}:{fitting[-1].split}")


def _find_at_or_above(path: str) -> list[RecordSource]:
    """Return the splits of data sets, other than folders of folders, that lie at a path or below it."""
    root = expand_home(path).resolve()
    for directory in (root, *root.parents[:_LEVELS]):
        found = [one for name, kind in SOURCES.items() if name != "folder" for one in kind.find(directory)]
        if within := [source for source in found if _place(source).resolve().is_relative_to(root)]:
            return within
    return []


def _place(source: RecordSource) -> Path:
    return Path(source.name.removesuffix(f" ({source.split})"))


def find_sources(path: str | Path, *, follow_links: bool = False) -> list[RecordSource]:
    """Return every split of whatever data sets lie at `path`, damaged or not.

    Raises:
      UserError: there is no such folder, or no data set in it.
    """
    root = expand_home(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder")
    others = [source for name, source in SOURCES.items() if name != "folder"]
    found = [one for source in others for one in source.find(root, follow_links=follow_links)]
    found = found or SOURCES["folder"].find(root, follow_links=follow_links)  # which takes any folder
    if not found:
        raise UserError(f"{path}: no data set")
    return found
