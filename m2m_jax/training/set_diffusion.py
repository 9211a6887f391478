"""The task of M2M: latent diffusion of image sets. With one image a set and no attn2 it is the single-image base."""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from m2m_jax.configuration import to_json
from m2m_jax.diffusion.objective import set_loss
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.errors import UserError
from m2m_jax.keys import Stream, stream_key
from m2m_jax.models.autoencoder import AutoencoderKL
from m2m_jax.models.diffusers_folder import load_autoencoder_config, load_params
from m2m_jax.models.folder import require_same
from m2m_jax.models.initialization import from_pretrained, is_set_attention
from m2m_jax.models.parameters import Params, abstract, merge, split
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.sampling.contact_sheet import Row, contact_sheet, context, generated
from m2m_jax.sampling.sampler import Sampler, SamplingSettings, pixels_to_float
from m2m_jax.training.evaluation import context_losses


class SetDiffusion:
    """Loss, evaluation and sample grid of a U-Net over sets, in the latent space of a frozen autoencoder."""

    def __init__(self, config: ConfigDict):
        self.config = config
        folder = config.autoencoder.path
        self.autoencoder_config = load_autoencoder_config(folder)
        self.autoencoder, shapes = abstract(lambda: AutoencoderKL(self.autoencoder_config, rngs=nnx.Rngs(0)))
        self.frozen: Params = load_params(folder)
        require_same(folder, shapes, self.frozen)
        self.schedule = NoiseSchedule.from_config(config.schedule)
        channels = self.autoencoder_config.latent_channels
        self.unet_config = UNetConfig(in_channels=channels, out_channels=channels, **config.model)
        self.unet, self.shapes = abstract(self._build)
        if config.data.images_per_set > 1 and config.model.attn2 == "none":
            raise UserError("model.attn2='none' sees one image at a time: set data.images_per_set=1")
        self.sampler({}, step=0)  # its settings are refused now and not at the first evaluation

    def _build(self, key: jax.Array | int = 0) -> UNet:
        return UNet(self.unet_config, rngs=nnx.Rngs(key))

    def init(self) -> Params:
        """Parameters at step 0: from `config.init.path`, or from scratch where that is empty."""
        key = stream_key(self.config.seed, 0, Stream.PARAMS)
        params = jax.jit(lambda key: split(self._build(key))[1])(key)
        if self.config.init.path:
            params = from_pretrained(params, load_params(self.config.init.path), self.config.init.path)
        return params

    is_new_parameter = staticmethod(is_set_attention)

    def loss(self, params: Params, frozen: Params, batch: dict, step: jax.Array) -> tuple[jax.Array, dict]:
        """Scalar loss and scalars for the log."""
        config = self.config
        latents_bnhwc = self._encode(frozen, batch)
        return set_loss(
            merge(self.unet, params), self.schedule, latents_bnhwc, seed=config.seed, step=step, config=config.diffusion
        )

    def evaluate(self, params: Params, frozen: Params, batch: dict, batch_index: jax.Array) -> dict[str, jax.Array]:
        """Scalars of one held-out batch."""
        return context_losses(
            merge(self.unet, params),
            self.schedule,
            self._encode(frozen, batch),
            seed=self.config.seed,
            batch_index=batch_index,
            config=self.config.diffusion,
        )

    def preview(self, params: Params, batch: dict, step: int) -> Image.Image:
        """Held-out sets: their context, and as many images again generated from it (for single images: a grid)."""
        images_bnhwc = np.asarray(batch["images_bnhwc"])
        b, n = images_bnhwc.shape[:2]
        sampler = self.sampler(params, step)
        num_context, num_new = n - 1, max(n - 1, 1)
        generated_bnhwc = sampler.sample_sets(images_bnhwc[:, :num_context], num_new, np.arange(b))
        if n == 1:
            grid_rnhwc = generated_bnhwc.reshape(-1, math.gcd(b, 8), *generated_bnhwc.shape[2:])
            return contact_sheet([Row("", [generated(list(row))]) for row in grid_rnhwc])
        pairs = zip(images_bnhwc[:, :num_context], generated_bnhwc, strict=True)
        return contact_sheet([Row("", [context(list(given)), generated(list(new))]) for given, new in pairs])

    def sampler(self, params: Params, step: int) -> Sampler:
        """The sampler of these parameters, with the config's settings."""
        return Sampler(
            unet=self.unet,
            unet_params=params,
            autoencoder=self.autoencoder,
            autoencoder_params=self.frozen,
            schedule=self.schedule,
            settings=SamplingSettings(**self.config.sample),
            clean_sees=self.unet_config.clean_sees,
            clean_timestep=self.config.diffusion.clean_timestep,
            image_size=self.config.data.image_size,
            step=step,
        )

    @property
    def metadata(self) -> dict:
        """What a checkpoint must say so that it can be sampled from alone."""
        return {"config": to_json(self.config), "autoencoder": dataclasses.asdict(self.autoencoder_config)}

    def _encode(self, frozen: Params, batch: dict) -> jax.Array:
        return merge(self.autoencoder, frozen).encode(pixels_to_float(batch["images_bnhwc"]))
