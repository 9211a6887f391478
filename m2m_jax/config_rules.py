"""Which values a configuration may have: limits of fields, and what does not go together."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from m2m_jax.configuration import default_config, flatten, reads_latents
from m2m_jax.errors import UserError

# An image set has at most as many images as a record may hold (m2m_jax/data/records.py).
MAX_IMAGES_PER_SET = 25

MAX_NUMBER = 2**32 - 1  # of all fields; no field has use for more, and devices count no further

BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")

# Fields that hold one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("set_diffusion", "text_to_image", "autoencoder"),
    "data.name": ("emoji", "emoji_hands", "folder", "precomputed", "mis"),
    "data.on_error": ("stop", "skip"),
    "model.attn2": ("image_set", "text", "none"),
    "model.clean_sees": ("preceding", "itself"),
    "model.attention_backend": ("auto", "prefix", "prefix_cudnn", "splash", "dense"),
    "model.remat": ("none", "dots", "blocks"),
    "model.dtype": ("float32", "bfloat16"),
    "schedule.beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "rectified_flow"),
    "schedule.prediction_type": ("epsilon", "v_prediction", "sample", "flow"),
    "schedule.timestep_spacing": ("leading", "linspace", "trailing"),
    "diffusion.loss_weight": ("uniform", "min_snr"),
    "train.parameters": ("all", "attention", "set_attention"),
    "train.on_nonfinite": ("stop", "skip", "rollback"),
    "sample.stepper": (
        "dpmpp_2m",
        "ddim",
        "ddpm",
        "euler",
        "euler_ancestral",
        "dpmpp_2m_sde",
        "unipc",
        "heun",
    ),
}

# Numbers below these make no sense; a pair is (smallest, largest).
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.image_size": (8, math.inf),
    "data.images_per_set": (1, MAX_IMAGES_PER_SET),
    "data.batch_size": (1, math.inf),
    "data.prefetch": (0, math.inf),
    "data.threads": (1, math.inf),
    "data.caption_tag_dropout": (0.0, 1.0),
    "data.augment.hue_degrees": (0.0, 180.0),
    "data.augment.ground_probability": (0.0, 1.0),
    "data.augment.ink_probability": (0.0, 1.0),
    "data.augment.contrast": (0.0, 0.99),
    "data.augment.scale": (0.0, 0.99),
    "data.augment.mirror_probability": (0.0, 1.0),
    "autoencoder.layers_per_block": (1, math.inf),
    "autoencoder.latent_channels": (1, math.inf),
    "autoencoder.norm_num_groups": (1, math.inf),
    "autoencoder.kl_weight": (0.0, math.inf),
    "autoencoder.perceptual_weight": (0.0, math.inf),
    "autoencoder.perceptual_slices": (1, 5),
    "autoencoder.perceptual_share": (0.0, 1.0),
    "model.layers_per_block": (1, math.inf),
    "model.norm_num_groups": (1, math.inf),
    "model.transformer_layers_per_block": (1, math.inf),
    "model.norm_eps": (1e-12, 1.0),
    "image_encoder.image_size": (1, math.inf),
    "image_encoder.layer": (-1, math.inf),
    "text_encoder.max_tokens": (2, math.inf),
    "schedule.num_train_timesteps": (2, math.inf),
    "schedule.shift": (1e-6, math.inf),
    "diffusion.min_snr_gamma": (1e-6, math.inf),
    "diffusion.context_dropout": (0.0, 1.0),
    "diffusion.clean_timestep": (0, math.inf),
    "optimizer.learning_rate": (0.0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.weight_decay": (0.0, math.inf),
    "optimizer.clip_norm": (1e-12, math.inf),
    "optimizer.b1": (0.0, 0.999999),
    "optimizer.b2": (0.0, 0.999999),
    "optimizer.attn2_rate": (0.0, math.inf),
    "train.steps": (1, math.inf),
    "train.log_every": (1, math.inf),
    "train.accumulation": (1, math.inf),
    "train.ema_decay": (0.0, 0.999999),
    "eval.every": (1, math.inf),
    "eval.batches": (1, math.inf),
    "eval.batch_size": (2, math.inf),
    "sample.steps": (1, math.inf),
    "sample.guidance_scale": (0.0, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "checkpoint.keep_best": (0, math.inf),
}


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value makes no run."""
    fields = flatten(config)

    for name, default in flatten(default_config()).items():
        _validate_type(name, fields[name], default)
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            raise UserError(f"config.{name} is {fields[name]!r}; it must be one of {', '.join(choices)}")
    for name, (low, high) in LIMITS.items():
        if not low <= fields[name] <= high:
            limits = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"config.{name} is {fields[name]}; it must be {limits}")

    if config.data.name not in ("emoji", "emoji_hands") and not config.data.path:
        raise UserError(f"config.data.path is empty; data.name={config.data.name} needs --config.data.path=DIR")
    if config.data.latents and config.data.name != "mis":
        raise UserError(f"config.data.latents is True; data.name={config.data.name} has no choice of them")
    latents = "data.latents=True reads latents" if config.data.latents else "data.name=precomputed holds latents"
    if reads_latents(config.data) and config.data.augment.enabled:
        raise UserError(
            "config.data.augment.enabled is True; precomputed latents cannot be augmented: "
            "set --config.data.augment.enabled=False, or train on the images"
        )
    if reads_latents(config.data) and config.task == "autoencoder":
        raise UserError(f"config.{latents}; task=autoencoder needs a data set of images")
    unknown_kinds = sorted(set(config.data.kinds) - {"style", "content"})
    if not config.data.kinds or unknown_kinds:
        raise UserError(f"config.data.kinds is {tuple(config.data.kinds)}; it takes style, content or both")
    if not 0 < config.schedule.beta_start <= config.schedule.beta_end < 1:
        raise UserError(
            "config.schedule.beta_start and .beta_end are "
            f"{config.schedule.beta_start:g} and {config.schedule.beta_end:g}; "
            "they must satisfy 0 < beta_start <= beta_end < 1"
        )
    if config.diffusion.clean_timestep >= config.schedule.num_train_timesteps:
        raise UserError(
            f"config.diffusion.clean_timestep is {config.diffusion.clean_timestep}; it must be less than "
            f"config.schedule.num_train_timesteps = {config.schedule.num_train_timesteps}"
        )
    steps = tuple(config.profile.steps)
    if len(steps) != 2 or steps[0] > steps[1] or (steps[0] < 1 and steps != (0, 0)):
        raise UserError(f"config.profile.steps is {steps}; it must be a first and a last step, or (0, 0) for none")
    for axis in config.mesh:
        if config.mesh[axis] < 1 and config.mesh[axis] != -1:
            raise UserError(
                f"config.mesh.{axis} is {config.mesh[axis]}; it must be positive, or -1 for all that are left"
            )

    if config.train.parameters != "all" and (config.task == "autoencoder" or config.model.attn2 == "none"):
        raise UserError(
            f"config.train.parameters is {config.train.parameters}; only M2M trains a part of its parameters"
        )
    if config.image_encoder.path and config.model.attn2 != "image_set":
        raise UserError(f"config.image_encoder.path is set; model.attn2={config.model.attn2!r} attends to no image")
    if (config.task == "text_to_image") != (config.model.attn2 == "text") and config.task != "autoencoder":
        raise UserError(
            f"config.task is {config.task} and config.model.attn2 {config.model.attn2!r}: "
            "task='text_to_image' and model.attn2='text' go together"
        )
    if (config.task == "text_to_image") != bool(config.text_encoder.path):
        raise UserError(
            f"config.task is {config.task} and config.text_encoder.path {config.text_encoder.path!r}: "
            "task='text_to_image' needs a text encoder, and no other task has one"
        )
    if config.task == "autoencoder":
        _validate_channels("autoencoder", config.autoencoder, config.data.image_size)
    else:
        _validate_channels("model", config.model, config.data.image_size)
        _validate_levels(config.model)


