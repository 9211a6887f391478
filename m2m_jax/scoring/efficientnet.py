"""EfficientNet-Lite as a judge: "Fréchet EfficientNet-Lite distance", never FID."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.models import efficientnet
from m2m_jax.scoring.encoders import FEATURES, LOGITS, SET_ENCODERS, SetEncoder, resized

NAMES = {(1.0, 1.0): "efficientnet-lite0", (1.0, 1.1): "efficientnet-lite1", (1.1, 1.2): "efficientnet-lite2"}


@SET_ENCODERS.register("efficientnet_lite0")
class EfficientNetEncoder(SetEncoder):
    """Features before the classifier [1280], and its logits, of a folder that `prepare_efficientnet` wrote.

    Images are resized by Pillow's bicubic filter and rounded, as ImageNet's were for it; nothing is cropped.
    """

    outputs_of = (FEATURES, LOGITS)

    def __init__(self, folder: Path):
        config, params = efficientnet.load_efficientnet(folder)
        graphdef, _ = abstract(lambda: efficientnet.EfficientNetLite(config, rngs=nnx.Rngs(0)))

        def forward(params: Params, images_bhwc: jax.Array) -> dict[str, jax.Array]:
            features_bc, logits_bl = merge(graphdef, params)(images_bhwc)
            return {FEATURES: features_bc, LOGITS: logits_bl}

        name = NAMES.get((config.width, config.depth), f"efficientnet-lite-{config.width}-{config.depth}")
        super().__init__(name, params, forward, config.image_size, efficientnet.HEAD)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return pixels about 0, of the network's size."""
        return efficientnet.preprocess(resized(images_bhwc, self.size))
