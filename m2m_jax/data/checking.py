"""A whole data set, read image by image: what is wrong with it, and a sheet of thumbnails.

summary = check_data(find_sources("DIR"), DataCheck(output=None), images_per_set=4)
print(summary.text(max_problems=100))
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Iterator, Sequence

from PIL import Image

from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import write_png
from m2m_jax.core.paths import expand_home
from m2m_jax.core.printing import say_progress
from m2m_jax.data import folder, mis, precomputed
from m2m_jax.data.inspection import SetReport, Summary, inspect_set
from m2m_jax.data.mis_source import MisRecords
from m2m_jax.data.options import DataCheck
from m2m_jax.data.pipeline import RecordSource, open_emoji
from m2m_jax.view.contact_sheet import Group, Row, contact_sheet


def check_data(sources: Sequence[RecordSource], options: DataCheck, images_per_set: int = 1) -> Summary:
    """Read every image of all sources, write the sheet, sets with problems first, and return what was found.

    Args:
      images_per_set: a set with fewer is a problem.

    Raises:
      UserError: the sheet cannot be written.
    """
    summary = Summary()
    total, sheet = sum(len(source.kinds) for source in sources), _Sheet(options.sheet_sets)
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        for source in sources:
            for report in _in_order(pool, 4 * options.threads, source, images_per_set):
                summary.add(source.name, report)
                sheet.add(summary.sets, total, report)
                say_progress(f"read {summary.sets} of {total} sets", summary.sets, total)
    if options.output:
        write_png(options.output, sheet.draw())
    return summary


def find_sources(path: str) -> list[RecordSource]:
    """Return every split of what lies at `path`. Raises UserError where that is no data set."""
    root = expand_home(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder")
    path = str(root)
    splits = sorted(file.stem.removeprefix("precomputed-") for file in root.glob("precomputed-*.json"))
    if splits:
        return [precomputed.PrecomputedRecords(path, split, None, strict=False) for split in splits]
    if mis.folder(root).is_dir():
        splits = mis.read_manifest(root).splits
        return [MisRecords(path, split, latents=None, image_size=None, strict=False) for split in splits]
    sizes = sorted(int(one.name[:-2]) for one in root.glob("emoji/*px") if one.name[:-2].isdecimal())
    if sizes:
        return [source for size in sizes for source in _emoji(path, size)]
    return [folder.load(path, None, strict=False)]


def configured_sources(config: Config) -> list[RecordSource]:
    """Return every split of the data set that a config names. Raises UserError for a bad config, too."""
    validate(config.data)
    data = config.data
    return _emoji(data.directory, data.image_size) if data.name == "emoji" else find_sources(data.path)


def _emoji(directory: str, image_size: int) -> list[RecordSource]:
    from m2m_jax.data.emoji.subjects import SPLITS

    return [open_emoji(directory, image_size, split, strict=False) for split in SPLITS]


def _in_order(pool: concurrent.futures.Executor, most: int, source: RecordSource, wanted: int) -> Iterator[SetReport]:
    """The reports of all sets, so many of them made ahead: not all thumbnails have to fit into memory."""
    ahead: collections.deque[concurrent.futures.Future] = collections.deque()
    for index in range(len(source.kinds)):
        ahead.append(pool.submit(inspect_set, source, index, wanted))
        if len(ahead) > most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


class _Sheet:
    """Choose what is shown: sets with problems, and besides some from the whole length of the data set."""

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

    def draw(self) -> Image.Image:
        shown = (self._bad + self._good)[: self._num_sets]
        rows = []
        for report in shown:
            many = f"{report.num_images} images" if report.num_images != 1 else "1 image"
            label = f"{report.set_id or '(unreadable)'}: {'; '.join(report.problems[:2]) or many}"
            rows.append(Row(label, [Group("first images", report.thumbnails)]))
        return contact_sheet(rows or [Row("nothing to show", [])])
