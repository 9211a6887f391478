"""Reads a whole data set, every image of it, and says what is wrong with it.

    python -m m2m_jax.data.check DIR
    python -m m2m_jax.data.check --config configs/emoji.py --config.data.name=folder --config.data.path=DIR

DIR is a folder of folders of images, the output of `m2m_jax.data.precompute` or of `m2m_jax.data.build_mis`, or the
directory of prepared data sets.
A config names the data set as for training, and its data.images_per_set is asked of every set. All splits are read.
Prints a report and writes a sheet of thumbnails, sets with problems first. Exit code 0: clean, 1: problems, 2: DIR
can't be checked.
"""

import collections
import concurrent.futures
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from m2m_jax.config_flag import check_arguments, define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.data import folder, mis, precomputed
from m2m_jax.data.inspection import SetReport, Summary, inspect_set
from m2m_jax.data.mis_source import MisRecords
from m2m_jax.data.pipeline import RecordSource, open_emoji, open_emoji_hands
from m2m_jax.errors import UserError
from m2m_jax.images import write_png
from m2m_jax.program import run_program
from m2m_jax.sampling.contact_sheet import Group, Row, contact_sheet

_EMOJI = ("emoji", "emoji_hands")  # data sets that TFDS prepares

CONFIG = define_config_flag()
OUTPUT = flags.DEFINE_string("output", "data_check.png", "The sheet of thumbnails; empty: none.")
SHEET_SETS = flags.DEFINE_integer("sheet_sets", 24, "Sets on the sheet.")
THREADS = flags.DEFINE_integer("threads", os.cpu_count(), "That read and decode.")
MAX_PROBLEMS = flags.DEFINE_integer("max_problems", 100, "Problems to print; all are counted.")


def main(argv: Sequence[str]) -> int:
    if SHEET_SETS.value < 1 or THREADS.value < 1:
        raise UserError(f"--sheet_sets={SHEET_SETS.value} --threads={THREADS.value}: both must be at least 1")
    config = CONFIG.value
    if (config is None) == (len(argv) < 2):
        raise UserError("name the data set once: python -m m2m_jax.data.check DIR, or --config")
    if config is None:
        wanted, sources = 1, find_sources(argv[1])
    else:
        validate(config)
        wanted, sources = config.data.images_per_set, configured_sources(config.data)

    summary = Summary()
    total, sheet = sum(len(source.kinds) for source in sources), Sheet(SHEET_SETS.value)
    with concurrent.futures.ThreadPoolExecutor(THREADS.value) as pool:
        for source in sources:
            for report in _in_order(pool, source, wanted):
                summary.add(source.name, report)
                sheet.add(summary.sets, total, report)
                _print_progress(summary.sets, total)
    print(summary.text(MAX_PROBLEMS.value))
    if OUTPUT.value:
        write_png(OUTPUT.value, sheet.draw())
        print(OUTPUT.value)
    return 1 if summary.problems else 0


def find_sources(path: str) -> list[RecordSource]:
    """Every split of what lies at `path`. Raises UserError where that is no data set."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder")
    splits = sorted(file.stem.removeprefix("precomputed-") for file in root.glob("precomputed-*.json"))
    if splits:
        return [precomputed.PrecomputedRecords(path, split, None, strict=False) for split in splits]
    if mis.folder(root).is_dir():
        splits = mis.read_manifest(root).splits
        return [MisRecords(path, split, latents=None, image_size=None, strict=False) for split in splits]
    prepared = [
        (name, int(one.name[:-2])) for name in _EMOJI for one in root.glob(f"{name}/*px") if one.name[:-2].isdecimal()
    ]
    if prepared:
        return [source for name, size in sorted(prepared) for source in _prepared(name, path, size)]
    return [folder.load(path, None, strict=False)]


def configured_sources(data: ConfigDict) -> list[RecordSource]:
    """Every split of the data set that a config names."""
    if data.name in _EMOJI:
        return _prepared(data.name, data.directory, data.image_size)
    return find_sources(data.path)


def _prepared(name: str, directory: str, image_size: int) -> list[RecordSource]:
    """Every split of one of the emoji data sets; that of many hands has those that its families fill."""
    if name == "emoji":
        from m2m_jax.data.emoji.subjects import SPLITS

        return [open_emoji(directory, image_size, split, strict=False) for split in SPLITS]
    from m2m_jax.data.emoji.hands_builder import SPLITS, make_hands_builder

    there = make_hands_builder(image_size, directory).info.splits or SPLITS
    return [open_emoji_hands(directory, image_size, split, strict=False) for split in SPLITS if split in there]


def _in_order(pool: concurrent.futures.Executor, source: RecordSource, wanted: int):
    """The reports of all sets, a few of them made ahead: not all thumbnails have to fit into memory."""
    ahead: collections.deque[concurrent.futures.Future] = collections.deque()
    for index in range(len(source.kinds)):
        ahead.append(pool.submit(inspect_set, source, index, wanted))
        if len(ahead) > 4 * THREADS.value:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


class Sheet:
    """Chooses what is shown: sets with problems, and besides some from the whole length of the data set."""

    def __init__(self, num_sets: int):
        self._num_sets = num_sets
        self._bad: list[SetReport] = []
        self._good: list[SetReport] = []

    def add(self, number: int, total: int, report: SetReport) -> None:
        """number: of this report, from 1, of `total`."""
        if report.problems and len(self._bad) < self._num_sets:
            self._bad.append(report)
        elif not report.problems and number * self._num_sets // total > (number - 1) * self._num_sets // total:
            self._good.append(report)

    def draw(self):
        shown = (self._bad + self._good)[: self._num_sets]
        rows = []
        for report in shown:
            many = f"{report.num_images} images" if report.num_images != 1 else "1 image"
            label = f"{report.set_id or '(unreadable)'}: {'; '.join(report.problems[:2]) or many}"
            rows.append(Row(label, [Group("first images", report.thumbnails)]))
        return contact_sheet(rows or [Row("nothing to show", [])])


def _print_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rread {done} of {total} sets", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 5000 == 0 or done == total:
        print(f"read {done} of {total} sets", file=sys.stderr, flush=True)


def _check_arguments(argv: Sequence[str]) -> None:
    if any(argument.lstrip("-").split("=")[0].startswith("config") for argument in argv[1:] if argument[:1] == "-"):
        check_arguments(argv)


if __name__ == "__main__":
    run_program(main, _check_arguments, arguments=1)
