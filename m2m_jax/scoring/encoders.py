"""Encoders that judge images: uint8 pixels to vectors, each under a name that stands in every figure made with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params
from m2m_jax.core.parameters import fingerprint as fingerprint_of
from m2m_jax.core.registry import Registry

FEATURES, LOGITS = "features", "logits"  # what an encoder may give of an image
_BATCH = 32  # images that are encoded at once: one shape, one program


class SetEncoder:
    """Give features of images. A subclass makes one of a folder of weights, and registers in `SET_ENCODERS`.

    Attributes:
      name: what figures call it; it tells apart whatever gives other features: network, size, layer.
      fingerprint: of all weights, `core.parameters.fingerprint`; equal to that of the frozen image encoder of a
        checkpoint that was conditioned on the same network, at whatever layer. Empty where there are no weights.
      dim: c, the number of features.
      params: the weights; empty where there are none.
      outputs_of: FEATURES and, where the network classifies, LOGITS.
      reads_text: whether `encode_text` is there.

    Example:
        encoder = SET_ENCODERS.choose("efficientnet_lite0")(Path("data/efficientnet_lite0"))
        features_bc = encoder(images_bhwc)
    """

    name: str
    fingerprint: str
    dim: int
    outputs_of: tuple[str, ...] = (FEATURES,)
    reads_text: bool = False

    def __init__(
        self,
        name: str,
        params: Params,
        forward: Callable[[Params, jax.Array], dict[str, jax.Array]],
        size: int,
        dim: int,
    ):
        """Make an encoder of its parts.

        Args:
          forward: (params, images as `preprocess` gives them, in JAX) -> {FEATURES: [b, c], LOGITS: [b, l]}; traceable.
          size: pixels along each side of what the network sees.
        """
        self.name, self.dim, self.size = name, dim, size
        self.fingerprint = fingerprint_of(params) if params else ""
        self.params, self._forward = params, jax.jit(forward)

    def __call__(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return the features [b, c], float32, of images uint8 [b, h, w, 3]."""
        return self.outputs(images_bhwc)[FEATURES]

    def outputs(self, images_bhwc: np.ndarray) -> dict[str, np.ndarray]:
        """Return all of `outputs_of` at once: {name: float32 [b, ...]}."""
        images_bhwc = np.asarray(images_bhwc)
        if images_bhwc.dtype != np.uint8 or images_bhwc.ndim != 4 or images_bhwc.shape[-1] != 3:
            raise ValueError(f"expected uint8 [b, h, w, 3], got {images_bhwc.dtype} {list(images_bhwc.shape)}")
        return in_batches(lambda batch_bhwc: self._forward(self.params, self.preprocess(batch_bhwc)), images_bhwc)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return uint8 images as the network takes them: float32 [b, size, size, 3]."""
        raise NotImplementedError

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Return captions as [b, c] in the space of the images' features, where `reads_text`."""
        raise UserError(f"{self.name} reads no text: name an encoder that does, clip or conse")


# By name: classes that are made of a folder of weights. All modules of this package are imported to look for them.
SET_ENCODERS = Registry[Callable[[Path], SetEncoder]]("image encoder", package="m2m_jax.scoring")


def resized(images_bhwc: np.ndarray, size: int, *, rounded: bool = True) -> np.ndarray:
    """Return uint8 images at `size` by `size` pixels by Pillow's bicubic filter, antialiased; float32 in [0, 255].

    The whole image is kept, an oblong one squeezed.

    Args:
      rounded: to whole numbers, as an image file would be; False: as clean-fid does (arXiv 2104.11222), which resizes
        floats and does not clip them.
    """
    if rounded:
        shape, filter_ = (size, size), Image.Resampling.BICUBIC
        made = [np.asarray(Image.fromarray(image).resize(shape, filter_)) for image in images_bhwc]
        return np.stack(made).astype(np.float32)
    made = [
        np.stack([_resized_float(image[..., channel], size) for channel in range(image.shape[-1])], axis=-1)
        for image in images_bhwc
    ]
    return np.stack(made)


def _resized_float(plane_hw: np.ndarray, size: int) -> np.ndarray:
    plane = Image.fromarray(plane_hw.astype(np.float32))  # mode "F"
    return np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))


def in_batches(function: Callable[[np.ndarray], dict[str, jax.Array]], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a function of a batch gives for any number of rows, float32. It always sees as many: one program."""
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, max(len(rows), 1), _BATCH):
        batch = rows[first : first + _BATCH]
        padded = np.zeros((_BATCH, *rows.shape[1:]), rows.dtype)
        padded[: len(batch)] = batch
        for name, values in function(padded).items():
            parts.setdefault(name, []).append(np.asarray(values, np.float32)[: len(batch)])
    return {name: np.concatenate(values) for name, values in parts.items()}


def require_unseen(encoder: SetEncoder, conditioned_on: Collection[str]) -> None:
    """Refuse a judge that the judged model was conditioned on: it would be judged by what it copies.

    Args:
      conditioned_on: fingerprints of the encoders whose tokens the model attends to, at whatever layer.

    Raises:
      UserError: this encoder has the weights of one of them.
    """
    if encoder.fingerprint and encoder.fingerprint in conditioned_on:
        raise UserError(
            f"{encoder.name} has the weights that the judged model was conditioned on: judge it by another encoder"
        )


@SET_ENCODERS.register("pixels")
class Pixels(SetEncoder):
    """Give images at 8 by 8 pixels: no network, and so the line that a network's features must beat."""

    def __init__(self, folder: Path | None = None):
        def forward(params: Params, images_bhwc: jax.Array) -> dict[str, jax.Array]:
            return {FEATURES: images_bhwc.reshape(len(images_bhwc), -1)}

        super().__init__("pixels-8", {}, forward, size=8, dim=192)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return pixels in [-1, 1]."""
        return resized(images_bhwc, self.size) / 127.5 - 1
