"""The text encoders: which there are, and which one a folder of transformers holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params
from m2m_jax.core.registry import Registry
from m2m_jax.models import folder as folders
from m2m_jax.models import transformers_folder
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder

TextEncoderConfig = Any  # a config of one of `TEXT_ENCODERS`: a dataclass with `hidden_size`


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A kind of text encoder.

    Attributes:
      config: a dataclass, of no other kind; its `hidden_size` is the width of the states.
      model: makes the encoder of a config and rngs.
      load_config, load_params: read a folder in transformers' layout.
      states: from the encoder and ids [b, s], what a U-Net attends to: [b, s, c].

    Example:
        TEXT_ENCODERS.register("t5")(TextEncoder(T5Config, T5Encoder, load_t5_config, load_t5_params))
    """

    config: type
    model: Callable[..., nnx.Module]
    load_config: Callable[[str | Path], TextEncoderConfig]
    load_params: Callable[[str | Path], Params]
    states: Callable[[Any, jax.Array], jax.Array] = lambda encoder, token_ids_bs: encoder(token_ids_bs)


# By the model_type of a folder's config.json.
TEXT_ENCODERS: Registry[TextEncoder] = Registry("text encoder")
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
    kind: Any = folders.read_config(folder, "transformers").get("model_type")
    if kind not in TEXT_ENCODERS:
        there = " and ".join(TEXT_ENCODERS)
        raise UserError(f"{folder}/config.json describes a {kind}; text encoders are {there}")
    encoder = TEXT_ENCODERS[kind]
    return encoder.load_config(folder), encoder.load_params(folder)


def make_text_encoder(config: TextEncoderConfig) -> nnx.Module:
    """Return a text encoder with drawn parameters."""
    return _kind(config)[1].model(config, rngs=nnx.Rngs(0))


def encode_text(config: TextEncoderConfig, encoder: nnx.Module, token_ids_bs: jax.Array) -> jax.Array:
    """Return what a U-Net attends to: states [b, s, c] of ids [b, s]."""
    return _kind(config)[1].states(encoder, token_ids_bs)


def to_metadata(config: TextEncoderConfig) -> dict[str, Any]:
    """Return what it is, as JSON can hold it."""
    return {"model_type": _kind(config)[0], **dataclasses.asdict(config)}


def from_metadata(values: dict[str, Any]) -> TextEncoderConfig:
    """Return the config of what `to_metadata` gave.

    Raises:
      UserError: it is of no text encoder.
    """
    return folders.config_from(TEXT_ENCODERS.choose(values["model_type"]).config, values, {})


def _kind(config: TextEncoderConfig) -> tuple[str, TextEncoder]:
    return next((name, kind) for name, kind in TEXT_ENCODERS.items() if type(config) is kind.config)
