"""What `m2m_jax.data.check` finds out of one image set, and how it adds up."""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square, on_white
from m2m_jax.data.records import BadRecord

THUMBNAIL = 48  # pixels a side
THUMBNAILS = 12  # of a set
_MISSING = np.full((THUMBNAIL, THUMBNAIL, 3), (200, 30, 30), np.uint8)  # in the place of a damaged image


@dataclasses.dataclass(frozen=True)
class SetReport:
    """One set: what it is, what is wrong with it, and its first images as uint8 [THUMBNAIL, THUMBNAIL, 3].

    sizes: (width, height) of each image that could be decoded, pixels. moments: (count, sum, sum of squares) of its
    latents. latent_shape: [h, w, c].
    """

    set_id: str
    kind: str
    num_images: int
    num_bytes: int
    problems: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    thumbnails: tuple[np.ndarray, ...] = ()
    latent_shape: tuple[int, ...] = ()
    moments: tuple[float, float, float] = (0.0, 0.0, 0.0)


def inspect_set(source, index: int, wanted: int) -> SetReport:
    """Read record `index` of a `pipeline.RecordSource` and decode every image of it. wanted: images, at least."""
    try:
        record = source[index]
    except BadRecord as error:
        return SetReport("", source.kinds[index], 0, 0, (str(error),), thumbnails=(_MISSING,))
    problems, sizes, thumbnails, num_bytes = [], [], [], 0
    seen: dict[bytes, str] = {}  # digest of the pixels, and the first image that has them
    if record.num_images < wanted:
        where = f"{record.origin}, set {record.set_id!r}"
        problems.append(f"{where}: {record.num_images} images, fewer than data.images_per_set={wanted}")
    for number in range(len(record.images)):
        name = record.image_name(number)
        try:
            data = record.images[number]
            num_bytes += len(data)
            image = decode_image(data, name)
        except UserError as error:
            problems.append(str(error))
            thumbnails.append(_MISSING)
            continue
        sizes.append(image.size)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if digest in seen:
            problems.append(f"{name}: has the pixels of {seen[digest]}")
        seen.setdefault(digest, name)
        if len(thumbnails) < THUMBNAILS:
            thumbnails.append(on_white(fit_square(image, THUMBNAIL)))
    report = SetReport(
        record.set_id, record.kind, record.num_images, num_bytes, tuple(problems), tuple(sizes),
        tuple(thumbnails[:THUMBNAILS]),
    )  # fmt: skip
    return report if record.latents is None else _with_latents(report, record.latents)


def _with_latents(report: SetReport, latents_nhwc: np.ndarray) -> SetReport:
    values = latents_nhwc.astype(np.float64)
    shown = report.thumbnails or tuple(_as_colours(latents_hwc) for latents_hwc in values[:THUMBNAILS])
    return dataclasses.replace(
        report,
        num_bytes=report.num_bytes + latents_nhwc.nbytes,
        thumbnails=shown,
        latent_shape=values.shape[1:],
        moments=(float(values.size), float(values.sum()), float((values**2).sum())),
    )


def _as_colours(latents_hwc: np.ndarray) -> np.ndarray:
    """Return the first three channels, two standard deviations either way, as uint8 [h, w, 3]."""
    channels = np.resize(np.moveaxis(latents_hwc, -1, 0), (3, *latents_hwc.shape[:2]))
    return np.clip(127.5 + 63.75 * np.moveaxis(channels, 0, -1), 0, 255).astype(np.uint8)


class Summary:
    """What a whole data set holds. notes: lines about all of it, for the report."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.sets = self.images = self.num_bytes = 0
        self.problems: dict[str, int] = {}  # what, and how often
        self._kinds: dict[tuple[str, str], list[int]] = {}
        self._sizes: collections.Counter[tuple[int, int]] = collections.Counter()
        self._per_set: collections.Counter[int] = collections.Counter()
        self._latents: collections.Counter[tuple[int, ...]] = collections.Counter()
        self._moments = np.zeros(3)
        self._ids: dict[str, str] = {}

    def add(self, source: str, report: SetReport) -> None:
        """Add a report. source: the split, for messages."""
        self.sets += 1
        self.images += report.num_images
        self.num_bytes += report.num_bytes
        counts = self._kinds.setdefault((source, report.kind), [0, 0])
        counts[0] += 1
        counts[1] += report.num_images
        self._sizes.update(report.sizes)
        self._per_set[report.num_images] += 1
        self._moments += report.moments
        if report.latent_shape:
            self._latents[report.latent_shape] += report.num_images
        problems = list(report.problems)
        if report.set_id in self._ids and report.set_id:
            problems.append(f"{source}: the id {report.set_id!r} is that of another set in {self._ids[report.set_id]}")
        self._ids[report.set_id] = source
        for problem in problems:
            self.problems[problem] = self.problems.get(problem, 0) + 1

    def text(self, max_problems: int) -> str:
        """Return the report, problems last."""
        lines = [f"{self.sets} sets, {self.images} images, {self.num_bytes / 1e6:.1f} MB"]
        width = max([len(source) for source, _ in self._kinds], default=0)
        for (source, kind), (sets, images) in self._kinds.items():
            lines.append(f"  {source:{width}}  {kind:8s} {sets:7d} sets {images:8d} images")
        used = [count for count in self._per_set if count]
        if used:
            mean = self.images / sum(self._per_set[count] for count in used)
            lines.append(f"images a set: {min(used)} to {max(used)}, {mean:.1f} on average")
        if self._sizes:
            sides = [max(size) for size in self._sizes]
            common = ", ".join(f"{w} x {h} ({count})" for (w, h), count in self._sizes.most_common(5))
            lines.append(f"pixels, longer side: {min(sides)} to {max(sides)}; {len(self._sizes)} sizes: {common}")
        for shape, count in self._latents.items():
            lines.append(f"latents {list(shape)}: {count}")
        if self._moments[0]:
            mean, square = self._moments[1:] / self._moments[0]
            deviation = max(square - mean**2, 0.0) ** 0.5
            lines.append(f"latents: mean {mean:.3f}, standard deviation {deviation:.3f}")
        lines += self.notes
        total = sum(self.problems.values())
        lines.append(f"{total} problems" if total != 1 else "1 problem")
        for problem, count in list(self.problems.items())[:max_problems]:
            lines.append(f"  {problem}" + (f" ({count} records)" if count > 1 else ""))
        if len(self.problems) > max_problems:
            lines.append(f"  and {len(self.problems) - max_problems} more; --max_problems shows them")
        return "\n".join(lines)
