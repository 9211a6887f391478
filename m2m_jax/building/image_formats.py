"""What the images of a generated set are stored as."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

# What Pillow is told. Lossless WebP as it comes by default takes five times as long for the same size.
IMAGE_FORMATS: dict[str, dict[str, Any]] = {
    "webp_lossless": {"format": "WEBP", "lossless": True, "method": 1, "quality": 20},
    "webp": {"format": "WEBP"},
    "png": {"format": "PNG"},
}


def encode_image(image_hwc: np.ndarray, image_format: str, quality: int) -> bytes:
    """Return an image, uint8 [h, w, 3], as a file of one of `IMAGE_FORMATS`.

    Args:
      quality: 1 to 100, of "webp" alone.
    """
    options = IMAGE_FORMATS[image_format]
    if image_format == "webp":
        options = {**options, "quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(image_hwc).save(buffer, **options)
    return buffer.getvalue()
