"""What it takes to build image sets from captions (`m2m_jax.data.build_mis`), by formula: nothing here is compiled.

FLOPs are XLA's count, before it optimises anything, for the U-Net of a config with text attention and for its decoder.
How much of a chip's peak a generator reaches is assumed, and not known here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from m2m_jax.configuration import Config, build
from m2m_jax.core.chips import chip_of, gpus_of
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, merge
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import STEPPERS
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.unet import UNetConfig, unet_structure
from m2m_jax.training.workload import frozen_models

TEXT_TOKENS, TEXT_WIDTH = 77, 1024  # Stable Diffusion 2.x's; they are a hundredth of the FLOPs
LATENT_BYTES = 2  # float16
# Of seven photographs, the means; docs/mis.md.
WEBP_BITS_A_PIXEL = {"WebP of quality 90": 1.77, "lossless WebP": 10.4}


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What a build takes.

    Attributes:
      evaluations: of the U-Net, an image; with guidance two a step.
      unet_flops, decoder_flops: of one evaluation, and of one image.
      mfu: share of the peak in bfloat16 that is assumed.
      bytes: {what is stored: of the whole build}.
    """

    captions: int
    images_per_set: int
    image_size: int
    evaluations: int
    unet_flops: float
    decoder_flops: float
    chips: int
    peak_flops: float
    mfu: float
    bytes: dict[str, float]
    notes: tuple[str, ...]

    @property
    def image_flops(self) -> float:
        return self.evaluations * self.unet_flops + self.decoder_flops

    @property
    def images_per_second(self) -> float:
        """Return the rate of all chips together."""
        return self.chips * self.peak_flops * self.mfu / self.image_flops

    @property
    def hours(self) -> float:
        return self.captions * self.images_per_set / self.images_per_second / 3600


def plan_build(config: Config, topology: str, slices: int, captions: int, mfu: float) -> BuildPlan:
    """Return the plan of a build with the U-Net, autoencoder, image size, set size, steps and guidance of `config`.

    Raises UserError for a topology that is none, or a share of the peak that cannot be.
    """
    if not 0.0 < mfu <= 1.0:
        raise UserError(f"--mfu={mfu}: must be above 0 and at most 1")
    chips, peak_flops = _chips(topology)
    models, notes = frozen_models(config)
    size, images = config.data.image_size, config.data.images_per_set
    latent_shape = models.latent_shape(size)
    schedule = NoiseSchedule.from_config(vars(config.schedule))
    steps = len(STEPPERS[config.sample.stepper](schedule, config.sample.steps).timestep)
    # An accelerator's client counts nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        unet_flops = _unet_flops(config, models, latent_shape)
        decoder_flops = _decoder_flops(models, latent_shape)
    stored: dict[str, float] = {"latents, float16": math.prod(latent_shape) * LATENT_BYTES}
    stored |= {name: bits * size**2 / 8 for name, bits in WEBP_BITS_A_PIXEL.items()}
    return BuildPlan(
        captions=captions,
        images_per_set=images,
        image_size=size,
        evaluations=steps * (1 if config.sample.guidance_scale == 1 else 2),
        unet_flops=unet_flops,
        decoder_flops=decoder_flops,
        chips=chips * slices,
        peak_flops=peak_flops,
        mfu=mfu,
        bytes={name: captions * images * size for name, size in stored.items()},
        notes=(*notes, f"text of {TEXT_TOKENS} tokens of width {TEXT_WIDTH} is assumed"),
    )


def build_as_text(plan: BuildPlan, topology: str) -> str:
    """Return a plan to be read."""
    images = plan.captions * plan.images_per_set
    lines = [
        f"{topology}: {plan.chips} chips; {plan.captions:,} captions x {plan.images_per_set} images of "
        f"{plan.image_size} px; by formula, at {plan.mfu:.0%} of the peak",
        *(f"  note: {note}" for note in plan.notes),
        "FLOPs of an image",
        f"  {'U-Net, once':<24} {plan.unet_flops / 1e12:12.3f} T",
        f"  {'times':<24} {plan.evaluations:12d}",
        f"  {'decoder':<24} {plan.decoder_flops / 1e12:12.3f} T",
        f"  {'together':<24} {plan.image_flops / 1e12:12.1f} T",
        "time",
        f"  {'images a second':<24} {plan.images_per_second:12.1f}, {plan.images_per_second / plan.chips:.2f} a chip",
        f"  {'chip-hours':<24} {plan.hours * plan.chips:12,.0f}",
        f"  {'days':<24} {plan.hours / 24:12.1f}",
        "storage",
    ]
    lines += [
        f"  {name:<24} {size / 1e12:12.2f} TB, {size / images / 1e3:.1f} kB an image"
        for name, size in plan.bytes.items()
    ]
    return "\n".join(lines)


def _chips(topology: str) -> tuple[int, float]:
    """Return how many chips there are, and the peak of each."""
    if gpus := gpus_of(topology):
        return gpus[1], gpus[0].flops
    chip, shape = chip_of(topology), topology.partition(":")[2].split("x")
    if not all(side.isdecimal() and int(side) for side in shape):
        raise UserError(f"--topology={topology}: say how many chips along each side, for example v5e:16x16")
    return math.prod(map(int, shape)), chip.flops


def _unet_flops(config: Config, models: FrozenModels, latent_shape: tuple[int, int, int]) -> float:
    channels = latent_shape[-1]
    fields = {"attentions": ("self", "text"), "remat": "none", "attention_backend": "prefix", "order_embedding": False}
    unet_config = build(
        UNetConfig,
        config.model,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=TEXT_WIDTH,
        **fields,
    )
    unet, shapes = unet_structure(unet_config)

    def evaluate(params: Params, *inputs: jax.Array) -> jax.Array:
        x_bhwc, timestep_b, text_bsc = inputs
        return merge(unet, params)(x_bhwc, timestep_b, Conditioning(text_bsc=text_bsc))[0]

    return _flops(evaluate, shapes, (1, *latent_shape), (1,), (1, TEXT_TOKENS, TEXT_WIDTH))


def _decoder_flops(models: FrozenModels, latent_shape: tuple[int, int, int]) -> float:
    return _flops(models.decode, models.shapes, (1, 1, *latent_shape))


def _flops(function, params: dict, *shapes: tuple[int, ...]) -> float:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cost: Any = jax.jit(function).lower(params, *inputs).cost_analysis()
    return cost["flops"]
