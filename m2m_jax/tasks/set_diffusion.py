"""The task of M2M: latent diffusion of image sets. With one image a set and no such attention: single images."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image

from m2m_jax.attention.backends import resolve
from m2m_jax.configuration import Config, build, to_json
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.data.latents import require_autoencoder
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.models.initialization import initial_params
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.tasks.evaluation import context_losses
from m2m_jax.tasks.objective import SetDraws, draw, set_loss
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.sample_grid import Samples, images_in_pieces, pieces, side_by_side
from m2m_jax.view.contact_sheet import Row, contact_sheet, context, generated


@TASKS.register("set_diffusion")
class SetDiffusion:
    """Loss, evaluation and sample grid of a U-Net over sets, in the latent space of a frozen autoencoder.

    M2M-DINO where `config.image_encoder` names one, else M2M-Self.
    """

    def __init__(self, config: Config, platform: str | None = None, models: FrozenModels | None = None):
        """As `config` says.

        Args:
          platform: that it will be compiled for, as `attention.backends.resolve` is told; None: this machine's.
          models: what the frozen models are, where no folder is to be read; `frozen` are then mere shapes.
        """
        self.config, self.compute_dtype = config, config.model.dtype
        if models is None:
            self.models, self.frozen = FrozenModels.load(config)
        else:
            self.models, self.frozen = models, models.shapes
        if models is None:
            require_autoencoder(config.data, config.autoencoder.path, self.models.autoencoder, self.frozen[AUTOENCODER])
        self.schedule = NoiseSchedule.from_config(vars(config.schedule))
        channels, encoder = self.models.autoencoder.latent_channels, self.models.image_encoder
        platform = platform or jax.default_backend()
        backend = resolve(config.model.attention_backend, platform, config.model.dtype)
        self.unet_config = build(
            UNetConfig,
            config.model,
            in_channels=channels,
            out_channels=channels,
            context_dim=encoder.hidden_size if encoder else None,
            attention_backend=backend,
        )
        self.models.require_image_size(config.data.image_size, len(self.unet_config.block_out_channels))
        self.unet, self.shapes = abstract(self._build)
        self.sampler({}, step=0)  # its settings are refused now and not at the first evaluation

    @classmethod
    def check_config(cls, config: Config) -> None:
        """Raise UserError where the config does not go with this task."""
        model = config.model
        if "text" in model.attentions:
            raise UserError(f"config.model.attentions is {model.attentions}; text is for task=text_to_image")
        if config.text_encoder.path:
            raise UserError("config.text_encoder.path is set; only task=text_to_image has a text encoder")
        if "set" not in model.attentions:
            without = "without set among config.model.attentions"
            if config.data.images_per_set > 1:
                raise UserError(f"{without} one image is seen at a time: set --config.data.images_per_set=1")
            if config.image_encoder.path:
                raise UserError(f"config.image_encoder.path is set; {without} nothing attends to its tokens")
            if config.train.parameters != "all":
                raise UserError(f"config.train.parameters is {config.train.parameters}; {without} all train")
        # They refuse what makes none.
        build(UNetConfig, model, attention_backend="prefix")
        NoiseSchedule.from_config(vars(config.schedule))

    def _build(self, key: jax.Array | int = 0) -> UNet:
        return UNet(self.unet_config, rngs=nnx.Rngs(key))

    def init(self) -> Params:
        """Parameters at step 0: from `config.init.path`, or from scratch where that is empty."""
        folder, seed = self.config.init.path, self.config.seed
        return initial_params(self._build, self.unet_config, self.schedule, folder, seed=seed)

    @property
    def summary(self) -> str:
        """What is trained, for the log."""
        return f"set_diffusion, attention by {self.unet_config.attention_backend}"

    tokenizer = None  # captions are not read

    @property
    def needs_images(self) -> bool:
        """Whether images are wanted also where the data set holds latents: those that the image encoder sees."""
        return self.models.image_encoder is not None

    def draw(self, batch: dict, step: jax.Array) -> SetDraws:
        """What is random in the loss of a batch."""
        config, sets_bnhwc = self.config, batch.get("latents_bnhwc", batch.get("images_bnhwc"))
        shape = (*sets_bnhwc.shape[:2], *self.models.latent_shape(config.data.image_size))
        return draw(self.schedule, shape, seed=config.seed, step=step, config=config.diffusion)

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, draws: SetDraws) -> tuple[jax.Array, dict]:
        """Scalar loss and scalars for the log."""
        unet, inputs = merge(self.unet, params), self._latents_and_context(frozen, batch)
        return set_loss(unet, self.schedule, *inputs, draws, config=self.config.diffusion)

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Scalars of one held-out batch."""
        config = self.config
        unet, inputs = merge(self.unet, params), self._latents_and_context(frozen, batch)
        return context_losses(
            unet,
            self.schedule,
            *inputs,
            record_b=batch["record_index_b"],
            seed=config.seed,
            batch_index=batch_index,
            clean_timestep=config.diffusion.clean_timestep,
        )

    @staticmethod
    def score(means: dict[str, float]) -> float:
        """Which checkpoint is best, by the means over an evaluation's batches: lower is better."""
        return means["eval/loss_own_context"]

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Of held-out sets their context, and as many images again generated from it; on all devices of this process.

        number_b: of each set in the grid, of which its noise depends.
        """
        b, n = batch.get("images_bnhwc", batch.get("latents_bnhwc")).shape[:2]
        num_context, num_new = n - 1, max(n - 1, 1)
        sampler = self.sampler(params, step)
        settings = dataclasses.replace(sampler.settings, cache_size=max(num_context + num_new - 1, 1))
        sampler = dataclasses.replace(sampler, settings=settings, devices=tuple(jax.local_devices()))
        context_bmhwc, seed_b = self._context_images(sampler, batch), np.asarray(number_b)
        at_once = pieces(b, sampler.image_size, sampler.num_devices)
        generated_bnhwc = [sampler.sample_sets(context_bmhwc[k], num_new, seed_b[k]) for k in at_once]
        given = {"context_bmhwc": context_bmhwc} if num_context else {}
        return given | {"generated_bnhwc": np.concatenate(generated_bnhwc)}

    @staticmethod
    def sheet(samples: Samples) -> Image.Image:
        """A row for each set: its context, and what was generated from it. Of single images, a grid."""
        generated_bnhwc, context_bmhwc = samples["generated_bnhwc"], samples.get("context_bmhwc")
        if context_bmhwc is None:
            return side_by_side(generated(generated_bnhwc[:, 0]))
        pairs = zip(context_bmhwc, generated_bnhwc, strict=True)
        return contact_sheet([Row("", [context(list(given)), generated(list(new))]) for given, new in pairs])

    @staticmethod
    def _context_images(sampler: Sampler, batch: dict) -> np.ndarray:
        """All images of each set but the last, uint8 [b, n - 1, image_size, image_size, 3]."""
        if "images_bnhwc" in batch:
            return np.asarray(batch["images_bnhwc"])[:, :-1]
        # The sampler will encode them again: near enough to look at.
        latents_bmhwc, size = np.asarray(batch["latents_bnhwc"])[:, :-1], sampler.image_size
        latents_khwc = latents_bmhwc.reshape(-1, *latents_bmhwc.shape[2:])
        decode = sampler.programs["decode"]
        images_khwc = images_in_pieces(
            lambda x_khwc: decode(sampler.place(x_khwc)), latents_khwc, size, sampler.num_devices
        )
        return images_khwc.reshape(*latents_bmhwc.shape[:2], size, size, 3)

    def sampler(self, params: Params, step: int) -> Sampler:
        """The sampler of these parameters, with the config's settings."""
        return Sampler(
            unet_config=self.unet_config,
            unet_params=params,
            models=self.models,
            frozen=self.frozen,
            schedule=self.schedule,
            settings=build(SamplingSettings, self.config.sample),
            clean_timestep=self.config.diffusion.clean_timestep,
            image_size=self.config.data.image_size,
            step=step,
        )

    @property
    def metadata(self) -> dict:
        """What a checkpoint must say so that it can be sampled from alone."""
        unet = dataclasses.asdict(self.unet_config)
        return {"config": to_json(self.config), "unet": unet, "frozen": self.models.metadata}

    def _latents_and_context(self, frozen: FrozenParams, batch: dict) -> tuple[jax.Array, jax.Array]:
        """Latents of all images of each set, and what the U-Net is given of all but the last."""
        latents_bnhwc = batch.get("latents_bnhwc")
        if latents_bnhwc is None:
            latents_bnhwc = self.models.encode(frozen, batch["images_bnhwc"])
        if self.unet_config.attends_to_encoded:
            return latents_bnhwc, self.models.context(frozen, batch["images_bnhwc"][:, :-1])
        return latents_bnhwc, latents_bnhwc[:, :-1]
