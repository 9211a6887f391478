"""The image encoders, whose tokens are the context in M2M-DINO: which there are, and which one a folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from m2m_jax.core.parameters import Params
from m2m_jax.models import dinov2, transformers_folder
from m2m_jax.models.encoders import EncoderRegistry

ImageEncoderConfig = Any  # a config of one of `IMAGE_ENCODERS`: a dataclass with `hidden_size`


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A kind of image encoder.

    Attributes:
      config: a dataclass, of no other kind; its `hidden_size` is the width of the tokens.
      model: makes the encoder of a config and rngs; called with what `preprocess` gave, it returns tokens [b, s, c].
      load_config: (folder, layer=, dtype=) -> config; `layer`: tokens are taken after so many blocks, -1: all.
      load_params: reads a folder's parameters.
      num_tokens: (config, image size) -> s; raises UserError where it takes no images of that size.
      preprocess: (images, float [b, h, w, 3] in [-1, 1]; image size) -> what the encoder takes.

    Example, in a file of its own in this package:
        IMAGE_ENCODERS.register("siglip_vision_model")(
            ImageEncoder(SiglipConfig, Siglip, load_siglip_config, load_siglip_params, num_tokens, preprocess)
        )
    """

    config: type
    model: Callable[..., nnx.Module]
    load_config: Callable[..., ImageEncoderConfig]
    load_params: Callable[[str | Path], Params]
    num_tokens: Callable[[ImageEncoderConfig, int], int]
    preprocess: Callable[[jax.Array, int], jax.Array]


# By the model_type of a folder's config.json.
IMAGE_ENCODERS = EncoderRegistry[ImageEncoder]("image encoder")
_DINOV2 = ImageEncoder(
    *(dinov2.DINOv2Config, dinov2.DINOv2),
    *(transformers_folder.load_dinov2_config, transformers_folder.load_params),
    *(dinov2.num_tokens, dinov2.preprocess),
)
IMAGE_ENCODERS.register(transformers_folder.DINOV2)(_DINOV2)
IMAGE_ENCODERS.register(transformers_folder.DINOV2_WITH_REGISTERS)(_DINOV2)
