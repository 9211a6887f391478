"""Folders of diffusers: what the fields of a U-Net's and an autoencoder's `config.json` mean here."""

import dataclasses
from pathlib import Path

import numpy as np

from m2m_jax.errors import UserError
from m2m_jax.models import folder as folders
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.parameters import Params
from m2m_jax.models.unet import UNetConfig

DIFFUSERS = folders.Format(
    library="diffusers",
    weights="diffusion_pytorch_model.safetensors",
    renamed=((".to_out.", ".to_out.0."), (".ff.up.", ".ff.net.0.proj."), (".ff.down.", ".ff.net.2.")),
)

# Fields of diffusers' config.json that bear another name here.
UNET_FIELDS = {"num_attention_heads": "attention_head_dim"}
# Fields of diffusers' U-Net that have one value here; another would be another network.
UNET_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
}


def load_unet_config(folder: str | Path, **overrides) -> UNetConfig:
    """The architecture that a U-Net folder describes; `overrides` replace fields that a folder does not hold."""
    values = _read_config(folder, "UNet2DConditionModel")
    levels = len(values.get("block_out_channels", UNetConfig.block_out_channels))
    heads = values.get("attention_head_dim", 8)  # diffusers' default; the number of heads, despite the name
    values["attention_head_dim"] = heads if isinstance(heads, list) else [heads] * levels
    values.setdefault("use_linear_projection", False)
    folders.require_fixed(folder, values, UNET_FIXED)
    if not isinstance(values.get("transformer_layers_per_block", 1), int):
        raise UserError(f"{folder}/config.json has transformer_layers_per_block by level; one number is implemented")
    return folders.config_from(UNetConfig, values, UNET_FIELDS, **overrides)


def load_autoencoder_config(folder: str | Path) -> AutoencoderConfig:
    """The architecture that an autoencoder folder describes."""
    return folders.config_from(AutoencoderConfig, _read_config(folder, "AutoencoderKL"), {})


def save_unet(folder: str | Path, config: UNetConfig, params: Params, dtype=np.float32) -> None:
    """Writes a U-Net folder."""
    values = {UNET_FIELDS.get(k, k): v for k, v in dataclasses.asdict(config).items()}
    for runtime_choice in ("dtype", "attention_backend"):
        del values[runtime_choice]
    up = [kind.replace("Down", "Up") for kind in reversed(config.down_block_types)]
    values = {"_class_name": "UNet2DConditionModel", **values, "up_block_types": up}
    folders.save_folder(folder, values, params, dtype, DIFFUSERS)


def save_autoencoder(folder: str | Path, config: AutoencoderConfig, params: Params, dtype=np.float32) -> None:
    """Writes an autoencoder folder."""
    levels = len(config.block_out_channels)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    values = {"_class_name": "AutoencoderKL", **dataclasses.asdict(config), **blocks}
    folders.save_folder(folder, values, params, dtype, DIFFUSERS)


def load_params(folder: str | Path) -> Params:
    """All parameters of a diffusers folder; see `folder.load_params`."""
    return folders.load_params(folder, DIFFUSERS)


def _read_config(folder: str | Path, class_name: str) -> dict:
    values = folders.read_config(folder, "diffusers")
    if values.get("_class_name", class_name) != class_name:
        raise UserError(f"{folder}/config.json describes a {values['_class_name']}, not a {class_name}")
    return values
