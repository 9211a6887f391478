"""The text encoders: which there are, and which one a folder of transformers holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from m2m_jax.core.parameters import Params
from m2m_jax.models import transformers_folder
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.encoders import EncoderRegistry

TextEncoderConfig = Any  # a config of one of `TEXT_ENCODERS`: a dataclass with `hidden_size`


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A kind of text encoder.

    Attributes:
      config: a dataclass, of no other kind; its `hidden_size` is the width of the states.
      model: makes the encoder of a config and rngs.
      load_config, load_params: read a folder in transformers' layout.
      states: from the encoder and ids [b, s], what a U-Net attends to: [b, s, c].

    Example, in a file of its own in this package:
        TEXT_ENCODERS.register("t5")(TextEncoder(T5Config, T5Encoder, load_t5_config, load_t5_params))
    """

    config: type
    model: Callable[..., nnx.Module]
    load_config: Callable[[str | Path], TextEncoderConfig]
    load_params: Callable[[str | Path], Params]
    states: Callable[[Any, jax.Array], jax.Array] = lambda encoder, token_ids_bs: encoder(token_ids_bs)


# By the model_type of a folder's config.json.
TEXT_ENCODERS = EncoderRegistry[TextEncoder]("text encoder")
TEXT_ENCODERS.register(transformers_folder.CLIP_TEXT)(
    TextEncoder(
        *(CLIPTextConfig, CLIPTextEncoder),
        *(transformers_folder.load_clip_text_config, transformers_folder.load_params),
        states=lambda encoder, token_ids_bs: encoder(token_ids_bs)[0],  # its second output is the pooled state
    )
)
TEXT_ENCODERS.register(transformers_folder.BERT)(
    TextEncoder(
        *(BertConfig, BertEncoder),
        *(transformers_folder.load_bert_config, transformers_folder.load_bert_params),
    )
)


def load_text_encoder(folder: str | Path) -> tuple[TextEncoderConfig, Params]:
    """Return the config and the parameters of the text encoder in a folder.

    Raises:
      UserError: the folder holds none of `TEXT_ENCODERS`, or not all of one.
    """
    encoder = TEXT_ENCODERS.of_folder(folder)
    return encoder.load_config(folder), encoder.load_params(folder)


def make_text_encoder(config: TextEncoderConfig) -> nnx.Module:
    """Return a text encoder with drawn parameters."""
    return TEXT_ENCODERS.of_config(config).model(config, rngs=nnx.Rngs(0))


def encode_text(config: TextEncoderConfig, encoder: nnx.Module, token_ids_bs: jax.Array) -> jax.Array:
    """Return what a U-Net attends to: states [b, s, c] of ids [b, s]."""
    return TEXT_ENCODERS.of_config(config).states(encoder, token_ids_bs)
