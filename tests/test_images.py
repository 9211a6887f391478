"""Image files of every kind in, PNG out; and each kind of bad file refused in one line that names it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from m2m_jax.core import images
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import check_header, decode_image, read_image, write_png

RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes, size: int = 8) -> np.ndarray:
    result = read_image(decode_image(data, "test image"), size)
    assert result.shape == (size, size, 3)
    assert result.dtype == np.uint8
    return result


@pytest.mark.parametrize(
    ("mode", "kind", "colour", "expected"),
    [
        ("RGB", "PNG", RED, RED),
        ("RGB", "BMP", RED, RED),
        ("RGB", "TIFF", RED, RED),
        ("RGB", "PPM", RED, RED),
        ("RGBA", "WEBP", (255, 0, 0, 255), RED),
        ("RGBA", "PNG", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", "PNG", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", "PNG", (0, 0), (255, 255, 255)),
        ("L", "PNG", 100, (100, 100, 100)),
        ("1", "PNG", 0, (0, 0, 0)),
        ("I;16", "PNG", 100 * 257, (100, 100, 100)),
        ("I;16", "TIFF", 65535, (255, 255, 255)),
        ("I", "TIFF", 100 * 257, (100, 100, 100)),
        ("CMYK", "TIFF", (0, 255, 255, 0), RED),
        ("CMYK", "JPEG", (0, 255, 255, 0), RED),
        ("YCbCr", "JPEG", (76, 85, 255), RED),
        ("P", "GIF", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(mode, kind, colour, expected):
    got = pixels(encoded(Image.new(mode, (8, 8), colour), kind))
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=2)


def test_palette_with_transparency_is_put_on_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste(RED, (0, 0, 4, 8))
    got = pixels(encoded(image.quantize(4)))
    np.testing.assert_array_equal(got[:, :4], np.broadcast_to(RED, (8, 4, 3)))
    np.testing.assert_array_equal(got[:, 4:], np.full((8, 4, 3), 255))


def test_a_colour_that_stands_for_transparency_is_put_on_white():
    assert pixels(encoded(Image.new("RGB", (8, 8), RED), transparency=RED)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    # The red corner, after the rotation or reflection that the tag asks for (EXIF 2.3, tag 0x0112).
    corner = {
        1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0),
        5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0),
    }[orientation]  # fmt: skip
    image = Image.new("RGB", (16, 16), "white")
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    got = pixels(data, 2)
    np.testing.assert_array_equal(read_image(Image.open(io.BytesIO(data)), 2), got)
    red = np.argwhere(got[:, :, 1] < 100)
    assert [tuple(place) for place in red] == [corner]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image():
    data = encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert pixels(data)[:, :, 0].min() > 250


def test_the_first_picture_of_a_photograph_with_previews():
    data = encoded(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data)[:, :, 0].min() > 250


@pytest.mark.parametrize("side", [8, 17, 32])
def test_an_image_of_the_right_size_keeps_its_pixels(side):
    expected = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(expected)), side), expected)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (4, 2), (6, 3), (2000, 1000)])
def test_other_aspect_ratios_stand_whole_on_white(width, height):
    image = Image.new("RGB", (width, height), RED)
    for turned in (False, True):
        got = pixels(encoded(image.transpose(Image.Transpose.ROTATE_90) if turned else image), 16)
        got = got.swapaxes(0, 1) if turned else got
        np.testing.assert_array_equal(got[4:12], np.broadcast_to(RED, (8, 16, 3)))
        assert got[:4].min() == got[12:].min() == 255


def test_a_hairline_stays_visible_and_does_not_vanish():
    assert pixels(encoded(Image.new("RGB", (3000, 1), RED)), 16)[:, :, 1].min() == 0


def test_shrinking_averages():
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    got = pixels(encoded(Image.fromarray(checks.astype(np.uint8))), 8)
    np.testing.assert_allclose(got, 127.5, atol=3)


# The samples of a pixel of each PNG colour type: (name, channels, bit depths).
PNG_TYPES = {0: ("grey", 1, (1, 2, 4, 8, 16)), 2: ("RGB", 3, (8, 16)), 3: ("palette", 1, (1, 2, 4, 8)),
             4: ("grey and alpha", 2, (8, 16)), 6: ("RGBA", 4, (8, 16))}  # fmt: skip
PNG_CASES = [
    pytest.param(colour_type, depth, transparent, id=f"{name} {depth}{' tRNS' if transparent else ''}")
    for colour_type, (name, _, depths) in PNG_TYPES.items()
    for depth in depths
    for transparent in ((False, True) if colour_type in (0, 2, 3) else (False,))
]


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_and_its_pixels(colour_type: int, depth: int, transparent: bool) -> tuple[bytes, np.ndarray]:
    """A PNG of 8 x 8 random pixels, written by hand, and what it shows: float RGBA [8, 8, 4] of 0 to 255."""
    rng, channels, most = np.random.default_rng(depth), PNG_TYPES[colour_type][1], 2**depth - 1
    samples = rng.integers(0, most + 1, (8, 8, channels))
    samples[2:4] = samples[0, 0]  # the colour of tRNS, and one that is near to it
    if colour_type != 3:
        samples[4] = samples[0, 0] ^ (1 if depth < 16 else 2**8)
    if depth == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in samples]
    else:
        bits = ((samples[..., None] >> np.arange(depth)[::-1]) & 1).reshape(8, -1)
        rows = [b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in bits]
    chunks, shown = [], samples * 255 / most
    alpha = shown[..., -1:] if colour_type in (4, 6) else np.full((8, 8, 1), 255.0)
    colours = np.repeat(shown[..., :1], 3, -1) if colour_type in (0, 4) else shown[..., :3]
    if colour_type == 3:
        palette = rng.integers(0, 256, (most + 1, 3), np.uint8)
        chunks.append(png_chunk(b"PLTE", palette.tobytes()))
        colours = palette[samples[..., 0]].astype(float)
        if transparent:
            alphas = rng.integers(0, 256, most + 1, np.uint8)
            chunks.append(png_chunk(b"tRNS", alphas.tobytes()))
            alpha = alphas[samples].astype(float)
    elif transparent:
        chunks.append(png_chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes()))
        alpha = 255.0 * (samples != samples[0, 0]).any(-1, keepdims=True)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour_type, 0, 0, 0))
    end = png_chunk(b"IDAT", zlib.compress(b"".join(rows))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end, np.concatenate([colours, alpha], -1)


@pytest.mark.parametrize(("colour_type", "depth", "transparent"), PNG_CASES)
def test_every_colour_type_depth_and_transparency_of_png(colour_type, depth, transparent):
    data, expected = png_and_its_pixels(colour_type, depth, transparent)
    got = np.asarray(decode_image(data, "test")).astype(float)
    np.testing.assert_array_equal(got[..., 3] == 0, expected[..., 3] == 0)
    np.testing.assert_allclose(got, expected, atol=1)
    opened = read_image(Image.open(io.BytesIO(data)), 8)  # as people's own code opens it
    np.testing.assert_array_equal(opened, read_image(decode_image(data, "test"), 8))


# ---- bad input


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and has none."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animations_are_told_by_their_header(kind, tmp_path):
    (tmp_path / "a").write_bytes(animation(kind))
    with pytest.raises(UserError, match=r"a: is (an animation|a document) of 3"):
        check_header(tmp_path / "a")
    (tmp_path / "b").write_bytes(encoded(Image.new("RGB", (8, 8)), kind))
    check_header(tmp_path / "b")


def animation(kind: str, frames: int = 3) -> bytes:
    pictures = [Image.new("RGB", (8, 8), (index * 80, 0, 0)) for index in range(frames)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])


GOOD_PNG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
GOOD_JPEG = encoded(Image.open(io.BytesIO(GOOD_PNG)), "JPEG")

BAD = {
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),
    "truncated png": (GOOD_PNG[: len(GOOD_PNG) // 2], "damaged"),
    "truncated jpeg": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "damaged"),
    "broken png": (GOOD_PNG[:60] + b"\x00" * 40 + GOOD_PNG[100:], "damaged"),
    "png without pixels": (png_header(8, 8), "damaged"),
    "bomb": (png_header(30_000, 30_000), "too large"),
    "large": (png_header(9_000, 9_000), "too large (9000 x 9000)"),
    "gif animation": (animation("GIF"), "animation of 3 frames"),
    "png animation": (animation("PNG"), "animation of 3 frames"),
    "webp animation": (animation("WEBP"), "animation of 3 frames"),
    "tiff of pages": (animation("TIFF"), "document of 3 pages"),
    "float": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "float pixels"),
    "32 bit": (encoded(Image.new("I", (8, 8), 70_000), "TIFF"), "32-bit pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line_with_its_name(case, tmp_path):
    data, expected = BAD[case]
    path = tmp_path / "some picture.png"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_image(path, 32)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert expected in line
    assert "\n" not in line


def test_every_cut_of_a_file_is_a_user_error_or_an_image():
    for data in (GOOD_PNG, GOOD_JPEG, encoded(Image.open(io.BytesIO(GOOD_PNG)), "WEBP"), animation("GIF", 1)):
        for length in range(0, len(data), max(1, len(data) // 40)):
            try:
                pixels(data[:length])
            except UserError as error:
                assert str(error).startswith("test image: ")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        read_image(tmp_path / "absent.png", 32)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path, 32)


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        read_image(tmp_path / "file" / "a.png", 32)


def test_a_path_that_no_system_takes():
    with pytest.raises(UserError, match="cannot be read"):
        read_image("a\0b.png", 32)


# ---- writing


def test_write_png_keeps_the_pixels(tmp_path):
    expected = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", expected)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)
    write_png(tmp_path / "a.png", Image.fromarray(expected[::-1]))  # over an older one
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_interrupted_write_leaves_the_older_file(tmp_path, monkeypatch):
    old, new = (np.full((4, 4, 3), value, np.uint8) for value in (10, 20))
    write_png(tmp_path / "a.png", old)

    def disk_full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.Image.Image, "save", disk_full)
    with pytest.raises(UserError, match=r"a\.png cannot be written: No space left"):
        write_png(tmp_path / "a.png", new)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 4), old)


def test_writing_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_png(tmp_path / "absent" / "a.png", np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_writing_anything_but_bytes_is_a_programming_error(tmp_path, image):
    with pytest.raises(ValueError, match="expected uint8") as caught:
        write_png(tmp_path / "a.png", image)
    assert not isinstance(caught.value, UserError)
    assert not list(tmp_path.iterdir())
