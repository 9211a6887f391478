"""Inception-v3 in its FID form as a judge: the only one whose Fréchet distance is FID."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.models import inception
from m2m_jax.scoring.encoders import FEATURES, LOGITS, SET_ENCODERS, SetEncoder, resized


@SET_ENCODERS.register("inception_v3")
class InceptionEncoder(SetEncoder):
    """Features [2048] and logits [1008] of a folder with pytorch-fid's weights as safetensors.

    Images are resized as clean-fid does (Parmar et al., arXiv 2104.11222): Pillow's bicubic filter on floats, neither
    rounded nor clipped. torch-fidelity and pytorch-fid resize without antialiasing: their FID differs for images that
    are not of 299 pixels.
    """

    outputs_of = (FEATURES, LOGITS)

    def __init__(self, folder: Path):
        params = inception.load_inception(folder)
        graphdef, _ = abstract(lambda: inception.Inception(inception.PUBLISHED, rngs=nnx.Rngs(0)))

        def forward(params: Params, images_bhwc: jax.Array) -> dict[str, jax.Array]:
            features_bc, logits_bl = merge(graphdef, params)(images_bhwc)
            return {FEATURES: features_bc, LOGITS: logits_bl}

        super().__init__("inception-v3-fid", params, forward, inception.SIZE, inception.FEATURES)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return pixels in about [-1, 1], of 299 pixels a side."""
        return inception.preprocess(resized(images_bhwc, self.size, rounded=False))
