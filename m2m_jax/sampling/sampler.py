"""The sampler as a value: context images in, further images of the same set out, one after another."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from m2m_jax.attention.layout import SetLayout
from m2m_jax.diffusion.guidance import guide
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError
from m2m_jax.images import read_image
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.parameters import Params, abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn; static.

    Attributes:
      steps: network evaluations an image (two each where `guidance_scale` is not 1).
      stepper: a name in `STEPPERS`.
      guidance_scale: over the context; 1 is none.
    """

    steps: int = 25
    stepper: str = "dpmpp_2m"
    guidance_scale: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling needs at least one step, not {self.steps}")
        if self.stepper not in STEPPERS:
            raise UserError(f"stepper must be one of {', '.join(STEPPERS)}, not {self.stepper!r}")
        if not 0.0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale must be a number of at least 0, not {self.guidance_scale}")


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Model, schedule and settings. Call it, or `sample_sets` for many sets at once.

    Attributes:
      unet: its static structure, with `unet_params` (the EMA).
      autoencoder: likewise.
      clean_timestep: what the U-Net is told about context images, as in training.
      image_size: pixels along each side.
      step: training step of the parameters.
    """

    unet: nnx.GraphDef
    unet_params: Params
    autoencoder: nnx.GraphDef
    autoencoder_params: Params
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_sees: str
    clean_timestep: int
    image_size: int
    step: int = 0

    def __post_init__(self):
        self.schedule.inference_timesteps(self.settings.steps)  # refuses more steps than there are noise levels

    @classmethod
    def from_checkpoint(cls, path: str | Path, step: int | None = None, **settings) -> "Sampler":
        """Restores the EMA of a training run, and nothing else of it.

        Args:
          path: a workdir of `m2m_jax.train`, or its checkpoint folder.
          step: which checkpoint; the latest if None.
          **settings: replace fields of `SamplingSettings` that the run's config chose.

        Raises:
          UserError: no whole checkpoint of an M2M model there.
        """
        from m2m_jax.training.checkpoint import load_for_sampling  # Orbax is slow to import

        saved = load_for_sampling(path, step)
        if saved.metadata["config"]["task"] != "set_diffusion":
            raise UserError(f"{path} holds a run of task {saved.metadata['config']['task']!r}, which samples no sets")
        config = saved.metadata["config"]
        autoencoder_config = AutoencoderConfig(**_tuples(saved.metadata["autoencoder"]))
        unet_config = UNetConfig(
            in_channels=autoencoder_config.latent_channels,
            out_channels=autoencoder_config.latent_channels,
            **_tuples(config["model"]),
        )
        return cls(
            unet=abstract(lambda: UNet(unet_config, rngs=nnx.Rngs(0)))[0],
            unet_params=saved.ema_params,
            autoencoder=abstract(lambda: AutoencoderKL(autoencoder_config, rngs=nnx.Rngs(0)))[0],
            autoencoder_params=saved.autoencoder_params,
            schedule=NoiseSchedule.from_config(config["schedule"]),
            settings=SamplingSettings(**(config["sample"] | settings)),
            clean_sees=unet_config.clean_sees,
            clean_timestep=config["diffusion"]["clean_timestep"],
            image_size=config["data"]["image_size"],
            step=saved.step,
        )

    def __call__(
        self, context_images: Sequence[np.ndarray | Image.Image | str | Path], num_images: int, seed: int = 0
    ) -> np.ndarray:
        """Generates images that belong with the context images, each in the context of all before it.

        Args:
          context_images: any number, also none: file names, PIL images or uint8 arrays [h, w, 3].
          num_images: how many to generate.
          seed: the same seed gives the same images.

        Returns:
          uint8 [num_images, image_size, image_size, 3].

        Raises:
          UserError: `num_images` is not positive, or an image can't be read.
        """
        return self.sample_sets(self.read(context_images)[None], num_images, np.array([seed]))[0]

    def read(self, images: Sequence[np.ndarray | Image.Image | str | Path]) -> np.ndarray:
        """The images that `__call__` takes as it sees them: uint8 [m, image_size, image_size, 3], on white."""
        pixels = [read_image(image, self.image_size) for image in images]
        return np.asarray(pixels, np.uint8).reshape(len(pixels), self.image_size, self.image_size, 3)

    def sample_sets(self, context_bmhwc: np.ndarray, num_images: int, seed_b: np.ndarray) -> np.ndarray:
        """`__call__` for b sets at once, each with m context images and a seed of its own.

        Args:
          context_bmhwc: uint8 [b, m, image_size, image_size, 3].

        Returns:
          uint8 [b, num_images, image_size, image_size, 3].
        """
        if num_images < 1:
            raise UserError(f"num_images must be at least 1, not {num_images}")
        for seed in np.asarray(seed_b).tolist():
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"a seed must be between 0 and {MAX_SEED}, not {seed}")
        keys_b = jax.vmap(jax.random.key)(jnp.asarray(seed_b, jnp.uint32))
        context_bmhwc = self.encode(context_bmhwc)
        finished_bhwc = []
        for _ in range(num_images):
            latents_bhwc = _next_image(self._static, self.unet_params, context_bmhwc, keys_b)
            context_bmhwc = jnp.concatenate([context_bmhwc, latents_bhwc[:, None]], axis=1)
            finished_bhwc.append(latents_bhwc)
        return self.decode(jnp.stack(finished_bhwc, axis=1))

    def encode(self, images_bnhwc: np.ndarray) -> jax.Array:
        """uint8 images to scaled latents."""
        return _encode(self.autoencoder, self.autoencoder_params, images_bnhwc)

    def decode(self, latents_bnhwc: jax.Array) -> np.ndarray:
        """Scaled latents to uint8 images."""
        return np.asarray(_decode(self.autoencoder, self.autoencoder_params, latents_bnhwc))

    @property
    def _static(self) -> "_Static":
        return _Static(self.unet, self.schedule, self.settings, self.clean_sees, self.clean_timestep)


def pixels_to_float(images_uint8: jax.Array) -> jax.Array:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images_uint8.astype(jnp.float32) / 127.5 - 1.0


def pixels_to_uint8(images: jax.Array) -> jax.Array:
    """float32 [-1, 1], clipped, to uint8 [0, 255]."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_next_image` is compiled for."""

    unet: nnx.GraphDef
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_sees: str
    clean_timestep: int


