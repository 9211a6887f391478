"""The programs that sampling consists of, as pure functions of parameters: what is compiled, and what is exported."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from m2m_jax.core.parameters import Params, merge
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.steppers import STEPPERS, Carry, StepTable, advance, begin
from m2m_jax.models.context_cache import ContextCache, append_image, denoise_next, empty_cache
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.unet import UNet, UNetConfig, unet_structure
from m2m_jax.sampling.set_sampler import PROGRAMS
from m2m_jax.sampling.settings import SamplingSettings

UNET = "unet"
# {UNET: {name: array}, and each frozen model likewise}.
AllParams = dict[str, Params]


@dataclasses.dataclass(frozen=True)
class Programs:
    """What they are compiled for: none of it changes as a set grows. Static and hashable.

    Attributes:
      models: the frozen models.
      clean_timestep: what the U-Net is told about context images, as in training.
      image_size: pixels along each side.
    """

    unet_config: UNetConfig
    models: FrozenModels
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_timestep: int
    image_size: int

    @property
    def table(self) -> StepTable:
        """The steps of one image. UserError: the stepper is none for this schedule, or has too many steps for it."""
        return STEPPERS[self.settings.stepper](self.schedule, self.settings.steps)

    def empty_cache(self, params: AllParams, seed_b: jax.Array) -> ContextCache:
        """A cache without images for as many sets as there are seeds."""
        images = jax.ShapeDtypeStruct((seed_b.shape[0], self.image_size, self.image_size, 3), jnp.uint8)
        image = jax.eval_shape(self.encode, params, images)
        return empty_cache(self._unet(params), image, self.settings.cache_size, self.settings.cache_dtype)

    def encode(self, params: AllParams, images_bhwc: jax.Array) -> jax.Array:
        """What the cache is given of uint8 images: latents [b, h, w, c] or tokens [b, s, c]."""
        return self.models.context(params, images_bhwc[:, None])[:, 0]

    def append(self, params: AllParams, cache: ContextCache, image: jax.Array, append_b: jax.Array) -> ContextCache:
        """The cache with one more image of the sets marked in `append_b`."""
        unet, slide = self._unet(params), self.settings.slide
        return append_image(unet, cache, image, clean_timestep=self.clean_timestep, append_b=append_b, slide=slide)

    def begin(self, params: AllParams, cache: ContextCache, seed_b: jax.Array) -> Carry:
        """Noise for the next image of each set: of the set's seed and the image's position, and nothing else."""
        shape = self.models.latent_shape(self.image_size)
        return begin(self.table, jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(cache, seed_b)))

    def denoise(
        self, params: AllParams, cache: ContextCache, seed_b: jax.Array, carry: Carry, first: jax.Array, end: jax.Array
    ) -> Carry:
        """The rows of the table from `first` to before `end`. "x" is the image so far, "previous" the clean image that
        the network predicted last; latents [b, h, w, c]."""
        unet, guidance, keys_b = self._unet(params), self.settings.guidance, _keys(cache, seed_b)
        shape = self.models.latent_shape(self.image_size)

        def fresh_noise(number):
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 + number), shape))(keys_b)

        def network(noised_bhwc, timestep):
            outputs = denoise_next(unet, cache, noised_bhwc, timestep, guided=guidance.guides)
            return guidance(*outputs, timestep / self.schedule.num_train_timesteps) if guidance.guides else outputs[0]

        return advance(self.schedule, self.table, network, carry, fresh_noise, first, end)

    def decode(self, params: AllParams, latents_bhwc: jax.Array) -> jax.Array:
        """uint8 images [b, image_size, image_size, 3]."""
        return self.models.decode(params, latents_bhwc)

    def _unet(self, params: AllParams) -> UNet:
        return merge(unet_structure(self.unet_config)[0], params[UNET])


COMPILED = {
    # The cache is the one thing that is large and handed on.
    name: jax.jit(getattr(Programs, name), static_argnums=0, donate_argnames="cache" if name == "append" else None)
    for name in PROGRAMS
}


def _keys(cache: ContextCache, seed_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed_b, cache.position_b)
