"""Hypothesis strategies that damage bytes and JSON, and seeds to damage."""

import io
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

_PLACES = st.integers(0, 2**31)
_NUMBERS = st.sampled_from(
    [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1", b"\1\0"]
)
_CHANGES = st.one_of(
    st.tuples(st.just("flip"), _PLACES, st.integers(0, 7)),
    st.tuples(st.just("set"), _PLACES, st.binary(min_size=1, max_size=8) | _NUMBERS),
    st.tuples(st.just("insert"), _PLACES, st.binary(min_size=1, max_size=32) | _NUMBERS),
    st.tuples(st.just("delete"), _PLACES, st.integers(1, 64)),
    st.tuples(st.just("repeat"), _PLACES, st.integers(1, 64)),
    st.tuples(st.just("cut"), _PLACES, st.none()),
)
# Few changes get far into a reader, many are refused at once.
CHANGES = st.lists(_CHANGES, min_size=1, max_size=4)


def damaged(data: bytes, changes: list[tuple]) -> bytes:
    """`data` after all of `changes`."""
    result = bytearray(data)
    for kind, place, value in changes:
        place %= max(len(result), 1)
        if kind == "flip" and result:
            result[place] ^= 1 << value
        elif kind == "set":
            result[place : place + len(value)] = value
        elif kind == "insert":
            result[place:place] = value
        elif kind == "delete":
            del result[place : place + value]
        elif kind == "repeat":
            result[place:place] = result[place : place + value] * 3
        elif kind == "cut":
            del result[place:]
    return bytes(result)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [0, -1, 1, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf"), "", "../..", "/", "\0"]
    )
    | st.floats()
    | st.text(max_size=12),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=6,
)
# (which of the places in the tree, what to do there)
JSON_CHANGES = st.lists(
    st.tuples(
        _PLACES, st.tuples(st.just("set"), JSON_VALUES) | st.tuples(st.sampled_from(["delete", "add"]), JSON_VALUES)
    ),
    min_size=1,
    max_size=3,
)


def damaged_json(tree, changes: list[tuple]):
    """A copy of `tree`, which holds dicts, lists and leaves, after all of `changes`."""
    root = {"": _copy(tree)}
    for which, (kind, value) in changes:
        places = list(_places(root))
        parent, key = places[which % len(places)]
        if kind == "set" or parent is root:
            parent[key] = value
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}x"] = value
        else:
            parent.insert(key, value)
    return root[""]


def _copy(tree):
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def mended_png(data: bytes) -> bytes:
    """The checksum of every chunk made right: what a malicious file would have, and Pillow compares first."""
    result, place = bytearray(data), 8
    while place + 12 <= len(result):
        (length,) = struct.unpack(">I", result[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(result):
            break
        result[end : end + 4] = struct.pack(">I", zlib.crc32(result[place + 4 : end]))
        place = end + 4
    return bytes(result)


def image_seeds() -> dict[str, bytes]:
    """Small files of every format and many of their options."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    grey16 = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [
        (rgb, "PNG", {}),
        (rgba, "PNG", {"icc_profile": b"profile" * 20, "exif": exif}),
        (grey16, "PNG", {}),
        (rgb.quantize(8), "PNG", {"transparency": 3}),
        (rgb.convert("1"), "PNG", {}),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True, "icc_profile": b"profile" * 20}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb, "WEBP", {}),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb.quantize(8), "GIF", {}),
        (rgb, "BMP", {}),
        (rgb.quantize(8), "BMP", {}),
        (rgb.convert("1"), "BMP", {}),
        (rgb, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "tiff_deflate"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (grey16, "TIFF", {"compression": "packbits"}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb, "AVIF", {}),
        (rgba, "AVIF", {}),
        (rgb, "PPM", {}),
        (rgb.convert("L"), "PPM", {}),
        (rgb.convert("1"), "PPM", {}),
    ]
    seeds = {}
    for number, (image, kind, options) in enumerate(made):
        file = io.BytesIO()
        image.save(file, kind, **options)
        seeds[f"{kind} {number}"] = file.getvalue()
    seeds["PPM text"] = b"P3\n2 2\n255\n" + b"1 2 3 " * 4
    seeds["animated GIF"] = _animation(rgb, "GIF")
    seeds["animated WEBP"] = _animation(rgb, "WEBP")
    return seeds


def _animation(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, save_all=True, append_images=[image.rotate(90)])
    return file.getvalue()
