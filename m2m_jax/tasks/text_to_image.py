"""The task of text-to-image: latent diffusion of single images under their captions, as Stable Diffusion is trained.

Its models generate the image sets that M2M learns from (`m2m_jax.data.build_mis`).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from m2m_jax.attention.backends import resolve
from m2m_jax.checkpoints.saved_model import SavedModel
from m2m_jax.configuration import Config, build, to_json
from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Stream, stream_key
from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.data.latents import require_autoencoder
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.models.initialization import initial_params
from m2m_jax.models.tokenizer import load_tokenizer
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.sampling.text_to_image import TextPrograms, TextToImage
from m2m_jax.tasks.evaluation import another, stratified_timesteps
from m2m_jax.tasks.objective import SetDraws, draw
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.sample_grid import Samples, images_in_pieces, pieces, side_by_side
from m2m_jax.view.contact_sheet import Group


@TASKS.register("text_to_image")
class TextToImageTask:
    """Loss, evaluation and sample grid of a U-Net that attends to captions, in the latent space of an autoencoder."""

    def __init__(self, config: Config):
        self.config, self.compute_dtype = config, config.model.dtype
        self.models, self.frozen = FrozenModels.load(config)
        require_autoencoder(config.data, config.autoencoder.path, self.models.autoencoder, self.frozen[AUTOENCODER])
        self.tokenizer = load_tokenizer(config.text_encoder.path, config.text_encoder.max_tokens)
        self.empty_ids_1s = self.tokenizer([""])
        self.schedule = NoiseSchedule.from_config(vars(config.schedule))
        channels = self.models.autoencoder.latent_channels
        backend = resolve(config.model.attention_backend, jax.default_backend(), config.model.dtype)
        self.unet_config = build(
            UNetConfig,
            config.model,
            in_channels=channels,
            out_channels=channels,
            cross_attention_dim=self.models.text_encoder.hidden_size,
            attention_backend=backend,
        )
        self.unet, self.shapes = abstract(self._build)
        # Settings and a size that make no sample are refused now, and not at the first evaluation.
        settings, size = build(SamplingSettings, config.sample), config.data.image_size
        TextPrograms(self.unet_config, self.models, self.schedule, settings, size)

    @classmethod
    def check_config(cls, config: Config) -> None:
        """Raise UserError where the config does not go with this task."""
        if "text" not in config.model.attentions:
            raise UserError(
                f"config.model.attentions is {config.model.attentions}; task=text_to_image needs text among them: "
                "self,text"
            )
        if not config.text_encoder.path:
            raise UserError("config.text_encoder.path is empty; task=text_to_image needs a text encoder")
        if config.image_encoder.path:
            raise UserError("config.image_encoder.path is set; task=text_to_image attends to no image")
        # They refuse what makes none.
        build(UNetConfig, config.model, attention_backend="prefix", cross_attention_dim=1)
        NoiseSchedule.from_config(vars(config.schedule))

    needs_images = False  # where the data set holds latents

    def _build(self, key: jax.Array | int = 0) -> UNet:
        return UNet(self.unet_config, rngs=nnx.Rngs(key))

    @property
    def summary(self) -> str:
        """What is trained, for the log."""
        return f"text_to_image, attention by {self.unet_config.attention_backend}"

    def init(self) -> Params:
        """Parameters at step 0: from `config.init.path`, or from scratch where that is empty."""
        folder, seed = self.config.init.path, self.config.seed
        return initial_params(self._build, self.unet_config, self.schedule, folder, seed=seed)

    def draw(self, batch: dict, step: jax.Array) -> SetDraws:
        """What is random in the loss of a batch; the context of an image is its caption."""
        config, shape = self.config, (*batch["token_ids_bns"].shape[:2], *self._latent_shape)
        return draw(self.schedule, shape, seed=config.seed, step=step, config=config.diffusion)

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, draws: SetDraws) -> tuple[jax.Array, dict]:
        """Scalar loss and scalars for the log. Where the draws say so, the caption is the empty one, for guidance."""
        ids_bns = jnp.where(draws.keep_context_b[:, None, None], batch["token_ids_bns"], self.empty_ids_1s[None])
        error_bn = self._squared_error(params, frozen, batch, ids_bns, draws.noise_bnhwc, draws.timestep_bn)
        config = self.config.diffusion
        weight_bn = self.schedule.loss_weight(draws.timestep_bn, config.loss_weight, config.min_snr_gamma)
        loss = jnp.mean(weight_bn * error_bn)
        return loss, {"loss": loss}

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Is the caption used? Losses of held-out images under their own, under another's and under the empty caption,
        with the same noise and timestep."""
        ids_bns = batch["token_ids_bns"]
        shape = (*ids_bns.shape[:2], *self._latent_shape)
        noise_key, timestep_key = jax.random.split(stream_key(self.config.seed, batch_index, Stream.EVAL))
        timestep_bn = stratified_timesteps(self.schedule, timestep_key, math.prod(shape[:2])).reshape(shape[:2])
        noise_bnhwc = jax.random.normal(noise_key, shape)
        captions = {
            "loss_own_caption": ids_bns,
            "loss_other_caption": ids_bns[another(ids_bns)],  # one that reads differently
            "loss_no_caption": jnp.broadcast_to(self.empty_ids_1s[None], ids_bns.shape),
        }
        error_bn = {
            name: self._squared_error(params, frozen, batch, ids_bns, noise_bnhwc, timestep_bn)
            for name, ids_bns in captions.items()
        }
        return {name: jnp.mean(x_bn) for name, x_bn in error_bn.items()}

    @staticmethod
    def score(means: dict[str, float]) -> float:
        """Which checkpoint is best, by the means over an evaluation's batches: lower is better."""
        return means["eval/loss_own_caption"]

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Held-out images, and what is generated from their captions."""
        ids_bs = np.asarray(batch["token_ids_bns"])[:, 0]
        generator = TextToImage.from_saved(
            SavedModel(self.metadata, params, self.frozen, step), "this run", devices=jax.local_devices()[:1]
        )
        index_b, at_once = np.asarray(number_b), pieces(len(ids_bs), generator.image_size)
        if "latents_bnhwc" in batch:
            decode, autoencoder = jax.jit(self.models.decode), {AUTOENCODER: generator.autoencoder[1]}
            latents_bhwc = np.asarray(batch["latents_bnhwc"])[:, 0]
            held_out_bhwc = images_in_pieces(
                lambda x_khwc: decode(autoencoder, x_khwc), latents_bhwc, generator.image_size
            )
        else:
            held_out_bhwc = np.asarray(batch["images_bnhwc"])[:, 0]

        def make(k: slice) -> np.ndarray:
            images_bnhwc = generator.generate_from_ids(ids_bs[k], index_b[k], [0], self.config.seed)[1]
            return np.asarray(images_bnhwc)[:, 0]

        return {"held_out_bhwc": held_out_bhwc, "made_bhwc": np.concatenate([make(k) for k in at_once])}

    @staticmethod
    def sheet(samples: Samples) -> Image.Image:
        """Those beside these."""
        return side_by_side(Group("held out", samples["held_out_bhwc"]), Group("of its caption", samples["made_bhwc"]))

    @property
    def metadata(self) -> dict:
        """What a checkpoint must say so that it can be sampled from alone."""
        return {
            "config": to_json(self.config),
            "unet": dataclasses.asdict(self.unet_config),
            "frozen": self.models.metadata,
            "tokenizer": self.tokenizer.text,
        }

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self.models.latent_shape(self.config.data.image_size)

    def _squared_error(
        self,
        params: Params,
        frozen: FrozenParams,
        batch: dict,
        ids_bns: jax.Array,
        noise_bnhwc: jax.Array,
        timestep_bn: jax.Array,
    ) -> jax.Array:
        """Of the prediction for each image, [b, n]."""
        latents_bnhwc = batch.get("latents_bnhwc")
        if latents_bnhwc is None:
            latents_bnhwc = self.models.encode(frozen, batch["images_bnhwc"])
        noised_bnhwc = self.schedule.add_noise(latents_bnhwc, noise_bnhwc, timestep_bn)
        target_bnhwc = self.schedule.target(latents_bnhwc, noise_bnhwc, timestep_bn)
        noised_khwc, ids_ks = jax.lax.collapse(noised_bnhwc, 0, 2), jax.lax.collapse(ids_bns, 0, 2)
        timestep_k = self.schedule.network_timestep(timestep_bn).reshape(-1)
        tokens_ksc = self.models.encode_text(frozen, ids_ks)
        output_khwc, _ = merge(self.unet, params)(noised_khwc, timestep_k, Conditioning(text_bsc=tokens_ksc))
        return jnp.mean((output_khwc.reshape(target_bnhwc.shape) - target_bnhwc) ** 2, axis=(2, 3, 4))
