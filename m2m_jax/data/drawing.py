"""Turn SVG into pixels, and draw many pictures at once: what all families of emoji share."""

import concurrent.futures
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from m2m_jax.core.errors import UserError

Job = TypeVar("Job")
Kept = TypeVar("Kept")


def render(svg: str, width: int, height: int, **options) -> np.ndarray:
    """Draw SVG text: uint8 RGBA [height, width, 4]. Raises UserError where resvg is missing or cannot read it."""
    return _render(f"an SVG of {len(svg)} characters", svg_string=svg, width=width, height=height, **options)


def render_file(file: Path, height: int) -> np.ndarray:
    """Draw an SVG or SVGZ file: uint8 RGBA [height, as wide as it is, 4]. Raises UserError as `render`."""
    return _render(str(file), svg_path=str(file), height=height)


def _render(name: str, **options) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("the SVG renderer is not installed: pip install resvg-py") from error
    try:
        png = resvg_py.svg_to_bytes(skip_system_fonts=True, **options)
    except ValueError as error:
        raise UserError(f"{name} can't be drawn ({error})") from error
    return np.array(Image.open(io.BytesIO(png)).convert("RGBA"))


def view_box(left: float, top: float, width: float, height: float, view: float) -> str:
    """Return the attribute for the square about a canvas's centre; its side is `view` canvases (the longer side)."""
    side = view * max(width, height)
    return f'viewBox="{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}"'


def draw_all(
    jobs: Sequence[Job],
    draw: Callable[[Job], np.ndarray | None],
    keep: Callable[[np.ndarray], Kept],
    report: Callable[[int, int], None] | None = None,
) -> dict[Job, Kept]:
    """Draw pictures in threads, and return {job: picture}, without those of which there is nothing to see.

    Args:
      draw: job -> uint8 RGBA [h, w, 4], or None where there is no such picture.
      keep: returns what to keep of one.
      report: called now and then with how many are done and how many there are to do.
    """

    def draw_one(job: Job) -> Kept | None:
        pixels = draw(job)
        return None if pixels is None or not pixels[..., 3].any() else keep(pixels)

    drawn = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (job, kept) in enumerate(zip(jobs, pool.map(draw_one, jobs), strict=True), start=1):
            if kept is not None:
                drawn[job] = kept
            if report is not None and (done % 500 == 0 or done == len(jobs)):
                report(done, len(jobs))
    return drawn
