"""Contact sheets: rows of sets, the context framed apart from what was generated from it.

    sheet = contact_sheet([
        Row("a red fox, a red cat", [context(images[:3]), generated(samples), nearest(neighbours)]),
    ], title="emoji, step 400")
    write_png("contact_sheet.png", sheet)

Groups of one title stand under one another, with the title and its colour at the top. Needs numpy and
Pillow alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2m_jax.core.images import as_pillow

Colour = tuple[int, int, int]
Images = Sequence[np.ndarray] | np.ndarray

CONTEXT_COLOUR: Colour = (29, 62, 138)
GENERATED_COLOUR: Colour = (214, 106, 32)
OTHER_COLOUR: Colour = (122, 128, 140)

_PAPER: Colour = (248, 248, 246)
_INK: Colour = (38, 42, 50)
_FAINT: Colour = (108, 113, 123)
_HAIRLINE: Colour = (212, 214, 218)

_MARGIN = 24  # around the sheet
_GAP = 8  # between tiles
_GROUP_GAP = 32  # between groups
_ROW_GAP = 16
_FRAME = 4  # a frame's width; the tile inside keeps all its pixels
_MAX_TILE = 256


@dataclasses.dataclass(frozen=True)
class Group:
    """Images that belong together: uint8 [H, W, 3] each, of any size; may be empty.

    With `framed`, every tile gets a solid frame in the group's colour; without, a hairline.
    """

    title: str
    images: Images
    colour: Colour = OTHER_COLOUR
    framed: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One set: what it is (one line above the tiles, may be empty) and its groups, left to right."""

    label: str
    groups: Sequence[Group]


def context(images: Images) -> Group:
    return Group("context", images, CONTEXT_COLOUR, framed=True)


def generated(images: Images) -> Group:
    return Group("generated", images, GENERATED_COLOUR)


def nearest(images: Images) -> Group:
    return Group("nearest in training", images, OTHER_COLOUR)


def contact_sheet(
    rows: Sequence[Row], *, title: str = "", tile: int | None = None, images_per_line: int = 12
) -> Image.Image:
    """Draw the rows as one RGB picture.

    Args:
      rows: at least one. A row without a group that other rows have leaves its place empty.
      title: a headline; may be empty.
      tile: the side of a tile in pixels. None: the smallest whole multiple of the images' longest side that
        is 96 or more, but 256 at the most. Images of any other size are scaled to fit.
      images_per_line: a group with more images continues on a further line.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    tile = tile or _default_tile(rows)
    cell = tile + 2 * _FRAME
    fonts = {size: ImageFont.load_default(size=size) for size in (12, 14, 18)}

    # One column for each title, in the order of first appearance, as wide as its fullest group or the title.
    columns: dict[str, Group] = {}
    widths: dict[str, int] = {}
    for row in rows:
        for group in row.groups:
            columns.setdefault(group.title, group)
            across = min(max(len(group.images), 1), images_per_line)
            needed = max(across * (cell + _GAP) - _GAP, math.ceil(fonts[14].getlength(group.title)))
            widths[group.title] = max(widths.get(group.title, 0), needed)
    lefts, right = {}, _MARGIN
    for name in columns:
        lefts[name], right = right, right + widths[name] + _GROUP_GAP
    inner_width = max(right - _GROUP_GAP - _MARGIN, math.ceil(fonts[18].getlength(title)))

    def lines(row: Row) -> int:
        return max([1, *(math.ceil(len(group.images) / images_per_line) for group in row.groups)])

    def row_height(row: Row) -> int:
        return (20 if row.label else 0) + lines(row) * (cell + _GAP) - _GAP

    title_height = 34 if title else 0
    header_height = 34
    rows_height = sum(row_height(row) + _ROW_GAP for row in rows) - _ROW_GAP
    size = (inner_width + 2 * _MARGIN, title_height + header_height + rows_height + 2 * _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)

    top = _MARGIN
    if title:
        draw.text((_MARGIN, top), _fitted(title, fonts[18], inner_width), _INK, fonts[18])
        top += title_height
    for name, group in columns.items():
        draw.text((lefts[name], top), name, group.colour, fonts[14])
        draw.rectangle((lefts[name], top + 20, lefts[name] + widths[name] - 1, top + 22), group.colour)
    top += header_height

    for row in rows:
        if row.label:
            draw.text((_MARGIN, top), _fitted(row.label, fonts[12], inner_width), _FAINT, fonts[12])
        first = top + (20 if row.label else 0)
        for group in row.groups:
            if not len(group.images):
                draw.text((lefts[group.title], first + cell // 2 - 8), "none", _FAINT, fonts[12])
            for index, image in enumerate(group.images):
                line, place = divmod(index, images_per_line)
                corner = (lefts[group.title] + place * (cell + _GAP), first + line * (cell + _GAP))
                _draw_tile(sheet, draw, corner, tile, image, group)
        top += row_height(row) + _ROW_GAP
    return sheet


def _default_tile(rows: Sequence[Row]) -> int:
    sides = [max(np.shape(image)[:2]) for row in rows for group in row.groups for image in group.images]
    side = max(sides, default=96)
    return min(math.ceil(96 / side) * side, _MAX_TILE)


def _draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    tile: int,
    image: np.ndarray,
    group: Group,
) -> None:
    left, top = corner
    side = tile + 2 * _FRAME
    width = _FRAME if group.framed else 1
    outer, inner = _FRAME - width, _FRAME + tile - 1 + width
    draw.rounded_rectangle(
        (left + outer, top + outer, left + inner, top + inner),
        radius=width,
        fill="white",
        outline=group.colour if group.framed else _HAIRLINE,
        width=width,
    )
    picture = _scaled(as_pillow(image), tile)
    sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))


def _scaled(image: Image.Image, tile: int) -> Image.Image:
    """Return the image to fit a tile: crisp pixels at a whole factor, else smooth."""
    longest = max(image.size)
    if tile % longest == 0:
        factor = tile // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * tile / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text on one line, with its end left off where it is wider than `width`."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
