"""What all tasks of latent diffusion have in common: a U-Net, frozen models around it, a schedule and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np

from m2m_jax.attention.backends import resolve
from m2m_jax.configuration import Config, build, to_json
from m2m_jax.core.parameters import HostParams, Params, merge
from m2m_jax.data.latents import require_autoencoder
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.models.initialization import initial_params
from m2m_jax.models.unet import UNetConfig, unet_structure
from m2m_jax.tasks.objective import SetDraws, Told, draw, squared_error, weighted_loss


class LatentDiffusion:
    """Denoise images in the latent space of a frozen autoencoder, told whatever a subclass tells the network.

    A subclass has `told`: which channels of the network it fills, from what of a batch. It may say by `parts` what of
    the errors is logged beside the loss, by `needs_images` and `tokenizer` what it reads, and has an evaluation and a
    preview of its own (see `tasks/protocol.py`).

    Attributes:
      config: of the run.
      models, frozen: the models around the U-Net, and their parameters.
      unet, unet_config, shapes: the U-Net's structure, its fields, and the shapes of its parameters.
      schedule: noise levels.
    """

    tokenizer: Callable[[Sequence[str]], np.ndarray] | None = None  # captions are not read

    def __init__(self, config: Config, platform: str | None = None, models: FrozenModels | None = None):
        """Read the frozen models that `config` names.

        Args:
          platform: that it will be compiled for, as `attention.backends.resolve` is told; None: this machine's.
          models: what the frozen models are, where no folder is to be read; `frozen` are then mere shapes.

        Raises:
          UserError: a folder is missing or holds another model, or the config makes no network.
        """
        self.config, self.compute_dtype = config, config.model.dtype
        if models is None:
            self.models, self.frozen = FrozenModels.load(config)
            require_autoencoder(config.data, config.autoencoder.path, self.models.autoencoder, self.frozen[AUTOENCODER])
        else:
            self.models, self.frozen = models, cast(FrozenParams, models.shapes)
        self.schedule = NoiseSchedule.from_config(vars(config.schedule))
        channels = self.models.autoencoder.latent_channels
        text_encoder, image_encoder = self.models.text_encoder, self.models.image_encoder
        backend = resolve(config.model.attention_backend, platform or jax.default_backend(), config.model.dtype)
        self.unet_config = build(
            UNetConfig,
            config.model,
            in_channels=channels,
            out_channels=channels,
            cross_attention_dim=text_encoder.hidden_size if text_encoder else None,
            context_dim=image_encoder.hidden_size if image_encoder else None,
            attention_backend=backend,
        )
        self.models.require_image_size(config.data.image_size, len(self.unet_config.block_out_channels))
        self.unet, self.shapes = unet_structure(self.unet_config)

    @classmethod
    def check_config(cls, config: Config) -> None:
        """Raise UserError where the config makes no network or schedule, without reading a folder."""
        text = 1 if config.text_encoder.path else None
        build(UNetConfig, config.model, attention_backend="prefix", cross_attention_dim=text)
        NoiseSchedule.from_config(vars(config.schedule))

    @property
    def attributes(self) -> dict[str, int]:
        """What the data must say of every image: the values of the network's global embeddings."""
        return self.unet_config.global_widths

    @property
    def needs_images(self) -> bool:
        """Whether images are wanted also where the data set holds latents."""
        return False

    @property
    def summary(self) -> str:
        """What is trained, for the log."""
        return f"{self.config.task}, attention by {self.unet_config.attention_backend}"

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must say so that it can be sampled from alone."""
        unet = dataclasses.asdict(self.unet_config)
        return {"config": to_json(self.config), "unet": unet, "frozen": self.models.metadata}

    def init(self) -> HostParams:
        """Return the parameters at step 0: from `config.init.path`, or from scratch where that is empty."""
        return initial_params(self.unet_config, self.schedule, self.config.init.path, seed=self.config.seed)

    def draw(self, batch: dict, step: jax.Array) -> SetDraws:
        """Return what is random in the loss of a batch."""
        config, shape = self.config, self.latents_shape(batch)
        return draw(self.schedule, shape, seed=config.seed, step=step, config=config.diffusion)

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, draws: SetDraws) -> tuple[jax.Array, dict]:
        """Return the mean weighted error of all images of a batch, and scalars for the log."""
        error_bn = self.errors(params, frozen, batch, draws)
        loss = weighted_loss(self.schedule, error_bn, draws.timestep_bn, self.config.diffusion)
        return loss, {"loss": loss} | self.parts(error_bn)

    def errors(self, params: Params, frozen: FrozenParams, batch: dict, draws: SetDraws) -> jax.Array:
        """Return the squared error of the prediction for each image, [b, n]."""
        latents_bnhwc = self.latents(frozen, batch)
        told = self.told(frozen, batch, latents_bnhwc)._replace(keep_context_b=draws.keep_context_b)
        return self.squared_error(params, told, latents_bnhwc, draws.noise_bnhwc, draws.timestep_bn)

    def told(self, frozen: FrozenParams, batch: dict, latents_bnhwc: jax.Array) -> Told:
        """Return what the network is told of the images of whole sets, with these latents."""
        raise NotImplementedError

    def squared_error(
        self, params: Params, told: Told, latents_bnhwc: jax.Array, noise_bnhwc: jax.Array, timestep_bn: jax.Array
    ) -> jax.Array:
        """Return the error of each image, [b, n], as `tasks.objective.squared_error`."""
        unet, clean_timestep = merge(self.unet, params), self.config.diffusion.clean_timestep
        noised = latents_bnhwc, noise_bnhwc, timestep_bn
        return squared_error(unet, self.schedule, told, *noised, clean_timestep=clean_timestep)

    @staticmethod
    def parts(error_bn: jax.Array) -> dict[str, jax.Array]:
        """Return what is logged of the errors of a batch, beside the loss."""
        return {}

    def latents(self, frozen: FrozenParams, batch: dict) -> jax.Array:
        """Return the scaled latents of all images of a batch, [b, n, h, w, c]: those it holds, or encoded ones."""
        latents_bnhwc = batch.get("latents_bnhwc")
        return self.models.encode(frozen, batch["images_bnhwc"]) if latents_bnhwc is None else latents_bnhwc

    def latents_shape(self, batch: dict) -> tuple[int, int, int, int, int]:
        """Return the shape of `latents` without encoding anything."""
        sets_bnhwc = batch["latents_bnhwc"] if "latents_bnhwc" in batch else batch["images_bnhwc"]
        return *sets_bnhwc.shape[:2], *self.models.latent_shape(self.config.data.image_size)
