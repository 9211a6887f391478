"""Folders of transformers: what the fields of a text encoder's (CLIP, BERT) and a DINOv2's `config.json` mean here."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, abstract
from m2m_jax.models import clip_image
from m2m_jax.models import folder as folders
from m2m_jax.models.bert import BertConfig
from m2m_jax.models.clip_text import CLIPTextConfig
from m2m_jax.models.dinov2 import DINOv2Config
from m2m_jax.models.limits import CHANNELS

TRANSFORMERS = folders.Format(
    library="transformers",
    weights="model.safetensors",
    renamed=(
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.out_proj.", ".attention.output.dense."),
    ),
)

# BERT's norms stand inside of what they follow there, and its attention's output projection beside the attention.
BERT_FORMAT = folders.Format(
    library="transformers",
    weights="model.safetensors",
    renamed=(
        ("embeddings.norm.", "embeddings.LayerNorm."),
        ("layers.", "encoder.layer."),
        (".attention.query.", ".attention.self.query."),
        (".attention.key.", ".attention.self.key."),
        (".attention.value.", ".attention.self.value."),
        (".attention.out.", ".attention.output.dense."),
        (".attention_norm.", ".attention.output.LayerNorm."),
        (".up.", ".intermediate.dense."),
        (".down.", ".output.dense."),
        (".output_norm.", ".output.LayerNorm."),
    ),
    formerly=(("norm.scale", "norm.gamma"), ("norm.bias", "norm.beta")),
)
# What BERT folders may hold and no token's state depends on.
BERT_UNUSED = ("embeddings.position_ids", "pooler.dense.kernel", "pooler.dense.bias")

# What stands before every name of a model that was saved as a part of another: with heads, say.
BERT_PREFIX, DINOV2_PREFIXES = "bert.", ("dinov2.", "dinov2_with_registers.")
# All versions of transformers read CLIP's text encoder with this before every name; 5.x writes it without.
CLIP_PREFIX = "text_model."
# What CLIP folders may hold and the states of the text do not depend on: positions counted from 0, which old versions
# stored, and the projection to the space shared with images.
CLIP_UNUSED = ("embeddings.position_ids", "text_projection.kernel")
# What DINOv2's pretraining puts in the place of masked patches, and nothing else reads.
DINOV2_UNUSED = ("embeddings.mask_token",)

# What transformers takes fields for that config.json lacks, where we would take another.
CLIP_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
BERT_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
REGISTERS_DEFAULTS = {"patch_size": 16, "num_register_tokens": 4}
# Fields of DINOv2 that have one value here; another would be another network.
DINOV2_FIXED = {"hidden_act": ("gelu",), "num_channels": (3,), "qkv_bias": (True,)}
BERT_FIXED = {
    "add_cross_attention": (False,),
    "hidden_act": ("gelu",),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}
# Fields that change nothing of what is computed here: for training, for heads that are not there, for other outputs.
HARMLESS = (
    *("attention_dropout", "attention_probs_dropout_prob", "classifier_dropout", "drop_path_rate"),
    *("hidden_dropout_prob", "initializer_factor", "initializer_range", "layerscale_value", "projection_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache", "use_mask_token"),
    *("apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"),
)
# Values of model_type.
CLIP, CLIP_TEXT, BERT = "clip", "clip_text_model", "bert"
DINOV2, DINOV2_WITH_REGISTERS = "dinov2", "dinov2_with_registers"


def load_clip_text_config(folder: str | Path, **overrides) -> CLIPTextConfig:
    """Return the architecture that a text encoder's folder describes; `overrides` replace fields."""
    values = _read_config(folder, CLIP_TEXT)
    return folders.load_config(CLIPTextConfig, folder, CLIP_DEFAULTS | values, {}, **overrides)


def load_bert_config(folder: str | Path, **overrides) -> BertConfig:
    """Return the architecture that a BERT folder describes; `overrides` replace fields."""
    values = _read_config(folder, BERT)
    folders.require_fixed(folder, values, BERT_FIXED)
    return folders.load_config(BertConfig, folder, BERT_DEFAULTS | values, {}, **overrides)


def load_dinov2_config(folder: str | Path, **overrides) -> DINOv2Config:
    """Return the architecture that a DINOv2 folder describes, with or without registers; `overrides` replace fields."""
    values = _read_config(folder, DINOV2, DINOV2_WITH_REGISTERS)
    folders.require_fixed(folder, values, DINOV2_FIXED)
    values = folders.one_for_all(folder, values, ("image_size", "patch_size"), length=2)
    if values["model_type"] == DINOV2:
        values["num_register_tokens"] = 0
    else:
        values = REGISTERS_DEFAULTS | values
        if values["num_register_tokens"] < 1:
            # Not the model without registers: it would interpolate position embeddings in another way.
            raise UserError(f"{folder}/config.json is a {DINOV2_WITH_REGISTERS} without a register: not implemented")
    values.pop("dtype", None)  # there that of the weights, here that of the computation
    return folders.load_config(DINOv2Config, folder, values, {}, **overrides)


