"""All data sources that come with this package: importing this module registers them."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from m2m_jax.core.errors import UserError

# Each registers itself; `folder`, last, takes any folder.
from m2m_jax.data import emoji_source, folder, mis_source, precomputed  # noqa: F401
from m2m_jax.data.source import SOURCES, DataSource, RecordSource

__all__ = ["SOURCES", "DataSource", "RecordSource", "find_sources", "open_source", "reads_latents"]


def open_source(config: ConfigDict, split: str) -> RecordSource:
    """Open a split of the data set that `config`, the `data` part of a configuration, names.

    Raises:
      UserError: there is no such source, or it cannot be used as the configuration asks.
    """
    return SOURCES.choose(config.name).open(config, split)


def reads_latents(config: ConfigDict) -> bool:
    """Return whether batches hold latents, for which no step runs the autoencoder."""
    return SOURCES.choose(config.name).gives_latents(config)


def find_sources(path: str, *, follow_links: bool = False) -> list[RecordSource]:
    """Return every split of whatever data set lies at `path`, damaged or not.

    Raises:
      UserError: there is no such folder, or no data set in it.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{path}: no such folder")
    others = [source for name, source in SOURCES.items() if name != "folder"]
    for source in (*others, SOURCES["folder"]):
        if found := source.find(root, follow_links=follow_links):
            return found
    raise UserError(f"{path}: no data set")
