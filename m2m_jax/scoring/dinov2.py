"""DINOv2 as a judge: the class token after all blocks, or after one of them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.models.dinov2 import PIXEL_MEAN, PIXEL_STD, DINOv2
from m2m_jax.models.folder import require_same
from m2m_jax.models.transformers_folder import load_dinov2_config, load_params
from m2m_jax.scoring.encoders import FEATURES, SET_ENCODERS, SetEncoder, resized

_SIZE = 224
_LETTERS = {384: "s", 768: "b", 1024: "l", 1536: "g"}


class ClassToken(SetEncoder):
    """Class token of a DINOv2 folder, of images of 224 pixels a side. layer: after so many blocks; -1: all, normed.

    Images are resized by Pillow's bicubic filter and rounded, as DINOv2's own evaluation does; nothing is cropped.
    """

    def __init__(self, folder: Path, name: str = "dinov2", layer: int = -1):
        config = load_dinov2_config(folder, layer=layer)
        params = load_params(folder)
        graphdef, shapes = abstract(lambda: DINOv2(config, rngs=nnx.Rngs(0)))
        require_same(folder, shapes, params)

        def forward(params: Params, images_bhwc: jax.Array) -> dict[str, jax.Array]:
            return {FEATURES: merge(graphdef, params)(images_bhwc)[:, 0]}

        width, patch = config.hidden_size, config.patch_size
        name += f"-vit-{_LETTERS.get(width, width)}-{patch}"
        name += "-registers" if config.num_register_tokens else ""
        name += f"-cls{layer}" if layer != -1 else ""
        super().__init__(name, params, forward, _SIZE // patch * patch, width)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return pixels in ImageNet's normalisation."""
        return (resized(images_bhwc, self.size) / 255 - PIXEL_MEAN) / PIXEL_STD


@SET_ENCODERS.register("dinov2")
class DINOv2Encoder(ClassToken):
    """The normed class token of a DINOv2 folder of transformers: FD-DINOv2, KD-DINOv2 (arXiv 2306.04675), by its size.

    Example:
        SET_ENCODERS.choose("dinov2")(Path("models/dinov2_vitl14")).name  # "dinov2-vit-l-14"
    """

    def __init__(self, folder: Path):
        super().__init__(folder)


@SET_ENCODERS.register("vit_s14")
class FocusEncoder(ClassToken):
    """The class token after block 11 of 12 of the ViT-S/14 that `prepare_vit` makes.

    That encoder was tuned to find what is salient, and its last block has become that: not DINOv2's, and named so. A
    model that was conditioned on it cannot be judged by it (`require_unseen`).
    """

    def __init__(self, folder: Path):
        super().__init__(folder, "focus", layer=11)
