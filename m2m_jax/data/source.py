"""Data sources: kinds of data sets, which register under the name that `config.data.name` chooses them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.data.records import ImageSetRecord


class RecordSource:
    """The records of one split, by their number. What `DataSource.open` returns; subclasses set the attributes.

    Attributes:
      name: what messages call it.
      kinds, num_images: of each record, in order; known without reading any.
      has_images: whether records hold images; else they hold latents alone.
      attributes: {name: numbers an image} that every record has; they reach batches as `attribute_NAME_bnc`.
      notes: lines for the report of `data.check` about the data set as a whole.
      fingerprint: hash of the listing of the split, by which a resumed run tells whether it is the same.
    """

    name: str
    kinds: Sequence[str]
    num_images: Sequence[int]
    has_images: bool = True
    attributes: Mapping[str, int] = {}
    notes: Sequence[str] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> ImageSetRecord:
        """Return a record. Raises BadRecord for one that is damaged; may be called from several threads."""
        raise NotImplementedError


class DataSource:
    """A kind of data set. Never instantiated: a subclass is a name for its functions.

    Example, one file (and its name in the imports of `data/sources.py`):
        @SOURCES.register("numbers")
        class Numbers(DataSource):
            @classmethod
            def open(cls, config, split):
                return NumberRecords(config.path, split)    # a RecordSource
    """

    @classmethod
    def open(cls, config: ConfigDict, split: str) -> RecordSource:
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
    def find_configured(cls, config: ConfigDict) -> list[RecordSource]:
        """Return every split of the data set that `config`, the `data` part of a configuration, names; as `find`."""
        found = cls.find(Path(config.path).expanduser(), follow_links=config.follow_links)
        if not found:
            raise UserError(f"data.path={config.path!r} holds no data set of data.name={config.name}")
        return found

    @classmethod
    def gives_latents(cls, config: ConfigDict) -> bool:
        """Return whether training reads latents that were made before, and no images."""
        return False

    @classmethod
    def autoencoder(cls, config: ConfigDict, split: str) -> dict:
        """Return what made the latents, as `precomputed.describe_autoencoder` says it. Only asked of latents."""
        return {}


SOURCES = Registry[type[DataSource]]("data source")
