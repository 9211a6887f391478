"""The sampler as a value: context images in, further images of the same set out, one after another."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from m2m_jax.diffusion.guidance import Guidance
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError
from m2m_jax.images import read_image
from m2m_jax.models.context_cache import ContextCache, append_image, denoise_next, empty_cache
from m2m_jax.models.folder import config_from
from m2m_jax.models.frozen import FrozenModels, FrozenParams
from m2m_jax.models.parameters import Params, abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig

MAX_SEED = 2**32 - 1
CACHE_DTYPES = ("float32", "bfloat16")
ContextImage = np.ndarray | Image.Image | str | Path


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn; static.

    Attributes:
      steps: of the stepper, an image.
      stepper: a name in `STEPPERS`.
      guidance_scale, guidance_interval, guidance_rescale, guidance_schedule: over the context; see `Guidance`.
      cache_size: context images of a set that can be kept, given and generated together.
      cache_dtype: what their keys and values are kept in: "float32" is exact, "bfloat16" half the memory.
      slide: in a set that outgrows the cache, the oldest image makes room: an approximation. Without it such a set is
        refused.
    """

    steps: int = 25
    stepper: str = "dpmpp_2m"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    guidance_schedule: str = "constant"
    cache_size: int = 25
    cache_dtype: str = "float32"
    slide: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling needs at least one step, not {self.steps}")
        if self.stepper not in STEPPERS:
            raise UserError(f"stepper must be one of {', '.join(STEPPERS)}, not {self.stepper!r}")
        if self.cache_size < 1:
            raise UserError(f"cache_size must be at least 1, not {self.cache_size}")
        if self.cache_dtype not in CACHE_DTYPES:
            raise UserError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        self.guidance  # noqa: B018 (refuses bad ones)

    @property
    def guidance(self) -> Guidance:
        """Over the context."""
        return Guidance(
            self.guidance_scale, tuple(self.guidance_interval), self.guidance_rescale, self.guidance_schedule
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Model, schedule and settings. Call it, `stream` from it, or `sample_sets` for many sets at once.

    An image of a set depends on the set's context and seed and on its position, and not on the other sets of a batch.

    Attributes:
      unet_params: of the network of `unet_config` (the EMA).
      models: the frozen models, whose parameters are `frozen`.
      clean_timestep: what the U-Net is told about context images, as in training.
      image_size: pixels along each side.
      step: training step of the parameters.
      devices: that share the sets of a batch; None: JAX's first.
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
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self):
        # Refuses a stepper that is none for this schedule, and more steps than there are noise levels.
        STEPPERS[self.settings.stepper].table(self.schedule, self.settings.steps)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, step: int | None = None, devices: tuple[jax.Device, ...] | None = None, **settings
    ) -> "Sampler":
        """Restores the EMA of a training run, and nothing else of it.

        Args:
          path: a workdir of `m2m_jax.train`, or its checkpoint folder.
          step: which checkpoint; the latest if None.
          devices: see the attribute.
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
            settings=config_from(SamplingSettings, config["sample"], {}, **settings),
            clean_timestep=config["diffusion"]["clean_timestep"],
            image_size=config["data"]["image_size"],
            step=saved.step,
            devices=devices,
        )

    def __call__(self, context_images: Sequence[ContextImage], num_images: int, seed: int = 0) -> np.ndarray:
        """Generates images that belong with the context images, each in the context of all before it.

        Args:
          context_images: any number, also none: file names, PIL images or uint8 arrays [h, w, 3].
          num_images: how many to generate.
          seed: the same seed gives the same images.

        Returns:
          uint8 [num_images, image_size, image_size, 3].

        Raises:
          UserError: `num_images` is not positive, an image can't be read, or the set outgrows the cache.
        """
        return np.stack(list(self.stream(context_images, num_images, seed)))

    def stream(self, context_images: Sequence[ContextImage], num_images: int, seed: int = 0) -> Iterator[np.ndarray]:
        """What `__call__` returns, image by image as they are finished: uint8 [image_size, image_size, 3] each."""
        for images_1hwc in self.stream_sets([self.read(context_images)], num_images, np.array([seed])):
            yield images_1hwc[0]

    def read(self, images: Sequence[ContextImage]) -> np.ndarray:
        """The images that `__call__` takes as it sees them: uint8 [m, image_size, image_size, 3], on white."""
        pixels = [read_image(image, self.image_size) for image in images]
        return np.asarray(pixels, np.uint8).reshape(len(pixels), self.image_size, self.image_size, 3)

    def sample_sets(self, contexts: Sequence[np.ndarray], num_images: int, seed_b: np.ndarray) -> np.ndarray:
        """`__call__` for b sets at once, each with a seed of its own.

        Args:
          contexts: of each set, uint8 [m, image_size, image_size, 3]; m may differ.

        Returns:
          uint8 [b, num_images, image_size, image_size, 3].
        """
        return np.stack(list(self.stream_sets(contexts, num_images, seed_b)), axis=1)

    def stream_sets(self, contexts: Sequence[np.ndarray], num_images: int, seed_b: np.ndarray) -> Iterator[np.ndarray]:
        """What `sample_sets` returns, image by image: uint8 [b, image_size, image_size, 3] each."""
        if num_images < 1:
            raise UserError(f"num_images must be at least 1, not {num_images}")
        for seed in np.asarray(seed_b).tolist():
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"a seed must be between 0 and {MAX_SEED}, not {seed}")
        lengths_b = np.array([len(context) for context in contexts])
        # The last image is context to none.
        longest = int(lengths_b.max()) + num_images - 1
        if longest > self.settings.cache_size and not self.settings.slide:
            raise UserError(
                f"{lengths_b.max()} context images and {num_images} to generate need a cache of {longest}, and "
                f"cache_size is {self.settings.cache_size}: raise it, or set slide to forget the oldest images"
            )
        static, params, frozen, put = self._static, *self._placed
        missing = -len(contexts) % len(self.devices or (None,))
        # Devices get equally many sets: what is missing is sampled without context and thrown away.
        padded, lengths_b = [*contexts, *[()] * missing], np.append(lengths_b, np.zeros(missing, int))
        seed_b = np.append(np.asarray(seed_b, np.uint32), np.zeros(missing, np.uint32))
        keys_b = put(jax.vmap(jax.random.key)(seed_b))
        cache = put(_empty_cache(static, self.models, params, frozen, len(padded)))
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        for i in range(lengths_b.max()):
            images_bhwc = put(np.stack([context[i] if i < len(context) else blank for context in padded]))
            image = _encode(self.models, frozen, images_bhwc)
            cache = _append(static, params, cache, image, put(i < lengths_b))
        for i in range(num_images):
            latents_bhwc = _next_image(static, params, cache, keys_b)
            images_bhwc = _decode(self.models, frozen, latents_bhwc)
            yield np.asarray(images_bhwc)[: len(contexts)]
            if i + 1 < num_images:
                encoded = self.unet_config.attends_to_encoded
                image = _encode(self.models, frozen, images_bhwc) if encoded else latents_bhwc
                cache = _append(static, params, cache, image, put(np.ones(len(padded), bool)))

    @functools.cached_property
    def _placed(self) -> tuple[Params, FrozenParams, Callable]:
        """Parameters on every device, and what spreads the sets of a batch over the devices."""
        mesh = Mesh(np.array(self.devices or jax.devices()[:1]), ("data",))
        by_set, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        params, frozen = jax.device_put((self.unet_params, self.frozen), whole)
        return params, frozen, lambda tree: jax.device_put(tree, by_set)

    @property
    def _static(self) -> "_Static":
        shape = self.models.latent_shape(self.image_size)
        return _Static(self.unet_config, shape, self.schedule, self.settings, self.clean_timestep)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the functions below are compiled for: none of it changes as a set grows."""

    unet_config: UNetConfig
    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    settings: SamplingSettings
    clean_timestep: int

    def unet(self, params: Params) -> UNet:
        return merge(_graphdef(self.unet_config), params)