@functools.partial(jax.jit, static_argnums=0)
def _next_image(static: _Static, params: Params, context_bmhwc: jax.Array, keys_b: jax.Array) -> jax.Array:
    """Latents of one further image of each set. Its noise depends on the set's key and its position alone."""
    b, m, *image = context_bmhwc.shape
    unet = merge(static.unet, params)
    noise_bhwc = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, m), image))(keys_b)

    def predict(noised_bhwc, timestep, layout):
        timestep_b1 = jnp.full((b, 1), timestep)
        context = context_bmhwc if layout.clean else None
        output_b1hwc = denoise_sets(
            unet, context, noised_bhwc[:, None], timestep_b1, layout, clean_timestep=static.clean_timestep
        )
        return output_b1hwc[:, 0]

    def denoise(noised_bhwc, timestep):
        conditional = predict(noised_bhwc, timestep, SetLayout.sampling(m, static.clean_sees))
        if static.settings.guidance_scale == 1.0 or m == 0:
            return conditional
        unconditional = predict(noised_bhwc, timestep, SetLayout((), (m,), static.clean_sees))
        return guide(unconditional, conditional, static.settings.guidance_scale)

    stepper = STEPPERS[static.settings.stepper]
    return stepper.sample(static.schedule, static.settings.steps, denoise, noise_bhwc)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: Params, images_bnhwc: jax.Array) -> jax.Array:
    b, n, h, w, _ = images_bnhwc.shape
    autoencoder = merge(graphdef, params)
    if n == 0:
        factor = autoencoder.config.downsampling
        return jnp.zeros((b, 0, h // factor, w // factor, autoencoder.config.latent_channels))
    return autoencoder.encode(pixels_to_float(images_bnhwc))


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef, params: Params, latents_bnhwc: jax.Array) -> jax.Array:
    return pixels_to_uint8(merge(graphdef, params).decode(latents_bnhwc))


def _tuples(values: dict) -> dict:
    """JSON has lists where the configs have tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
