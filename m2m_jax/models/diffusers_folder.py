"""Folders of diffusers: what the fields of a U-Net's and an autoencoder's `config.json` mean here."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models import folder as folders
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.unet_config import BLOCK_TYPES, UNetConfig, with_todays_names

SCHEDULER = "scheduler_config.json"
DIFFUSERS = folders.Format(
    library="diffusers",
    weights="diffusion_pytorch_model.safetensors",
    renamed=((".to_out.", ".to_out.0."), (".ff.up.", ".ff.net.0.proj."), (".ff.down.", ".ff.net.2.")),
    # Attention of autoencoders before diffusers 0.17: what most published Stable Diffusion folders hold.
    formerly=((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.", ".proj_attn.")),
)

# Fields of diffusers' config.json that bear another name here.
UNET_FIELDS = {"num_attention_heads": "attention_head_dim"}
# Every field of diffusers is read, or has one meaning here (these: another would be another network), or is harmless.
UNET_FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# For embeddings that are not there, for training, or for the precision of half of the numbers.
UNET_HARMLESS = (
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "dropout",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "upcast_attention",
)
# Of which a list may say the same for every level.
UNET_BY_LEVEL = (
    "cross_attention_dim",
    "layers_per_block",
    "only_cross_attention",
    "reverse_transformer_layers_per_block",
    "transformer_layers_per_block",
)

# Likewise of its autoencoder: they change what a latent is, and no parameter tells of them.
AUTOENCODER_FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
}
AUTOENCODER_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
AUTOENCODER_HARMLESS = ("force_upcast", "sample_size")
# What diffusers takes fields for that config.json lacks, where we would take another.
AUTOENCODER_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1}


def load_unet_config(folder: str | Path, **overrides) -> UNetConfig:
    """Return the architecture that a U-Net folder, ours or diffusers', describes; `overrides` replace fields."""
    values = _read_config(folder, "UNet2DConditionModel")
    levels = len(_list(folder, values, "block_out_channels", UNetConfig.block_out_channels))
    heads = values.get("attention_head_dim", 8)  # diffusers' default; the number of heads, despite the name
    values["attention_head_dim"] = heads if isinstance(heads, list) else [heads] * levels
    values.setdefault("use_linear_projection", False)
    values = with_todays_names(values)
    if "attentions" not in values:  # a field of ours: what diffusers itself saves attends to text
        values["attentions"] = ["self", "text"]
        values.setdefault("cross_attention_dim", 1280)
    values = folders.one_for_all(folder, values, UNET_BY_LEVEL, levels)
    folders.require_fixed(folder, values, UNET_FIXED)
    down, up = _list(folder, values, "down_block_types", ()), values.get("up_block_types")
    if not all(kind in BLOCK_TYPES for kind in down) or up not in (None, _mirrored(down)):
        raise UserError(
            f"{folder}/config.json has down_block_types={down} and up_block_types={up}; implemented are "
            f"{' and '.join(BLOCK_TYPES)} with a way up that mirrors the way down"
        )
    return folders.load_config(UNetConfig, folder, values, UNET_FIELDS, **overrides)


def load_autoencoder_config(folder: str | Path) -> AutoencoderConfig:
    """Return the architecture that an autoencoder folder describes."""
    values = _read_config(folder, "AutoencoderKL")
    values = AUTOENCODER_DEFAULTS | values
    folders.require_fixed(folder, values, AUTOENCODER_FIXED)
    levels = len(_list(folder, values, "block_out_channels", ()))
    blocks = {name: ([kind] * levels,) for name, kind in AUTOENCODER_BLOCKS.items()}
    folders.require_fixed(folder, values, blocks)
    return folders.load_config(AutoencoderConfig, folder, values, {})


def load_schedule(file: Path) -> NoiseSchedule:
    """That of a scheduler_config.json. Raises UserError for one that is damaged, and UnsupportedSchedule."""
    values = folders.read_json(file)
    try:
        return NoiseSchedule.from_config(values)
    except UserError as error:
        raise type(error)(f"{file}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def unet_values(config: UNetConfig) -> dict[str, Any]:
    """Return the `config.json` of a U-Net folder: diffusers' fields, and those of ours that it ignores."""
    values = {UNET_FIELDS.get(k, k): v for k, v in dataclasses.asdict(config).items()}
    for runtime_choice in ("dtype", "attention_backend", "remat", "precision"):
        del values[runtime_choice]
    up_block_types = _mirrored(config.down_block_types)
    return {"_class_name": "UNet2DConditionModel", **values, "up_block_types": up_block_types}


def save_unet(folder: str | Path, config: UNetConfig, params: Params, dtype=np.float32) -> None:
    """Write a U-Net folder."""
    folders.save_folder(folder, unet_values(config), params, dtype, DIFFUSERS)


def save_autoencoder(folder: str | Path, config: AutoencoderConfig, params: Params, dtype=np.float32) -> None:
    """Write an autoencoder folder."""
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in AUTOENCODER_BLOCKS.items()}
    values = {"_class_name": "AutoencoderKL", **dataclasses.asdict(config), **blocks}
    folders.save_folder(folder, values, params, dtype, DIFFUSERS)


def load_params(folder: str | Path) -> Params:
    """Return all parameters of a diffusers folder; see `folder.load_params`."""
    return folders.load_params(folder, DIFFUSERS)


def _list(folder: str | Path, values: dict, name: str, default: Sequence) -> Sequence:
    value = values.get(name, default)
    if not isinstance(value, list | tuple):
        raise UserError(f"{folder}/config.json has {name}={value!r:.60}; it must be a list, an item a level")
    return value


def _mirrored(down_block_types: Sequence[str]) -> list[str]:
    """Return the block types of the way up."""
    return [kind.replace("Down", "Up") for kind in reversed(down_block_types)]


def _read_config(folder: str | Path, class_name: str) -> dict:
    values = folders.read_config(folder, "diffusers")
    if values.get("_class_name", class_name) != class_name:
        raise UserError(f"{folder}/config.json describes a {values['_class_name']}, not a {class_name}")
    return values