@functools.cache
def _graphdef(config: UNetConfig) -> nnx.GraphDef:
    """Kept, because each of the functions below asks for it when it is traced, and at full size it takes seconds."""
    return abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _empty_cache(
    static: _Static, models: FrozenModels, params: Params, frozen: FrozenParams, num_sets: int
) -> ContextCache:
    pixels = static.latent_shape[0] * models.autoencoder.downsampling
    images = jax.ShapeDtypeStruct((num_sets, pixels, pixels, 3), jnp.uint8)
    image = jax.eval_shape(lambda images: _encode(models, frozen, images), images)
    return empty_cache(static.unet(params), image, static.settings.cache_size, static.settings.cache_dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _append(
    static: _Static, params: Params, cache: ContextCache, image: jax.Array, append_b: jax.Array
) -> ContextCache:
    return append_image(
        static.unet(params),
        cache,
        image,
        clean_timestep=static.clean_timestep,
        append_b=append_b,
        slide=static.settings.slide,
    )


@functools.partial(jax.jit, static_argnums=0)
def _next_image(static: _Static, params: Params, cache: ContextCache, keys_b: jax.Array) -> jax.Array:
    """Latents [b, h, w, c] of one further image of each set. Noise depends on the set's key and its position alone."""
    unet, guidance, shape = static.unet(params), static.settings.guidance, static.latent_shape
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, cache.position_b)
    noise_bhwc = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_b)

    def fresh_noise(number):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 + number), shape))(keys_b)

    def denoise(noised_bhwc, timestep):
        outputs = denoise_next(unet, cache, noised_bhwc, timestep, guided=guidance.guides)
        return guidance(*outputs, timestep / static.schedule.num_train_timesteps) if guidance.guides else outputs[0]

    stepper = STEPPERS[static.settings.stepper]
    return stepper.sample(static.schedule, static.settings.steps, denoise, noise_bhwc, fresh_noise)


@functools.partial(jax.jit, static_argnums=0)
def _encode(models: FrozenModels, frozen: FrozenParams, images_bhwc: jax.Array) -> jax.Array:
    """What the cache is given of uint8 images: latents [b, h, w, c] or tokens [b, s, c]."""
    return models.context(frozen, images_bhwc[:, None])[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _decode(models: FrozenModels, frozen: FrozenParams, latents_bhwc: jax.Array) -> jax.Array:
    return models.decode(frozen, latents_bhwc)
