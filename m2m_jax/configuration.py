"""The configuration of a training run: every field with its default, its meaning and its limits.

A file in `configs/` starts from `default_config()` and changes what it must; the command line overrides
single fields (`--config.train.steps=100`). Fields that do not exist cannot be set: neither there nor here.
"""

from __future__ import annotations

import difflib
import math
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from m2m_jax.errors import UserError

# An image set has at most as many images as a record may hold (m2m_jax/data/records.py).
MAX_IMAGES_PER_SET = 25

MAX_NUMBER = 2**32 - 1  # of all fields; no field has use for more, and devices count no further

BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")

# Fields that hold one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("set_diffusion", "text_to_image", "autoencoder"),
    "data.name": ("emoji", "folder", "precomputed", "mis"),
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
    "optimizer.new_parameter_rate": (0.0, math.inf),
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


def default_config() -> ConfigDict:
    """Every field there is, locked: a name that is not here cannot be set."""
    config = ConfigDict()

    config.task = "set_diffusion"  # what is trained: set_diffusion | text_to_image | autoencoder
    config.seed = 0  # of the parameters, the order of the data and all noise

    config.data = ConfigDict()
    # emoji | folder | precomputed: latents, from m2m_jax.data.precompute | mis: sets made from captions, from
    # m2m_jax.data.build_mis
    config.data.name = "emoji"
    config.data.path = ""  # folder: the folder of folders of images; precomputed, mis: the --output of what made it
    config.data.latents = False  # read by mis: train on the latents that it holds, and not on its images
    config.data.directory = "data"  # where prepared data sets live (the TFDS data_dir)
    config.data.image_size = 32  # pixels a side
    config.data.images_per_set = 4  # 1 to 25
    config.data.batch_size = 16  # sets a step, all hosts together
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.kinds = ("style", "content")  # which kinds of emoji sets: rows of one style, of one content
    config.data.prefetch = 2  # batches made ahead in the background
    config.data.threads = 2  # that read and decode
    config.data.log_examples = False  # whether each process writes which sets it saw when, WORKDIR/examples
    config.data.on_error = "stop"  # a damaged record: stop | skip: another set in its place, always the same, counted
    config.data.caption_tag_dropout = 0.0  # read by task=text_to_image: of each of a caption's tags, which commas part
    # Augmentations are drawn once a set and shared by its images.
    config.data.augment = ConfigDict()
    config.data.augment.enabled = True
    config.data.augment.hue_degrees = 180.0  # the largest rotation of the hue, either way
    config.data.augment.ground_probability = 0.5  # of a coloured instead of a white ground
    config.data.augment.ink_probability = 0.5  # of black line art drawn in a dark colour instead
    config.data.augment.contrast = 0.2  # the largest relative change, either way
    config.data.augment.scale = 0.15  # the largest relative change: smaller on a ground, larger where there is none
    config.data.augment.mirror_probability = 0.5  # of left and right exchanged

    config.autoencoder = ConfigDict()
    config.autoencoder.path = "pretrained/vae"  # the frozen first stage: a folder in diffusers' layout
    # The rest is read by task=autoencoder only; a frozen one says in its folder what it is.
    config.autoencoder.block_out_channels = (32, 64, 64)
    config.autoencoder.layers_per_block = 1
    config.autoencoder.latent_channels = 4
    config.autoencoder.norm_num_groups = 16
    config.autoencoder.kl_weight = 1e-4  # of the divergence from a unit normal, beside the pixels' errors

    config.model = ConfigDict()  # the U-Net, in diffusers' words
    config.model.block_out_channels = (64, 128)
    config.model.layers_per_block = 1
    # CrossAttnDownBlock2D or, without attention, DownBlock2D; the way up mirrors the way down.
    config.model.down_block_types = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    config.model.num_attention_heads = (2, 4)  # a level
    config.model.transformer_layers_per_block = 1
    config.model.norm_num_groups = 16
    config.model.norm_eps = 1e-5
    config.model.use_linear_projection = True  # around the transformers: linear (2.x) or 1x1 convolution (1.x)
    # image_set | text: what task=text_to_image has | none: the single-image model has none
    config.model.attn2 = "image_set"
    config.model.order_embedding = False  # whether attn2 is told the positions of the images in their set
    config.model.clean_sees = "preceding"  # clean images see preceding: those up to itself | itself: only that
    # Within images and within sets. auto: what the platform runs best, see attention/backends.py: resolve. prefix:
    # plain XLA, no work on forbidden blocks | prefix_cudnn: its kernel for GPUs, in bfloat16 | splash: a kernel for
    # TPUs | dense: the reference
    config.model.attention_backend = "auto"
    config.model.remat = "none"  # computed again in the backward pass: none | dots: all but matmuls | blocks: all
    config.model.dtype = "float32"  # of the computation: float32 | bfloat16; parameters are always float32

    # M2M-DINO: preceding images enter as tokens of this frozen encoder. With an empty path M2M-Self: as latents.
    config.image_encoder = ConfigDict()
    config.image_encoder.path = ""  # a DINOv2 in transformers' layout
    config.image_encoder.image_size = 224  # pixels a side that it is shown; a multiple of its patches
    config.image_encoder.layer = -1  # tokens after so many of its blocks; -1: after all of them and the last norm

    config.text_encoder = ConfigDict()  # read by task=text_to_image
    config.text_encoder.path = ""  # a CLIP text encoder or a BERT in transformers' layout, its tokenizer beside it
    config.text_encoder.max_tokens = 77  # of a caption; longer ones are cut

    config.init = ConfigDict()
    config.init.path = "pretrained/unet"  # a U-Net in diffusers' layout to start from; empty: from scratch

    config.schedule = ConfigDict()  # noise levels, in the words of diffusers' scheduler_config.json
    config.schedule.num_train_timesteps = 1000
    # linear | scaled_linear | squaredcos_cap_v2, or rectified_flow: it has no betas and reads nothing but
    # num_train_timesteps, prediction_type (flow) and shift.
    config.schedule.beta_schedule = "squaredcos_cap_v2"
    config.schedule.beta_start = 0.00085  # not read by squaredcos_cap_v2
    config.schedule.beta_end = 0.012  # likewise
    config.schedule.rescale_betas_zero_snr = True  # end in pure noise, as sampling begins
    config.schedule.prediction_type = "v_prediction"  # epsilon | v_prediction | sample; of rectified_flow: flow
    config.schedule.timestep_spacing = "trailing"  # leading | linspace | trailing
    config.schedule.shift = 1.0  # read by rectified_flow: above 1 there are more levels of much noise

    config.diffusion = ConfigDict()  # the objective
    config.diffusion.loss_weight = "uniform"  # uniform | min_snr
    config.diffusion.min_snr_gamma = 5.0  # read by loss_weight=min_snr
    config.diffusion.context_dropout = 0.1  # of sets trained without any context (or caption), for guidance
    config.diffusion.clean_timestep = 0  # the timestep that the clean branch is told

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 3e-4  # after the warm-up; a cosine to zero over train.steps follows
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.01  # of kernels only
    config.optimizer.clip_norm = 1.0  # the largest global norm of the gradient
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.new_parameter_rate = 1.0  # multiplies the updates of what is not pretrained (attn2)

    config.train = ConfigDict()
    config.train.parameters = "all"  # which train: all | attention | set_attention
    config.train.steps = 10_000
    config.train.log_every = 20
    config.train.accumulation = 1  # parts of a batch that are computed one after another, to save memory
    # Where loss or gradient are not finite: stop | skip: leave out that step | rollback: to the last checkpoint, and on
    # with the batches after. No such step changes anything, whatever is chosen.
    config.train.on_nonfinite = "stop"
    config.train.ema_decay = 0.999  # reached by and by: min(ema_decay, (1 + step) / (10 + step))

    config.eval = ConfigDict()
    config.eval.every = 1_000  # steps between evaluations; the last step is evaluated in any case
    config.eval.batches = 4
    config.eval.batch_size = 16  # sets a batch, all hosts together; each is another's foreign context

    config.sample = ConfigDict()  # of the sample grids, and the sampler's defaults
    config.sample.steps = 25  # denoising steps an image
    # Deterministic: dpmpp_2m | unipc | ddim | euler | heun (rectified_flow only, twice the evaluations).
    # With fresh noise at every step: ddpm | euler_ancestral | dpmpp_2m_sde.
    config.sample.stepper = "dpmpp_2m"
    config.sample.guidance_scale = 1.5  # over the context; 1 is no guidance

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1_000  # steps between checkpoints; the last step is saved in any case
    config.checkpoint.keep = 2  # the newest so many stay on disk
    config.checkpoint.keep_every = 0  # steps: those of its multiples stay for ever; 0: none do
    config.checkpoint.keep_best = 1  # so many stay that their own evaluation found best
    config.checkpoint.fallback = False  # where the newest is damaged, go on from the newest whole one

    config.profile = ConfigDict()
    config.profile.steps = (0, 0)  # first and last step of a profiler trace, WORKDIR/profile; 0: none

    config.mesh = ConfigDict()  # devices along each axis; -1: all that are left
    config.mesh.slice = 1  # TPU slices, which only the data-centre network connects: copies of the parameters
    config.mesh.data = -1  # copies of the parameters
    config.mesh.fsdp = 1  # shares of every kernel, gathered when it is used
    config.mesh.tensor = 1  # shares of heads and channels
    config.mesh.context = 1  # shares of the rows of every image

    return config.lock()


