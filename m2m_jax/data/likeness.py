"""How alike two drawings are, colours and mirroring aside: the measure of copies, and of what splits must not part."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

COPY = 0.95  # shape correlation above which one drawing counts as a copy of another
_ROWS_AT_ONCE = 2048


def shapes(images_nhwc: np.ndarray) -> np.ndarray:
    """Describe images by their shapes: unit vectors whose inner products are correlations of luminance.

    A rotation of hue keeps luminance, and zero mean and unit norm forget contrast and ground: a red heart and a green
    one have the same shape. What has one luminance all over has none, and is like nothing.

    images_nhwc: uint8 [n, h, w, 3], on one ground.
    Returns float32 [n, h * w].
    """
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L"), np.float32).ravel() for image in images_nhwc])
    grey -= grey.mean(1, keepdims=True)
    return grey / (np.linalg.norm(grey, axis=1, keepdims=True) + 1e-6)


def likeness(images_nhwc: np.ndarray, others_mhwc: np.ndarray) -> np.ndarray:
    """Correlate the shapes of images with those of others and of their mirror images: float32 [n, m], at most 1."""
    return likeness_to(images_nhwc, shapes(others_mhwc))


def likeness_to(images_nhwc: np.ndarray, shapes_md: np.ndarray) -> np.ndarray:
    """Do the same where the others' shapes are there already."""
    return np.maximum(shapes(images_nhwc) @ shapes_md.T, shapes(images_nhwc[:, :, ::-1]) @ shapes_md.T)


def like_pairs(images_nhwc: np.ndarray, threshold: float = COPY) -> Iterator[tuple[int, int]]:
    """Yield pairs (i, j), i < j, of images whose likeness is above the threshold, in blocks that fit into memory.

    images_nhwc: uint8 [n, h, w, 3], on one ground.
    """
    shapes_nd, mirrored_nd = shapes(images_nhwc), shapes(images_nhwc[:, :, ::-1])
    for first in range(0, len(shapes_nd), _ROWS_AT_ONCE):
        for second in range(first, len(shapes_nd), _ROWS_AT_ONCE):
            others = shapes_nd[second : second + _ROWS_AT_ONCE].T
            rows = slice(first, first + _ROWS_AT_ONCE)
            above = np.maximum(shapes_nd[rows] @ others, mirrored_nd[rows] @ others) > threshold
            for i, j in zip(*np.nonzero(above), strict=True):
                if first + i < second + j:
                    yield first + int(i), second + int(j)


def without_copies(images_nhwc: np.ndarray, threshold: float = COPY) -> list[int]:
    """Choose images of which none is a copy of another: each that is none of one chosen before. Returns indices."""
    likeness_nn = likeness(images_nhwc, images_nhwc)
    chosen: list[int] = []
    for i in range(len(images_nhwc)):
        if not chosen or likeness_nn[i, chosen].max() <= threshold:
            chosen.append(i)
    return chosen
