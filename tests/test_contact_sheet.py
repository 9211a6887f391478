"""The contact sheet shows every image once, with context framed apart from what was generated."""

from __future__ import annotations

import numpy as np
import pytest

from m2m_jax.view.contact_sheet import (
    CONTEXT_COLOUR,
    GENERATED_COLOUR,
    Group,
    Row,
    contact_sheet,
    context,
    generated,
    nearest,
)


def plain(*colours: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> list[np.ndarray]:
    return [np.broadcast_to(np.array(colour, np.uint8), (*size, 3)) for colour in colours]


def place(sheet, colour) -> tuple[int, int, int, int]:
    """left, top, right, bottom (exclusive) of the pixels of one colour; fails where there are none."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    assert len(xs), f"{colour} is not on the sheet"
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


RED, GREEN, CYAN, PINK = (250, 1, 1), (1, 250, 1), (1, 250, 250), (250, 1, 250)


def test_context_is_framed_and_generated_images_are_not():
    sheet = contact_sheet([Row("a set", [context(plain(RED)), generated(plain(GREEN))])], title="a title")
    pixels = np.asarray(sheet)
    for colour, frame in ((RED, True), (GREEN, False)):
        left, top, right, bottom = place(sheet, colour)
        assert (right - left, bottom - top) == (96, 96)  # three screen pixels a pixel
        middle = (top + bottom) // 2
        around = [
            pixels[middle, left - 3],
            pixels[middle, right + 2],
            pixels[top - 3, left + 9],
            pixels[bottom + 2, left + 9],
        ]
        assert all((tuple(pixel) == CONTEXT_COLOUR) == frame for pixel in around)
    assert place(sheet, RED)[2] + 32 < place(sheet, GREEN)[0]
    place(sheet, GENERATED_COLOUR)


def test_groups_of_one_title_stand_in_one_column():
    rows = [
        Row("none", [context([]), generated(plain(RED))]),
        Row("one", [context(plain(PINK)), generated(plain(GREEN))]),
        Row("without context", [generated(plain(CYAN)), nearest(plain((9, 9, 9)))]),
    ]
    sheet = contact_sheet(rows)
    assert place(sheet, RED)[0] == place(sheet, GREEN)[0] == place(sheet, CYAN)[0] > place(sheet, PINK)[2]
    assert place(sheet, RED)[3] < place(sheet, GREEN)[1] < place(sheet, GREEN)[3] < place(sheet, CYAN)[1]


def test_a_long_group_continues_on_a_further_line():
    many = plain(*[(index, 200, 7) for index in range(5)])
    sheet = contact_sheet([Row("", [generated(many)])], images_per_line=3)
    boxes = [place(sheet, (index, 200, 7)) for index in range(5)]
    assert boxes[0][1] == boxes[2][1] < boxes[3][1] == boxes[4][1]
    assert boxes[0][0] == boxes[3][0]


@pytest.mark.parametrize(("size", "tile"), [(8, 96), (32, 96), (64, 128), (72, 144), (256, 256), (512, 256)])
def test_a_tile_is_a_whole_multiple_of_its_image(size, tile):
    left, top, right, bottom = place(contact_sheet([Row("", [generated(plain(RED, size=(size, size)))])]), RED)
    assert (right - left, bottom - top) == (tile, tile)


def test_pixels_stay_crisp():
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, -1)
    checks[:, :, 0] = 77
    sheet = np.asarray(contact_sheet([Row("", [generated([checks])])]))
    assert (sheet == (77, 0, 0)).all(-1).sum() == (sheet == (77, 255, 255)).all(-1).sum() == 96 * 96 // 2


def test_other_shapes_are_fitted_whole():
    sheet = contact_sheet([Row("", [Group("wide", plain(RED, size=(20, 40)))])], tile=80)
    left, top, right, bottom = place(sheet, RED)
    assert (right - left, bottom - top) == (80, 40)


def test_any_text_is_one_line_that_fits():
    long = "a caption\nof several lines " * 40
    short = contact_sheet([Row("x", [generated(plain(RED))])], title="y")
    for text in (long, "été 赤い狐 🦊", ""):
        sheet = contact_sheet([Row(text or "x", [generated(plain(RED))])], title="y")
        assert sheet.size == short.size


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="expected uint8"):
        contact_sheet([Row("", [generated([np.zeros((8, 8, 3), np.float32)])])])


def test_no_images_at_all():
    assert contact_sheet([Row("", [context([]), generated([])])]).size[0] > 0