def load_clip(folder: str | Path) -> tuple[clip_image.CLIPImageConfig, CLIPTextConfig, int, Params]:
    """Return both towers' configs, the width of their common space and the parameters of `clip_image.CLIP`.

    Raises:
      UserError: the folder holds another model, or not all of it.
    """
    values = _read_config(folder, CLIP)
    image, text = (values.get(name) for name in ("vision_config", "text_config"))
    dim = values.get("projection_dim", 512)
    if not isinstance(image, dict) or not isinstance(text, dict) or type(dim) is not int or not 1 <= dim <= CHANNELS[1]:
        raise UserError(f"{folder}/config.json must have vision_config, text_config and a number projection_dim")
    image_config = folders.load_config(clip_image.CLIPImageConfig, folder, image, {})
    text_config = folders.load_config(CLIPTextConfig, folder, CLIP_DEFAULTS | text, {})
    params = {
        name: x
        for name, x in folders.load_params(folder, TRANSFORMERS).items()
        if name != "logit_scale" and not name.endswith(folders.COUNTED)
    }
    expected = abstract(lambda: clip_image.CLIP(image_config, text_config, dim, rngs=nnx.Rngs(0)))[1]
    folders.require_same(folder, expected, params)
    return image_config, text_config, dim, params


def save_clip_text(folder: str | Path, config: CLIPTextConfig, params: Params, dtype=np.float32) -> None:
    """Write a text encoder's folder, which all versions of transformers read."""
    values = {"architectures": ["CLIPTextModel"], "model_type": CLIP_TEXT, **dataclasses.asdict(config)}
    params = {f"{CLIP_PREFIX}{name}": x for name, x in params.items()}
    folders.save_folder(folder, values, params, dtype, TRANSFORMERS)


def save_bert(folder: str | Path, config: BertConfig, params: Params, dtype=np.float32) -> None:
    """Write a BERT folder."""
    values = {"architectures": ["BertModel"], "model_type": BERT, **_only(BERT_FIXED), **dataclasses.asdict(config)}
    folders.save_folder(folder, values, params, dtype, BERT_FORMAT)


def save_dinov2(folder: str | Path, config: DINOv2Config, params: Params, dtype=np.float32) -> None:
    """Write a DINOv2 folder."""
    architecture, model_type = "Dinov2Model", DINOV2
    values = _only(DINOV2_FIXED) | dataclasses.asdict(config)
    for name in ("layer", "dtype"):
        del values[name]
    if config.num_register_tokens:
        architecture, model_type = "Dinov2WithRegistersModel", DINOV2_WITH_REGISTERS
        # transformers has no such model without one.
        mask: Any = np.zeros((1, config.hidden_size), np.float32)
        params = {**params, "embeddings.mask_token": mask}
    else:
        del values["num_register_tokens"]
        values["use_mask_token"] = False
    values = {"architectures": [architecture], "model_type": model_type, **values}
    folders.save_folder(folder, values, params, dtype, TRANSFORMERS)


def load_params(folder: str | Path) -> Params:
    """Return what is used of a CLIP text encoder's folder, or of a DINOv2's; see `folder.load_params`."""
    params = _of_part(folders.load_params(folder, TRANSFORMERS), CLIP_PREFIX, *DINOV2_PREFIXES)
    return {name: x for name, x in params.items() if name not in CLIP_UNUSED + DINOV2_UNUSED}


def load_bert_params(folder: str | Path) -> Params:
    """Return all parameters of a BERT folder but BERT_UNUSED; see `folder.load_params`."""
    params = _of_part(folders.load_params(folder, BERT_FORMAT), BERT_PREFIX)
    return {name: x for name, x in params.items() if name not in BERT_UNUSED}


def _only(fixed: Mapping[str, tuple]) -> dict[str, Any]:
    """Return the fields that have one value, as `config.json` has them."""
    return {name: known[0] for name, known in fixed.items()}


def _of_part(params: Params, *prefixes: str) -> Params:
    """Return what stands under one of the prefixes, without it; all, where nothing does."""
    for prefix in prefixes:
        part = {name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)}
        if part:
            return part
    return params


def _read_config(folder: str | Path, *model_types: str) -> dict[str, Any]:
    values = folders.read_config(folder, "transformers")
    if values.get("model_type") not in model_types:
        found, wanted = values.get("model_type", "no model_type"), " or ".join(model_types)
        raise UserError(f"{folder}/config.json describes a {found}, not a {wanted}")
    return values
