"""CLIP's image tower (Radford et al., arXiv 2103.00020), beside the text tower of `clip_text.py`.

Structure and names are those of transformers' CLIPModel, whose folder holds both towers and their projections into one
space.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.initializers import token
from m2m_jax.models.clip_text import ACTIVATIONS, CLIPTextConfig, CLIPTextEncoder, Encoder
from m2m_jax.models.layers import Conv, Embed, LayerNorm, Linear
from m2m_jax.models.limits import CHANNELS, LAYERS, require_between

# Of OpenAI's preprocessor, RGB in [0, 1].
PIXEL_MEAN = np.asarray((0.48145466, 0.4578275, 0.40821073), np.float32)
PIXEL_STD = np.asarray((0.26862954, 0.26130258, 0.27577711), np.float32)


@dataclasses.dataclass(frozen=True)
class CLIPImageConfig:
    """Architecture of the image tower, in transformers' words and with its defaults (ViT-B/32)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not {self.hidden_act!r}")
        counts = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
        require_between(self, **dict.fromkeys(counts, CHANNELS), num_hidden_layers=LAYERS, layer_norm_eps=(0, 1))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if not 1 <= self.image_size // self.patch_size <= 1024:
            raise UserError(f"patch_size={self.patch_size} must make 1 to 1024 patches of image_size={self.image_size}")


class Embeddings(nnx.Module):
    """Images to tokens [b, 1 + patches, c], the class token first."""

    def __init__(self, c: CLIPImageConfig, *, rngs: nnx.Rngs):
        patch, tokens = (c.patch_size, c.patch_size), (c.image_size // c.patch_size) ** 2 + 1
        self.class_embedding = nnx.Param(token(rngs.params(), (c.hidden_size,)))
        self.patch_embedding = Conv(3, c.hidden_size, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs)
        self.position_embedding = Embed(tokens, c.hidden_size, rngs=rngs)

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        patches_btc = jax.lax.collapse(self.patch_embedding(images_bhwc), 1, 3)
        b, _, c = patches_btc.shape
        class_btc = jnp.broadcast_to(self.class_embedding[...][None, None], (b, 1, c))
        return jnp.concatenate([class_btc, patches_btc], 1) + self.position_embedding.embedding[...][None]


class CLIPImageEncoder(nnx.Module):
    """Images, normalised as `preprocess` does, to the normed state [b, c] of the class token."""

    def __init__(self, config: CLIPImageConfig, *, rngs: nnx.Rngs):
        def norm() -> nnx.Module:
            return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

        self.embeddings = Embeddings(config, rngs=rngs)
        self.pre_layrnorm = norm()  # spelled so in transformers
        self.encoder = Encoder(config, causal=False, rngs=rngs)
        self.post_layernorm = norm()

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        states_btc = self.encoder(self.pre_layrnorm(self.embeddings(images_bhwc)))
        return self.post_layernorm(states_btc[:, 0])


class CLIP(nnx.Module):
    """Both towers and their projections to [b, projection_dim]."""

    def __init__(self, image: CLIPImageConfig, text: CLIPTextConfig, projection_dim: int, *, rngs: nnx.Rngs):
        self.vision_model = CLIPImageEncoder(image, rngs=rngs)
        self.text_model = CLIPTextEncoder(text, rngs=rngs)
        self.visual_projection = Linear(image.hidden_size, projection_dim, use_bias=False, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, projection_dim, use_bias=False, rngs=rngs)

    def image_features(self, images_bhwc: jax.Array) -> jax.Array:
        """Return [b, projection_dim] of images as `preprocess` gives them."""
        return self.visual_projection(self.vision_model(images_bhwc))

    def text_features(self, token_ids_bs: jax.Array) -> jax.Array:
        """Return [b, projection_dim] of ids."""
        return self.text_projection(self.text_model(token_ids_bs)[1])


def preprocess(pixels_bhwc: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 255] in OpenAI's normalisation."""
    return (pixels_bhwc / 255 - PIXEL_MEAN) / PIXEL_STD
