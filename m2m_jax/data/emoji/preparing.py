"""Build the emoji data sets from packages with artwork, once."""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

import tensorflow_datasets as tfds

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.printing import say_progress
from m2m_jax.data.emoji.builder import Emoji
from m2m_jax.data.emoji.hands import HANDS
from m2m_jax.data.emoji.hands_builder import EmojiHands
from m2m_jax.data.emoji.set_builder import KINDS, SetBuilder

T = TypeVar("T", bound=SetBuilder)


def prepare_emoji(image_size: int, directory: str, *, verbose: bool = True) -> Emoji:
    """Build the emoji data set unless it is there, and return its builder, ready to be read.

    Raises UserError if the directory cannot be written or a package with artwork is missing.
    """
    return _prepare(lambda: Emoji.at(image_size, directory), directory, verbose)


def prepare_hands(image_size: int, directory: str, packages: str, *, verbose: bool = True) -> EmojiHands:
    """Build the emoji data set of many hands unless it is there, and return its builder, ready to be read.

    Args:
      packages: folder of npm packages; families that are not in it are left out.

    Raises:
      UserError: as `prepare_emoji`.
    """

    def make() -> EmojiHands:
        builder = EmojiHands.at(image_size, directory)
        builder.packages = packages
        return builder

    builder = _prepare(make, directory, verbose)
    there = builder.info.metadata["families"]
    missing = [name for families in HANDS.values() for name in families if name not in there]
    if missing and verbose:
        print(
            f"{builder.data_path}: made without {', '.join(missing)}; to have them, run make npm-emoji, remove the "
            "data set and make it again"
        )
    return builder


def _prepare(make: Callable[[], T], directory: str, verbose: bool) -> T:
    disk.require_plain(pathlib.Path(directory), "--directory")
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--directory={directory}: cannot be made ({error.strerror})") from error
    builder = make()
    if builder.is_prepared():
        if verbose:
            print(f"{builder.data_path}: there already")
        return builder

    started = time.monotonic()
    if verbose:
        builder.report_progress = lambda done, total: say_progress(f"drawing emoji: {done} of {total}", done, total)
    tfds.disable_progress_bar()  # its bars are one a shard; drawing is what takes the time
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloading there
            builder.download_and_prepare()
    except PermissionError as error:
        raise UserError(f"--directory={directory}: cannot be written ({error.strerror})") from error
    if verbose:
        print(f"{builder.data_path}: made in {time.monotonic() - started:.0f} s")
    return builder


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