def _validate_type(name: str, value: Any, default: Any) -> None:
    """Raises UserError for items of a tuple that are of another type than the default's, and for numbers too large."""
    items = value if isinstance(default, tuple) else (value,)
    kind = type(default[0] if isinstance(default, tuple) else default)
    for item in items:
        if type(item) is not kind and not (kind is float and type(item) is int):
            raise UserError(f"config.{name} is {value!r}; it takes {kind.__name__}s, as in {default!r}")
        if isinstance(item, int | float) and not abs(item) <= MAX_NUMBER:
            raise UserError(f"config.{name} is {value!r}; numbers are finite and at most {MAX_NUMBER}")


def _validate_channels(name: str, section: ConfigDict, image_size: int) -> None:
    channels = section.block_out_channels
    if not channels or min(channels) < 1:
        raise UserError(f"config.{name}.block_out_channels is {tuple(channels)}; it needs positive numbers")
    for count in channels:
        if count % section.norm_num_groups:
            raise UserError(
                f"config.{name}.norm_num_groups is {section.norm_num_groups}; it must divide every one of "
                f"config.{name}.block_out_channels = {tuple(channels)}"
            )
    # Every block but the last halves the side, and a half pixel cannot be drawn.
    factor = 2 ** (len(channels) - 1)
    if image_size % factor:
        raise UserError(
            f"config.data.image_size is {image_size}; the {len(channels)} blocks of "
            f"config.{name}.block_out_channels need a multiple of {factor}"
        )


def _validate_levels(model: ConfigDict) -> None:
    levels = len(model.block_out_channels)
    for name in ("down_block_types", "num_attention_heads"):
        if len(model[name]) != levels:
            raise UserError(
                f"config.model.{name} has {len(model[name])} entries and "
                f"config.model.block_out_channels {levels}; each level needs one"
            )
    for kind in model.down_block_types:
        if kind not in BLOCK_TYPES:
            raise UserError(f"config.model.down_block_types has {kind!r}; it takes {' and '.join(BLOCK_TYPES)}")
    for channels, heads in zip(model.block_out_channels, model.num_attention_heads, strict=True):
        if heads < 1 or channels % heads:
            raise UserError(f"config.model.num_attention_heads has {heads}; it must divide the {channels} channels")
