"""CLIP as a judge of images and of captions: both towers in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.models import clip_image
from m2m_jax.models.tokenizer import load_tokenizer
from m2m_jax.models.transformers_folder import load_clip
from m2m_jax.scoring.encoders import FEATURES, SET_ENCODERS, SetEncoder, in_batches, resized

SIZES = {
    (768, 32, 224): "clip-vit-b-32",
    (768, 16, 224): "clip-vit-b-16",
    (1024, 14, 224): "clip-vit-l-14",
    (1024, 14, 336): "clip-vit-l-14-336",
    (1280, 14, 224): "clip-vit-h-14",
}


@SET_ENCODERS.register("clip")
class CLIPEncoder(SetEncoder):
    """Projected features of a CLIP folder of transformers, of images and of text.

    Images are resized by Pillow's bicubic filter and rounded, as OpenAI's preprocessor does; it would crop an oblong
    one, which is squeezed here. Captions are cut to the tokens that there are positions for (77).
    """

    reads_text = True

    def __init__(self, folder: Path):
        image, text, dim, params = load_clip(folder)
        graphdef, _ = abstract(lambda: clip_image.CLIP(image, text, dim, rngs=nnx.Rngs(0)))
        self._folder, self._length = folder, text.max_position_embeddings

        def forward(params: Params, images_bhwc: jax.Array) -> dict[str, jax.Array]:
            return {FEATURES: merge(graphdef, params).image_features(images_bhwc)}

        self._text = jax.jit(lambda params, token_ids_bs: merge(graphdef, params).text_features(token_ids_bs))
        width, patch, size = image.hidden_size, image.patch_size, image.image_size
        name = SIZES.get((width, patch, size), f"clip-vit-{width}-{patch}-{size}")
        super().__init__(name, params, forward, size, dim)

    def preprocess(self, images_bhwc: np.ndarray) -> np.ndarray:
        """Return pixels in OpenAI's normalisation."""
        return clip_image.preprocess(resized(images_bhwc, self.size))

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Return projected features [b, dim]."""
        token_ids_bs = load_tokenizer(str(self._folder), self._length)(captions)
        return in_batches(lambda ids: {FEATURES: self._text(self.params, ids)}, token_ids_bs)[FEATURES]
