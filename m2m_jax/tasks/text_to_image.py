"""The task of text-to-image: latent diffusion of single images under their captions, as Stable Diffusion is trained.

Its models generate the image sets that M2M learns from (`m2m_jax.data.build_mis`).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from m2m_jax.attention.layout import SetLayout
from m2m_jax.checkpoints.saved_model import SavedModel
from m2m_jax.configuration import Config, build
from m2m_jax.core.errors import UserError
from m2m_jax.core.keys import Domain, Stream, stream_key
from m2m_jax.core.parameters import Params
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.models.tokenizer import Tokenizer, load_tokenizer
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.sampling.text_to_image import TextPrograms, TextToImage
from m2m_jax.tasks.evaluation import another, stratified_timesteps
from m2m_jax.tasks.latent_diffusion import LatentDiffusion
from m2m_jax.tasks.objective import SetDraws, Told
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.sample_grid import Samples, images_in_pieces, pieces, side_by_side
from m2m_jax.view.contact_sheet import Group


@TASKS.register("text_to_image")
class TextToImageTask(LatentDiffusion):
    """Denoise images under their captions.

    Example:
        task = TextToImageTask(config)
        loss, metrics = task.loss(task.init(), task.frozen, batch, task.draw(batch, step))
    """

    tokenizer: Tokenizer

    def __init__(self, config: Config, platform: str | None = None, models: FrozenModels | None = None):
        super().__init__(config, platform, models)
        self.tokenizer = load_tokenizer(config.text_encoder.path, config.text_encoder.max_tokens)
        self.empty_ids_1s = self.tokenizer([""])
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
        if config.model.global_embeddings:
            raise UserError(
                f"config.model.global_embeddings is {config.model.global_embeddings}; task=text_to_image is told of "
                "captions alone: leave it empty"
            )
        super().check_config(config)

    def errors(self, params: Params, frozen: FrozenParams, batch: dict, draws: SetDraws) -> jax.Array:
        """Return the squared error of the prediction for each image, [b, n].

        Where the draws say so, the caption is the empty one, for guidance.
        """
        ids_bns = jnp.where(draws.keep_context_b[:, None, None], batch["token_ids_bns"], self.empty_ids_1s[None])
        return self._errors_under(params, frozen, batch, ids_bns, draws.noise_bnhwc, draws.timestep_bn)

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Return losses of held-out images under their own, under another's and under the empty caption.

        Noise and timestep are the same under each: is the caption used?
        """
        ids_bns = batch["token_ids_bns"]
        shape = self.latents_shape(batch)
        noise_key, timestep_key = (
            stream_key(Domain.EVALUATE, self.config.seed, batch_index, stream)
            for stream in (Stream.NOISE, Stream.TIMESTEP)
        )
        timestep_bn = stratified_timesteps(self.schedule, timestep_key, math.prod(shape[:2])).reshape(shape[:2])
        noise_bnhwc = jax.random.normal(noise_key, shape)
        captions = {
            "loss_own_caption": ids_bns,
            "loss_other_caption": ids_bns[another(ids_bns)],  # one that reads differently
            "loss_no_caption": jnp.broadcast_to(self.empty_ids_1s[None], ids_bns.shape),
        }
        error_bn = {
            name: self._errors_under(params, frozen, batch, ids_bns, noise_bnhwc, timestep_bn)
            for name, ids_bns in captions.items()
        }
        return {name: jnp.mean(x_bn) for name, x_bn in error_bn.items()}

    @staticmethod
    def score(means: dict[str, float]) -> float:
        """Return how bad parameters are: the loss of images under their own captions."""
        return means["eval/loss_own_caption"]

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Return held-out images, and what is generated from their captions."""
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
        """Return a picture with both side by side."""
        return side_by_side(Group("held out", samples["held_out_bhwc"]), Group("of its caption", samples["made_bhwc"]))

    @property
    def metadata(self) -> dict:
        """What a checkpoint must say so that it can be sampled from alone."""
        return super().metadata | {"tokenizer": self.tokenizer.text}

    def _errors_under(
        self,
        params: Params,
        frozen: FrozenParams,
        batch: dict,
        ids_bns: jax.Array,
        noise_bnhwc: jax.Array,
        timestep_bn: jax.Array,
    ) -> jax.Array:
        """Return the squared error of the prediction for each image under captions of these ids, [b, n]."""
        # Each image has a caption of its own: to the network it is a set of one.
        images = (x.reshape(-1, 1, *x.shape[2:]) for x in (self.latents(frozen, batch), noise_bnhwc, timestep_bn))
        text_bsc = self.models.encode_text(frozen, jax.lax.collapse(ids_bns, 0, 2))
        told = Told(SetLayout.training(1), text_bsc=text_bsc)
        return self.squared_error(params, told, *images).reshape(timestep_bn.shape)
