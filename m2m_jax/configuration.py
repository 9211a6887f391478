"""The configuration of a training run: every field with its default and its meaning. `config_rules.py` has the limits.

A file in `configs/` starts from `default_config()` and changes what it must; the command line overrides
single fields (`--config.train.steps=100`). Fields that do not exist cannot be set: neither there nor here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from m2m_jax.errors import UserError


def default_config() -> ConfigDict:
    """Every field there is, locked: a name that is not here cannot be set."""
    config = ConfigDict()

    config.task = "set_diffusion"  # what is trained: set_diffusion | text_to_image | autoencoder
    config.seed = 0  # of the parameters, the order of the data and all noise

    config.data = ConfigDict()
    # emoji | emoji_hands: drawn by ten hands, some of which never train | folder: of folders of images | precomputed:
    # latents, from m2m_jax.data.precompute | mis: sets made from captions, from m2m_jax.data.build_mis
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
    # Of the distance by ST-LPIPS, likewise; read where there is a folder of m2m_jax.data.prepare_stlpips.
    config.autoencoder.perceptual_path = ""
    config.autoencoder.perceptual_weight = 0.5
    config.autoencoder.perceptual_slices = 3  # of five of that network; the first see detail, and cost the least
    config.autoencoder.perceptual_share = 0.125  # of each batch that is compared so: it costs more than the autoencoder

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
    config.text_encoder.path = ""  # a CLIP text encoder or a BERT in transformers' layout, with its tokenizer
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
    config.optimizer.attn2_rate = 1.0  # multiplies the updates of attn2, which is new where the rest is pretrained

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
    config.mesh.slice = 1  # TPU slices, which only the data-centre network connects (or nodes of GPUs): copies of all
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
        raise UserError(f"unknown preset {preset!r}{nearest(preset, presets)}; this config has {known}")
    config.update_from_flattened_dict(dict(presets[preset]))
    return config


def reads_latents(data: ConfigDict) -> bool:
    """Whether batches hold latents, for which no step runs the autoencoder. data: the `data` part of a config."""
    return data.name == "precomputed" or data.latents


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
    fields, given = flatten(config), flatten(values)
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


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of the leaves of nested mappings."""
    fields = {}
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= flatten(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """'; did you mean X?', or nothing where no name is near. prefix: of X."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, 1, 0.6)
    # A field put into the wrong group (config.steps) is near to no whole name, but its last part is one.
    matches = matches or [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
