"""Image files in and out: a file on disk becomes uint8 [size, size, 3], or one clear line says why not.

`decode_image` and `fit_square` are the two steps of `read_image`. Everything that takes people's image files
(context images of the sampler, folders as data sets) goes through them, so that the same file means the
same pixels everywhere. Needs numpy and Pillow alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError, one_line

# What is read. Pillow knows more formats, but some of those start other programs (EPS) or are no pictures.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

# File names that are taken for images where a folder is read: those of FORMATS.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

# Larger ones are refused before they are decoded (a photograph has 10 to 50 million pixels).
MAX_PIXELS = 80_000_000
MAX_BYTES = 2**30  # of a file: more than that many pixels take uncompressed
_CHUNK = 2**20  # bytes read at once
# A progressive JPEG has some ten scans. Each goes over all pixels, however few its bytes: thousands take hours.
MAX_SCANS = 100

# Grey PNGs by what Pillow calls their samples: bits of a sample, and what a sample is multiplied by to fill 8 bits.
_STRETCHED = {"1": (1, 255), "L;2": (2, 85), "L;4": (4, 17), "L": (8, 1)}

# What Pillow warns of is either refused below or harmless, and a warning would be a second line beside the error.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(source: str | os.PathLike[str] | Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Return a file, a Pillow image or uint8 [h, w, 3] as uint8 [size, size, 3], on white. Raises UserError."""
    if isinstance(source, np.ndarray):
        image = as_pillow(source)
    elif isinstance(source, Image.Image):
        _scale_transparent_colour(source)
        image = _upright_rgba(source, "the image")
    else:
        image = decode_image(read_bytes(source), str(source))
    return on_white(fit_square(image, size))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Return uint8 RGBA [..., 4] with straight alpha as uint8 RGB [..., 3] on a white ground."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgb)
    alpha = alpha.astype(np.uint16)
    # Rounded to the nearest, in integers: x + 128 stays below 2**16.
    x = rgb * alpha + np.uint16(255) * (np.uint16(255) - alpha) + np.uint16(128)
    return ((x + (x >> 8)) >> 8).astype(np.uint8)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the content of the file at `path`; a missing or unreadable one is a UserError."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, and one image file is needed")
    try:
        with open(path, "rb") as file:
            size, chunks = 0, []
            while size <= MAX_BYTES and (chunk := file.read(_CHUNK)):  # /dev/zero has no size, and no end
                chunks.append(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from error
    if size > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES // 2**20} MiB, too large for an image file; scale it down")
    return b"".join(chunks)


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise UserError if the file is missing, no image, too large or an animation. No pixel is decoded."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: the file is empty (0 bytes)")
            file.seek(0)
            _refuse_several_frames(_open(file, str(path)), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return an encoded image of any mode as a Pillow image in mode RGBA, upright, at its own size.

    Handles palettes, grey (8 and 16 bit), CMYK, transparency of every kind and the orientation in EXIF.

    Args:
      data: the content of the file.
      name: what error messages call it: the file's path, or "record 12, image 3".

    Raises:
      UserError: empty, not an image, damaged, animated, too large, or of a pixel type without a known range.
    """
    if not data:
        raise UserError(f"{name}: the file is empty (0 bytes)")
    image = _open(io.BytesIO(data), name)
    _scale_transparent_colour(image)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"{name}: the image has more than {MAX_SCANS} scans: save it again")
    try:
        _refuse_several_frames(image, name)
        image.load()
        return _upright_rgba(image, name)
    except UserError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error: each decoder has its own
        raise UserError(_damaged(name, error)) from error


def _upright_rgba(image: Image.Image, name: str) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF: the pixels are good all the same
        image = ImageOps.exif_transpose(image)
    return _to_rgba(image, name)


def fit_square(image: Image.Image, size: int) -> np.ndarray:
    """Return a Pillow image as uint8 RGBA [size, size, 4]: whole, centred, antialiased, transparent beside it.

    The longer side becomes `size`. An image of that size already keeps its pixels.
    """
    image = image.convert("RGBA")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        # reducing_gap lets Pillow halve huge photographs cheaply first; 3 cannot be told from going without.
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if (width, height) == (size, size):
        return np.array(image)
    square = Image.new("RGBA", (size, size))
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.array(square)


def write_png(path: str | os.PathLike[str], image: np.ndarray | Image.Image) -> None:
    """Write uint8 [H, W, 3] (or a Pillow image) as PNG; the file appears whole or not at all."""
    if not isinstance(image, Image.Image):
        image = as_pillow(image)
    path = pathlib.Path(path)
    with disk.errors(path), disk.new_file(path) as aside:
        image.save(aside, format="PNG")


def png_bytes(image_hwc: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    as_pillow(image_hwc).save(buffer, "PNG")
    return buffer.getvalue()


def as_pillow(image_hwc: np.ndarray) -> Image.Image:
    """Return uint8 [H, W, 3] as a Pillow image; anything else is a programming error."""
    image_hwc = np.asarray(image_hwc)
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] != 3 or not image_hwc.size:
        raise ValueError(f"expected uint8 [H, W, 3], got {image_hwc.dtype} {list(image_hwc.shape)}")
    return Image.fromarray(image_hwc)


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Return an image whose header was read and whose size is allowed."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise UserError(f"{name}: not an image that can be read ({kinds}): convert it to PNG") from None
    except Image.DecompressionBombError:
        raise UserError(_too_large(name)) from None
    except Exception as error:
        raise UserError(_damaged(name, error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(_too_large(name, image))
    return image


def _refuse_several_frames(image: Image.Image, name: str) -> None:
    # A JPEG with several pictures (MPO) is a photograph with previews: its first picture is the photograph.
    try:
        if image.format == "MPO" or not getattr(image, "is_animated", False):
            return
        frames = getattr(image, "n_frames")  # noqa: B009 (of formats that have several alone)
    except Exception as error:  # a header that is cut off: each decoder has its own
        raise UserError(_damaged(name, error)) from error
    what = f"a document of {frames} pages" if image.format == "TIFF" else f"an animation of {frames} frames"
    raise UserError(f"{name}: is {what}, and one picture is needed: save the one you want as a PNG and name that")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Give the transparent colour (tRNS) of a PNG that is not loaded yet the range that its pixels will have.

    Pillow stretches samples of 1, 2 and 4 bits to 8, cuts those of RGB from 16 to 8, and leaves that colour as it was.
    """
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # of an image from a file alone
    if image.format != "PNG" or not tiles or colour is None or isinstance(colour, bytes):
        return
    rawmode = tiles[0][3]
    rawmode = rawmode if isinstance(rawmode, str) else rawmode[0]
    if isinstance(colour, tuple):
        image.info["transparency"] = tuple(part >> 8 if rawmode == "RGB;16B" else part & 255 for part in colour)
    elif rawmode in _STRETCHED:
        bits, factor = _STRETCHED[rawmode]
        image.info["transparency"] = (colour & (2**bits - 1)) * factor


def _to_rgba(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{name}: has float pixels of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; 32-bit integers only where they hold 16-bit values
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: has 32-bit pixels of unknown range: save it with 8 or 16 bits")
        grey, transparent = (values // 257).astype(np.uint8), image.info.get("transparency")
        alpha = np.full_like(grey, 255) if transparent is None else np.uint8(255) * (values != transparent)
        image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def _damaged(name: str, error: Exception) -> str:
    return f"{name}: the image is damaged ({one_line(error)}): replace or remove it"


def _too_large(name: str, image: Image.Image | None = None) -> str:
    size = f" ({image.width} x {image.height})" if image else ""
    return f"{name}: the image is too large{size}: scale it to {MAX_PIXELS // 10**6} million pixels or fewer"
