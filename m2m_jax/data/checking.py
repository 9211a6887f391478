"""A whole data set, read image by image: what is wrong with it, and a sheet of thumbnails.

Example:
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
from m2m_jax.core.images import write_png
from m2m_jax.core.printing import say_progress
from m2m_jax.data.inspection import SetReport, Summary, inspect_set
from m2m_jax.data.options import DataCheck
from m2m_jax.data.source import SOURCES, RecordSource
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
            summary.notes += source.notes
            for report in _in_order(pool, 4 * options.threads, source, images_per_set):
                summary.add(source.name, report)
                sheet.add(summary.sets, total, report)
                say_progress(f"read {summary.sets} of {total} sets", summary.sets, total)
    if options.output:
        write_png(options.output, sheet.draw())
    return summary


def configured_sources(config: Config) -> list[RecordSource]:
    """Return every split of the data set that a config names. Raises UserError for a bad config, too."""
    validate(config.data)
    return SOURCES.choose(config.data.name).find_configured(config.data)


def _in_order(pool: concurrent.futures.Executor, most: int, source: RecordSource, wanted: int) -> Iterator[SetReport]:
    """Yield the reports of all sets, so many of them made ahead: not all thumbnails have to fit into memory."""
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
        """Add a report. number: of it, from 1, of `total`."""
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
