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
from m2m_jax.models.folder import config_from
from m2m_jax.models.frozen import FrozenModels, FrozenParams
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
      unet_params: of the network of `unet_config` (the EMA).
      models: the frozen models, whose parameters are `frozen`.
      clean_timestep: what the U-Net is told about context images, as in training.
      image_size: pixels along each side.
      step: training step of the parameters.
    """

    unet_config: UNetConfig
    unet_params: Params
    models: FrozenModels
    frozen: FrozenParams
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_timestep: int
    image_size: int
    step: int = 0

    def __post_init__(self):
        # Refuses a stepper that is none for this schedule, and more steps than there are noise levels.
        STEPPERS[self.settings.stepper].table(self.schedule, self.settings.steps)

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
        return cls(
            unet_config=config_from(UNetConfig, saved.metadata["unet"], {}),
            unet_params=saved.ema_params,
            models=FrozenModels.from_metadata(saved.metadata["frozen"]),
            frozen=saved.frozen,
            schedule=NoiseSchedule.from_config(config["schedule"]),
            settings=SamplingSettings(**(config["sample"] | settings)),
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
        position = context_bmhwc.shape[1]
        context = _context(self.models, self.frozen, context_bmhwc) if position else None
        finished_bnhwc = []
        for i in range(num_images):
            latents_b1hwc = _next_image(self._static, position + i, self.unet_params, context, keys_b)[:, None]
            finished_bnhwc.append(_decode(self.models, self.frozen, latents_b1hwc))
            if i + 1 < num_images:
                new = latents_b1hwc
                if self.unet_config.attends_to_encoded:
                    new = _context(self.models, self.frozen, finished_bnhwc[-1])
                context = new if context is None else jnp.concatenate([context, new], axis=1)
        return np.concatenate(finished_bnhwc, axis=1)

    @property
    def _static(self) -> "_Static":
        shape = self.models.latent_shape(self.image_size)
        return _Static(self.unet_config, shape, self.schedule, self.settings, self.clean_timestep)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_next_image` is compiled for."""

    unet_config: UNetConfig
    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_timestep: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_image(
    static: _Static, num_context: int, params: Params, context: jax.Array | None, keys_b: jax.Array
) -> jax.Array:
    """Latents of one further image of each set. Its noise depends on the set's key, its position and the step alone."""
    b, m, image = len(keys_b), num_context, static.latent_shape
    graphdef, _ = abstract(lambda: UNet(static.unet_config, rngs=nnx.Rngs(0)))
    unet = merge(graphdef, params)
    clean_sees, encoded = static.unet_config.clean_sees, static.unet_config.attends_to_encoded
    keys_b = jax.vmap(lambda key: jax.random.fold_in(key, m))(keys_b)
    noise_bhwc = jax.vmap(lambda key: jax.random.normal(key, image))(keys_b)

    def fresh_noise(number):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 + number), image))(keys_b)

    def predict(noised_bhwc, timestep, layout):
        timestep_b1 = jnp.full((b, 1), timestep)
        output_b1hwc = denoise_sets(
            unet,
            context if layout.clean else None,
            noised_bhwc[:, None],
            timestep_b1,
            layout,
            clean_timestep=static.clean_timestep,
        )
        return output_b1hwc[:, 0]

    def denoise(noised_bhwc, timestep):
        conditional = predict(noised_bhwc, timestep, SetLayout.sampling(m, clean_sees, encoded))
        if static.settings.guidance_scale == 1.0 or m == 0:
            return conditional
        unconditional = predict(noised_bhwc, timestep, SetLayout((), (m,), clean_sees, encoded))
        return guide(unconditional, conditional, static.settings.guidance_scale)

    stepper = STEPPERS[static.settings.stepper]
    return stepper.sample(static.schedule, static.settings.steps, denoise, noise_bhwc, fresh_noise)


@functools.partial(jax.jit, static_argnums=0)
def _context(models: FrozenModels, frozen: FrozenParams, images_bmhwc: jax.Array) -> jax.Array:
    return models.context(frozen, images_bmhwc)


@functools.partial(jax.jit, static_argnums=0)
def _decode(models: FrozenModels, frozen: FrozenParams, latents_bnhwc: jax.Array) -> jax.Array:
    return models.decode(frozen, latents_bnhwc)
