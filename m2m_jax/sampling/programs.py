"""What sampling consists of, as pure functions of parameters: what is compiled, and what is exported.

One loop denoises every image, whatever it is conditioned on (`Programs.walk`): the steps are a table, and so are the
branches of guidance that each step evaluates. Around it stand, for image sets, the programs that keep finished images
(`SetSampler` calls them one after another), and for captions `sampling/text_to_image.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Domain, domain_key
from m2m_jax.core.parameters import Params, merge
from m2m_jax.diffusion.guidance import GuidanceTable, guide
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import StepTable
from m2m_jax.diffusion.steppers import Carry, advance, begin
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.context_cache import ContextCache, Text, append_image, denoise_next, empty_cache
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.unet import UNet, unet_structure
from m2m_jax.models.unet_config import UNetConfig
from m2m_jax.sampling.set_sampler import PROGRAMS
from m2m_jax.sampling.settings import SamplingSettings

UNET = "unet"
# {UNET: {name: array}, and each frozen model likewise}.
AllParams = dict[str, Params]
NO_GLOBALS: Mapping[str, jax.Array] = MappingProxyType({})
INITIAL, FRESH, CONTEXT = range(3)  # what an image's key is split for


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one model, schedule and settings: none of it changes as a set grows. Static and hashable.

    Attributes:
      unet_config: of the network.
      models: the frozen models.
      schedule: what the network's output means.
      settings: stepper, guidance and cache.
      image_size: pixels along each side.
      clean_timestep: what the U-Net is told about context images, as in training.

    Example:
        programs = Programs(unet_config, models, schedule, SamplingSettings(), image_size=32)
        cache = programs.empty_cache(params, seed_b, size=4)
        carry = programs.begin(params, cache, seed_b)
        carry = programs.denoise(params, cache, seed_b, carry, 0, len(programs.table.timestep))
        images_bhwc = programs.decode(params, carry["x"])
    """

    unet_config: UNetConfig
    models: FrozenModels
    schedule: NoiseSchedule
    settings: SamplingSettings
    image_size: int
    clean_timestep: int = 0

    def __post_init__(self):
        levels = self.levels  # which refuses steppers that are none for this schedule, and too many steps
        if self.unet_config.attends_to_encoded and levels != (0.0,):
            raise UserError(
                f"guidance {self.settings.guidance!r} adds noise to context images, and this model reads them through "
                "an image encoder, which knows clean ones alone: choose another guidance"
            )

    @property
    def table(self) -> StepTable:
        """The steps of one image. UserError: the stepper is none for this schedule, or has too many steps for it."""
        return self.settings.step_table(self.schedule)

    @property
    def guidance(self) -> GuidanceTable:
        """Branches and weights of each step, as far as the network tells them apart."""
        table = self.settings.guidance_table(self.table.timestep / self.schedule.num_train_timesteps)
        attentions = self.unet_config.attentions
        return table.reduce(reads_images="set" in attentions, reads_text="text" in attentions)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels at which finished images are kept: of all branches, 0 first."""
        return tuple(sorted({0.0, *(branch.level for branch in self.guidance.branches)}))

    # Any image

    def start(self, key_b: jax.Array) -> Carry:
        """Return the state of images before the first step. key_b: keys of their own."""
        return begin(self.table, self._noise(_part(key_b, INITIAL)))

    def walk(
        self,
        params: AllParams,
        key_b: jax.Array,
        carry: Carry,
        first: jax.Array | int,
        end: jax.Array | int,
        *,
        cache: ContextCache | None = None,
        text: Text | None = None,
        globals_bc: Mapping[str, jax.Array] = NO_GLOBALS,
    ) -> Carry:
        """Take the steps from row `first` of the table to before row `end`.

        Args:
          key_b: as in `start`.
          carry: of `start`, or of the rows before.
          cache: finished images of each set, where the network attends to sets.
          text: tokens, where it attends to text.
          globals_bc: {global embedding: value of each image}, where it has such.

        Returns:
          "x" is the image so far, "previous" the clean image that the network predicted last; latents [b, h, w, c].
        """
        unet, guidance, levels = self._unet(params), self.guidance, self.levels
        told: dict[str, Any] = {"cache": cache, "levels": levels, "text": text, "globals_bc": globals_bc}
        fresh_b = _part(key_b, FRESH)

        def network(noised_bhwc: jax.Array, timestep: jax.Array, row: jax.Array) -> jax.Array:
            def evaluate(branches):
                return denoise_next(unet, noised_bhwc, timestep, branches, **told)

            return guide(guidance, evaluate, row, rescale=self.settings.guidance_rescale)

        def fresh_noise(row: jax.Array) -> jax.Array:
            return self._noise(jax.vmap(lambda key: jax.random.fold_in(key, row))(fresh_b))

        return advance(self.schedule, self.table, network, carry, fresh_noise, first, end)

    def decode(self, params: AllParams, latents_bhwc: jax.Array) -> jax.Array:
        """Return uint8 images [b, image_size, image_size, 3]."""
        return self.models.decode(params, latents_bhwc)

    # Image sets

    def empty_cache(self, params: AllParams, seed_b: jax.Array, size: int | None = None) -> ContextCache:
        """Return a cache without images for as many sets as there are seeds. size: images of a set that fit in."""
        images = jax.ShapeDtypeStruct((seed_b.shape[0], self.image_size, self.image_size, 3), jnp.uint8)
        image = jax.eval_shape(self.encode, params, images)
        size, dtype = size or self.settings.cache_size, self.settings.cache_dtype
        told = Conditioning(globals=self.global_shapes(seed_b.shape[0]))
        return empty_cache(self._unet(params), image, size, dtype, told, levels=len(self.levels))

    def global_shapes(self, b: Any) -> dict[str, Any]:
        """Return {global embedding: ShapeDtypeStruct of its values} of an image of b sets, a number or a symbol."""
        widths = self.unet_config.global_widths
        return {name: jax.ShapeDtypeStruct((b, width), jnp.float32) for name, width in widths.items()}

    def encode(self, params: AllParams, images_bhwc: jax.Array) -> jax.Array:
        """Return what the cache is given of uint8 images: latents [b, h, w, c] or tokens [b, s, c]."""
        return self.models.context(params, images_bhwc[:, None])[:, 0]

    def append(
        self,
        params: AllParams,
        cache: ContextCache,
        seed_b: jax.Array,
        image: jax.Array,
        append_b: jax.Array,
        globals_bc: Mapping[str, jax.Array] = NO_GLOBALS,
    ) -> ContextCache:
        """Return the cache with one more image of the sets marked in `append_b`, at each level.

        globals_bc: {global embedding: value of that image of each set}, where the network has such.
        """
        noised = []
        key_b = _part(_keys(cache, seed_b), CONTEXT)
        for number, level in enumerate(self.levels[1:]):
            timestep = min(round(level * self.schedule.num_train_timesteps), self.schedule.num_train_timesteps - 1)
            noise = self._noise(jax.vmap(lambda key, number=number: jax.random.fold_in(key, number))(key_b))
            noised.append((self.schedule.add_noise(image, noise, jnp.full(image.shape[0], timestep)), timestep))
        return append_image(
            self._unet(params),
            cache,
            image,
            clean_timestep=self.clean_timestep,
            append_b=append_b,
            slide=self.settings.slide,
            conditioning=Conditioning(globals=globals_bc),
            noised=noised,
        )

    def begin(self, params: AllParams, cache: ContextCache, seed_b: jax.Array) -> Carry:
        """Return noise for the next image of each set: of the set's seed and the image's position, and nothing else."""
        return self.start(_keys(cache, seed_b))

    def denoise(
        self,
        params: AllParams,
        cache: ContextCache,
        seed_b: jax.Array,
        carry: Carry,
        first: jax.Array,
        end: jax.Array,
        globals_bc: Mapping[str, jax.Array] = NO_GLOBALS,
    ) -> Carry:
        """Take steps of the next image of each set; see `walk`."""
        return self.walk(params, _keys(cache, seed_b), carry, first, end, cache=cache, globals_bc=globals_bc)

    def _noise(self, key_b: jax.Array) -> jax.Array:
        """Standard normal latents [b, h, w, c]."""
        shape = self.models.latent_shape(self.image_size)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(key_b)

    def _unet(self, params: AllParams) -> UNet:
        return merge(unet_structure(self.unet_config)[0], params[UNET])


@functools.cache
def compiled(programs: Programs, mesh: Mesh) -> dict[str, jax.stages.Wrapped]:
    """Return {name in `PROGRAMS`: the compiled method}, once for all samplers that are alike.

    Sets are split over the devices of `mesh`, each of which runs a program by itself: nothing is sent. (Left to XLA,
    they exchange the branches of guidance in every layer.)
    """
    shared, split = PartitionSpec(), PartitionSpec("data")

    def of(name: str) -> jax.stages.Wrapped:
        def run(params, *arguments, **static):
            by_set = jax.tree.map(lambda x: split if jnp.ndim(x) else shared, arguments)
            # Loops begin with zeros, which vary between devices only from the second round on: not checked.
            share = functools.partial(jax.shard_map, mesh=mesh, out_specs=split, check_vma=False)
            method = functools.partial(getattr(programs, name), **static)
            return share(method, in_specs=(shared, *by_set))(params, *arguments)

        # The cache is the one thing that is large and handed on.
        return jax.jit(run, static_argnames="size", donate_argnums=1 if name == "append" else ())

    return {name: of(name) for name in PROGRAMS}


def _keys(cache: ContextCache, seed_b: jax.Array) -> jax.Array:
    """Return the key of each set's next image."""

    def key(seed, position):
        return jax.random.fold_in(domain_key(Domain.SAMPLE_SETS, seed), position)

    return jax.vmap(key)(seed_b, cache.position_b)


def _part(key_b: jax.Array, use: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.split(key, 3)[use])(key_b)
