"""Build data sets from packages with artwork, once."""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import time

import tensorflow_datasets as tfds

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.printing import say_progress
from m2m_jax.data.set_builder import KINDS, SetBuilder
from m2m_jax.data.source import SOURCES
from m2m_jax.data.sources.emoji import PreparedSource


def prepare(
    name: str, image_size: int, directory: str, packages: str | None = None, *, verbose: bool = True
) -> SetBuilder:
    """Build a data set of installed artwork unless it is there, and return its builder, ready to be read.

    Args:
      name: as `config.data.name`: emoji, emoji_hands or cards.
      image_size: side of the images, pixels.
      directory: of prepared data sets.
      packages: folder of the packages that hold the artwork; None: the data set's own.

    Raises:
      UserError: the directory cannot be written, or there is no artwork.
    """
    source = SOURCES.choose(name)
    if not issubclass(source, PreparedSource):
        raise UserError(f"--name={name}: nothing has to be made for it")
    _make_directory(directory)
    builder = source.make_builder(image_size, directory)
    builder.packages = packages or builder.packages
    if builder.is_prepared():
        if verbose:
            print(f"{builder.data_path}: there already")
        return builder

    started = time.monotonic()
    if verbose:
        builder.report_progress = lambda done, total: say_progress(f"drawing: {done} of {total}", done, total)
    tfds.disable_progress_bar()  # its bars are one a shard; drawing is what takes the time
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloading there
            builder.download_and_prepare()
    except PermissionError as error:
        raise UserError(f"--directory={directory}: cannot be written ({error.strerror})") from error
    if verbose:
        print(f"{builder.data_path}: made in {time.monotonic() - started:.0f} s{builder.remark()}")
    return builder


def _make_directory(directory: str) -> None:
    disk.require_plain(pathlib.Path(directory), "--directory")
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--directory={directory}: cannot be made ({error.strerror})") from error


def summary(builder: SetBuilder) -> str:
    """Return sets and images of each split and kind, one line each."""
    lines = []
    for split, kinds in builder.info.metadata["kinds"].items():
        sets: collections.Counter[str] = collections.Counter(kinds)
        images: collections.Counter[str] = collections.Counter()
        for kind, num_images in zip(kinds, builder.info.metadata["num_images"][split], strict=True):
            images[kind] += num_images
        parts = [f"{sets[kind]:5d} {kind} sets ({images[kind]:6d} images)" for kind in KINDS]
        lines.append(f"  {split:16s} " + "  ".join(parts))
    return "\n".join(lines)
