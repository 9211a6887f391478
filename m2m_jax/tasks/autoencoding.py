"""The task of the first stage: a KL autoencoder of single images."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from m2m_jax.configuration import Config, build, reads_latents, to_json
from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Domain, Stream, stream_key
from m2m_jax.core.parameters import HostParams, Params, initial, merge
from m2m_jax.models import diffusers_folder, stlpips
from m2m_jax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    autoencoder_structure,
    pixels_to_float,
    pixels_to_uint8,
)
from m2m_jax.models.folder import require_same
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.sample_grid import Samples, images_in_pieces, side_by_side
from m2m_jax.view.contact_sheet import Group

PERCEPTUAL = "perceptual"  # the key of its network's parameters among the frozen ones


@TASKS.register("autoencoder")
class Autoencoding:
    """Reconstruction and KL losses of `AutoencoderKL`, and a perceptual one where the config names its network.

    Stable Diffusion adds an adversarial term, too; at 32 px and four-fold downsampling absolute and squared error do
    without either. Latents are unscaled here: `m2m_jax.to_diffusers` measures the scaling factor when it saves.
    """

    def __init__(self, config: Config):
        self.config = config
        self.autoencoder_config = _architecture(config)
        self.graphdef, self.shapes = autoencoder_structure(self.autoencoder_config)
        self.frozen: FrozenParams = {}
        if config.autoencoder.perceptual_path:
            self.frozen[PERCEPTUAL] = stlpips.load_stlpips(config.autoencoder.perceptual_path)

    @classmethod
    def check_config(cls, config: Config) -> None:
        """Raise UserError where the config does not go with this task."""
        if reads_latents(config.data):
            latents = "latents=True reads latents" if config.data.latents else f"name={config.data.name} holds latents"
            raise UserError(f"config.data.{latents}; task=autoencoder needs a data set of images")
        if config.train.parameters != "all":
            raise UserError(f"config.train.parameters is {config.train.parameters}; of an autoencoder all train")
        factor, size = _architecture(config).downsampling, config.data.image_size
        if size % factor:
            raise UserError(f"config.data.image_size is {size}; config.autoencoder needs a multiple of {factor}")

    summary = "autoencoder"  # what is trained, for the log
    tokenizer = None  # captions are not read
    needs_images = True
    attributes: Mapping[str, int] = MappingProxyType({})  # and nothing else of the images
    compute_dtype = "float32"

    def init(self) -> HostParams:
        """Return the parameters at step 0, in the host's memory: fresh, or those of the folder in `config.init`."""
        if folder := self.config.init.path:
            params = diffusers_folder.load_params(folder)
            require_same(folder, self.shapes, params)
            return {name: np.asarray(value) for name, value in params.items()}
        return initial(lambda rngs: AutoencoderKL(self.autoencoder_config, rngs=rngs), self.config.seed)

    def draw(self, batch: dict, step: jax.Array) -> jax.Array:
        """Return what is random in the loss of a batch: noise of the latents' shape."""
        b, n, height, width, _ = batch["images_bnhwc"].shape
        factor, channels = self.autoencoder_config.downsampling, self.autoencoder_config.latent_channels
        shape = (b, n, height // factor, width // factor, channels)
        return jax.random.normal(stream_key(Domain.TRAIN, self.config.seed, step, Stream.POSTERIOR), shape)

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, noise: jax.Array) -> tuple[jax.Array, dict]:
        """Return the loss and scalars for the log. The decoder sees samples of the posterior."""
        model = merge(self.graphdef, params)
        images = pixels_to_float(batch["images_bnhwc"])
        mean, log_variance = model.posterior(images)
        rebuilt = model.decode(mean + jnp.exp(0.5 * log_variance) * noise)
        difference = rebuilt - images
        absolute, squared = jnp.mean(jnp.abs(difference)), jnp.mean(difference**2)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        c = self.config.autoencoder
        loss = absolute + squared + c.kl_weight * kl
        metrics = {"absolute_error": absolute, "kl": kl}
        if PERCEPTUAL in frozen:
            flat, rebuilt = (jax.lax.collapse(x, 0, x.ndim - 3) for x in (images, rebuilt))
            some = max(1, round(c.perceptual_share * len(flat)))  # batches are shuffled: the first are as good as any
            seen = jnp.mean(stlpips.distance(frozen[PERCEPTUAL], rebuilt[:some], flat[:some], c.perceptual_slices))
            loss += c.perceptual_weight * seen
            metrics["perceptual"] = seen
        return loss, {"loss": loss} | metrics

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Return scalars of one held-out batch. PSNR is of the batch's mean squared error, in dB, peak 2."""
        model = merge(self.graphdef, params)
        images = pixels_to_float(batch["images_bnhwc"])
        latents = model.encode(images)
        rebuilt = jnp.clip(model.decode(latents), -1.0, 1.0)
        squared = jnp.mean((rebuilt - images) ** 2)
        metrics = {"psnr_db": 10.0 * jnp.log10(4.0 / squared), "latent_std": jnp.std(latents)}
        if PERCEPTUAL in frozen:
            flat, rebuilt = (jax.lax.collapse(x, 0, x.ndim - 3) for x in (images, rebuilt))
            metrics["st_lpips_vgg"] = jnp.mean(stlpips.distance(frozen[PERCEPTUAL], rebuilt, flat))
        return metrics

    @staticmethod
    def score(means: dict[str, float]) -> float:
        """Return how bad parameters are: the negative PSNR."""
        return -means["eval/psnr_db"]

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Return held-out images, and their reconstructions, made on one device."""
        params = jax.device_put(params, jax.local_devices()[0])
        images_bhwc = np.asarray(batch["images_bnhwc"])[:, 0]
        rebuilt_bhwc = images_in_pieces(
            lambda some_bhwc: _reconstruct(self.graphdef, params, some_bhwc), images_bhwc, images_bhwc.shape[1]
        )
        return {"held_out_bhwc": images_bhwc, "rebuilt_bhwc": rebuilt_bhwc}

    @staticmethod
    def sheet(samples: Samples) -> Image.Image:
        """Return a picture with both side by side."""
        return side_by_side(Group("held out", samples["held_out_bhwc"]), Group("rebuilt", samples["rebuilt_bhwc"]))

    @property
    def metadata(self) -> dict:
        """What a checkpoint must say so that it can be rebuilt alone."""
        return {"config": to_json(self.config), "autoencoder": dataclasses.asdict(self.autoencoder_config)}


@jax.jit(static_argnums=0)
def _reconstruct(graphdef: nnx.GraphDef, params: Params, images_bhwc: jax.Array) -> jax.Array:
    model = merge(graphdef, params)
    return pixels_to_uint8(model.decode(model.encode(pixels_to_float(images_bhwc))))


def _architecture(config: Config) -> AutoencoderConfig:
    return build(AutoencoderConfig, config.autoencoder, scaling_factor=1.0)