def apply_preset(config: ConfigDict, preset: str, presets: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Sets the fields `{dotted name: value}` of `presets[preset]`; the preset '' changes nothing.

    Raises UserError for a preset that is not there.
    """
    if not preset:
        return config
    if preset not in presets:
        known = ", ".join(f":{name}" for name in presets)
        raise UserError(f"unknown preset {preset!r}{_nearest(preset, presets)}; this config has {known}")
    config.update_from_flattened_dict(dict(presets[preset]))
    return config


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value makes no run."""
    fields = _flatten(config)

    for name, default in _flatten(default_config()).items():
        _validate_type(name, fields[name], default)
    for name, choices in CHOICES.items():
        if fields[name] not in choices:
            raise UserError(f"config.{name} is {fields[name]!r}; it must be one of {', '.join(choices)}")
    for name, (low, high) in LIMITS.items():
        if not low <= fields[name] <= high:
            limits = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise UserError(f"config.{name} is {fields[name]}; it must be {limits}")

    if config.data.name != "emoji" and not config.data.path:
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
    if config.image_encoder.path and reads_latents(config.data):
        raise UserError(f"config.image_encoder.path is set; it encodes images, and {latents}")
    if config.task == "autoencoder":
        _validate_channels("autoencoder", config.autoencoder, config.data.image_size)
    else:
        _validate_channels("model", config.model, config.data.image_size)
        _validate_levels(config.model)


def reads_latents(data: ConfigDict) -> bool:
    """Whether batches hold latents in the place of images. data: the `data` part of a config."""
    return data.name == "precomputed" or data.latents


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


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as a dict that `json` can write: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping | ConfigDict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The locked config that `to_json` wrote; UserError where its fields are not today's fields."""
    config = default_config()
    if not isinstance(values, Mapping):
        raise UserError(f"a config is a group of fields, not {values!r:.60}")
    fields, given = _flatten(config), _flatten(values)
    strange = sorted(set(given) ^ set(fields))
    if strange:
        raise UserError(
            f"a config of another version: {', '.join(strange)} {'is' if len(strange) == 1 else 'are'} "
            "in only one of it and m2m_jax.configuration"
        )
    lists = {name for name, value in fields.items() if isinstance(value, tuple)}
    try:
        config.update_from_flattened_dict({k: tuple(v) if k in lists else v for k, v in given.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"a config that is damaged: {error}") from error
    return config


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines `--config=FILE[:PRESET]` and its overrides; `check_arguments` says what is wrong with them."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file and preset: configs/emoji.py:demo", lock_config=True, flag_values=flag_values
    )


def check_arguments(argv: Sequence[str]) -> None:
    """Raises UserError for a config file, a preset or a field that does not exist.

    For `run_program(main, check_arguments)`: ml_collections reports these three with tracebacks, so they are
    looked for before it reads the command line.
    """
    where = next((i for i, argument in enumerate(argv) if re.match(r"--?config(=|$)", argument)), None)
    if where is None:
        raise UserError("no config; name one, for example --config=configs/emoji.py:demo")
    value = argv[where].partition("=")[2] if "=" in argv[where] else "".join(argv[where + 1 : where + 2])
    path, _, preset = value.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path!r}; name one, for example --config=configs/emoji.py:demo")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"{path} is no config file: it has no get_config")
    fields = _flatten(get_config(preset))

    for argument in argv:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in fields:
            if any(name.startswith(match[2] + ".") for name in fields):
                raise UserError(f"config.{match[2]} is a group of fields; set one, as --config.{match[2]}.NAME=VALUE")
            raise UserError(f"unknown config field config.{match[2]}{_nearest(match[2], fields, 'config.')}")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of the leaves of nested mappings."""
    fields = {}
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= _flatten(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """'; did you mean X?', or nothing where no name is near."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, 1, 0.6)
    # A field put into the wrong group (config.steps) is near to no whole name, but its last part is one.
    matches = matches or [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
