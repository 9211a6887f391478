"""Options of the programs that look at data sets."""

import dataclasses
import os
from pathlib import Path

from m2m_jax.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCheck(Options):
    """How a data set is read and reported."""

    output: Path | None = option("The sheet of thumbnails; empty: none.", Path("data_check.png"))
    sheet_sets: int = option("Sets on the sheet.", 24, low=1)
    threads: int = option("That read and decode.", os.cpu_count() or 1, low=1)
    max_problems: int = option("Problems to print; all are counted.", 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSheet(Options):
    """Which sets a picture shows."""

    split: str = option("Which split of the data set.", "train")
    num_sets: int = option("How many sets.", 16, low=1)
    output: Path = option("PNG to write.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetExport(Options):
    """Which sets become folders."""

    split: str = option("Which split of the data set.", "test")
    num_sets: int = option("How many sets.", 12, low=1)
    output: Path = option("Folder to write; must not exist.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing(Options):
    """Which data set of installed artwork is made, and where."""

    name: str = option("Which: data.name.", "emoji", choices=("emoji", "emoji_hands", "cards"))
    size: int = option("Side of the images, pixels.", 32)
    directory: Path = option("Where prepared data sets live: data.directory.", Path("data"))
    packages: Path | None = option(
        "Folder of the packages that hold the artwork: data/npm for emoji_hands, data/debian for cards if not given.",
        None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiSplits(Options):
    """What the emoji splits are made of."""

    packages: Path = option("Folder of npm packages, as make npm-emoji fills it.", Path("data/npm"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiCaptions(Options):
    """How many captions are written, and where."""

    output: Path = option("The file to write, .txt, one caption a line.")
    num_captions: int = option("How many.", 2400)
    seed: int = option("Of what is drawn.", 0)
