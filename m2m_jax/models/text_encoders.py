"""The text encoders: which there are, and which one a folder of transformers holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params
from m2m_jax.models import folder as folders
from m2m_jax.models import transformers_folder
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder

TextEncoderConfig = CLIPTextConfig | BertConfig
# Value of model_type in a config.json -> config, model, what reads the folder's config and its parameters.
KINDS = {
    transformers_folder.CLIP_TEXT: (
        *(CLIPTextConfig, CLIPTextEncoder),
        *(transformers_folder.load_clip_text_config, transformers_folder.load_params),
    ),
    transformers_folder.BERT: (
        *(BertConfig, BertEncoder),
        *(transformers_folder.load_bert_config, transformers_folder.load_bert_params),
    ),
}


def load_text_encoder(folder: str | Path) -> tuple[TextEncoderConfig, Params]:
    """Raises UserError where the folder holds none of these, or not all of one."""
    kind = folders.read_config(folder, "transformers").get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}/config.json describes a {kind}; text encoders are {' and '.join(KINDS)}")
    _, _, load_config, load_params = KINDS[kind]
    return load_config(folder), load_params(folder)


def make_text_encoder(config: TextEncoderConfig) -> nnx.Module:
    """Return a text encoder with drawn parameters."""
    return _kind(config)[1][1](config, rngs=nnx.Rngs(0))


def encode_text(encoder: nnx.Module, token_ids_bs: jax.Array) -> jax.Array:
    """Return what a U-Net attends to: states [b, s, c] of ids [b, s]."""
    states = encoder(token_ids_bs)
    return states[0] if isinstance(encoder, CLIPTextEncoder) else states  # CLIP's second output is the pooled state


def to_metadata(config: TextEncoderConfig) -> dict[str, Any]:
    """Return what it is, as JSON can hold it."""
    return {"model_type": _kind(config)[0], **dataclasses.asdict(config)}


def from_metadata(values: dict[str, Any]) -> TextEncoderConfig:
    """Return the config of what `to_metadata` gave."""
    return folders.config_from(KINDS[values["model_type"]][0], values, {})


def _kind(config: TextEncoderConfig) -> tuple[str, tuple]:
    return next((name, kind) for name, kind in KINDS.items() if isinstance(config, kind[0]))
