"""The task of M2M: latent diffusion of image sets. With one image a set and no set attention: the single-image base."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from m2m_jax.attention.layout import SetLayout
from m2m_jax.configuration import Config, build
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, merge
from m2m_jax.models.frozen import FrozenModels, FrozenParams
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.settings import SamplingSettings
from m2m_jax.tasks.evaluation import context_errors
from m2m_jax.tasks.latent_diffusion import LatentDiffusion
from m2m_jax.tasks.objective import Told, global_values, stack_globals
from m2m_jax.tasks.registry import TASKS
from m2m_jax.tasks.sample_grid import Samples, images_in_pieces, pieces, side_by_side
from m2m_jax.view.contact_sheet import Row, contact_sheet, context, generated


@TASKS.register("set_diffusion")
class SetDiffusion(LatentDiffusion):
    """Denoise every image of a set in the context of the clean images before it.

    M2M-DINO where `config.image_encoder` names one, else M2M-Self.

    Example:
        task = SetDiffusion(config)
        loss, metrics = task.loss(task.init(), task.frozen, batch, task.draw(batch, step))
    """

    def __init__(self, config: Config, platform: str | None = None, models: FrozenModels | None = None):
        super().__init__(config, platform, models)
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
            if config.train.parameters in ("attention", "set_attention"):
                raise UserError(f"config.train.parameters is {config.train.parameters}; {without} all train")
        super().check_config(config)

    @property
    def needs_images(self) -> bool:
        """Whether images are wanted also where the data set holds latents: those that the image encoder sees."""
        return self.models.image_encoder is not None

    def told(self, frozen: FrozenParams, batch: dict, latents_bnhwc: jax.Array) -> Told:
        """Return what the network is told: all images but the last are context of those after them."""
        config, context = self.unet_config, latents_bnhwc[:, :-1]
        if config.attends_to_encoded:
            context = self.models.context(frozen, batch["images_bnhwc"][:, :-1])
        layout = SetLayout.training(latents_bnhwc.shape[1], config.clean_sees, config.attends_to_encoded)
        values_bnc = global_values(config.global_embeddings, batch)
        return Told(layout, context, globals_bq=stack_globals(layout, values_bnc, values_bnc))

    @staticmethod
    def parts(error_bn: jax.Array) -> dict[str, jax.Array]:
        """Return the errors of the first image of a set, which has no context, and of the last, which has most."""
        return {"loss_first": jnp.mean(error_bn[:, 0]), "loss_last": jnp.mean(error_bn[:, -1])}

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Return losses of the last image of held-out sets under their own and other contexts: `context_errors`."""
        config, latents_bnhwc = self.config, self.latents(frozen, batch)
        error = context_errors(
            merge(self.unet, params),
            self.schedule,
            latents_bnhwc,
            self.told(frozen, batch, latents_bnhwc).context,
            record_b=batch["record_index_b"],
            seed=config.seed,
            batch_index=batch_index,
            clean_timestep=config.diffusion.clean_timestep,
            globals_bnc=global_values(self.unet_config.global_embeddings, batch),
        )
        return {name: jnp.mean(error_b) for name, error_b in error.items()}

    @staticmethod
    def score(means: dict[str, float]) -> float:
        """Return how bad parameters are: the loss of the last image in its own context."""
        return means["eval/loss_own_context"]

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Return the context of held-out sets, and as many images again generated from it.

        Where the network is told values of each image, the first that is generated has those of the set's last image,
        and further ones have those of the first, the second and so on.

        Args:
          params: whole, on all devices of this process, which all sample.
          number_b: the number of each set in the grid, on which its noise depends.
          step: of the parameters.
        """
        n = self.latents_shape(batch)[1]
        given, generated_bnhwc = self._continue(params, batch, number_b, step, n - 1, max(n - 1, 1))
        return ({"context_bmhwc": given} if n > 1 else {}) | {"generated_bnhwc": generated_bnhwc}

    def continued(self, params: Params, batch: dict, number_b: Sequence[int], step: int, num_given: int) -> Samples:
        """Return held-out sets of which some images are given and the others are generated, beside the real ones.

        Args:
          params, number_b, step: as of `samples`.
          num_given: of the images of each set, the first.
        """
        n = self.latents_shape(batch)[1]
        given, generated_bnhwc = self._continue(params, batch, number_b, step, num_given, n - num_given)
        real_bnhwc = self._images(self.sampler(params, step), batch, slice(num_given, None))
        return {"given_bmhwc": given, "generated_bnhwc": generated_bnhwc, "real_bnhwc": real_bnhwc}

    def _continue(
        self, params: Params, batch: dict, number_b: Sequence[int], step: int, num_context: int, num_new: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first images of held-out sets, and as many as wanted that are generated from them."""
        b, n = self.latents_shape(batch)[:2]
        sampler = self.sampler(params, step)
        settings = dataclasses.replace(sampler.settings, cache_size=max(num_context + num_new - 1, 1))
        sampler = dataclasses.replace(sampler, settings=settings, devices=tuple(jax.local_devices()))
        context_bmhwc, seed_b = self._images(sampler, batch, slice(num_context)), np.asarray(number_b)
        at_once = pieces(b, sampler.image_size, sampler.num_devices)
        of_image = np.arange(num_context + num_new) % n
        held_out = global_values(self.unet_config.global_embeddings, batch)
        values = {name: np.asarray(value_bnc)[:, of_image] for name, value_bnc in held_out.items()}
        generated_bnhwc = [
            sampler.sample_sets(
                context_bmhwc[k], num_new, seed_b[k], globals={name: x[k] for name, x in values.items()}
            )
            for k in at_once
        ]
        return context_bmhwc, np.concatenate(generated_bnhwc)

    @staticmethod
    def sheet(samples: Samples) -> Image.Image:
        """Return a picture with a row for each set: its context, and what was generated from it.

        Of single images, which have no context, a grid.
        """
        generated_bnhwc, context_bmhwc = samples["generated_bnhwc"], samples.get("context_bmhwc")
        if context_bmhwc is None:
            return side_by_side(generated(generated_bnhwc[:, 0]))
        pairs = zip(context_bmhwc, generated_bnhwc, strict=True)
        return contact_sheet([Row("", [context(list(given)), generated(list(new))]) for given, new in pairs])

    @staticmethod
    def _images(sampler: Sampler, batch: dict, which: slice) -> np.ndarray:
        """Return some images of each set, uint8 [b, m, image_size, image_size, 3]."""
        if "images_bnhwc" in batch:
            return np.asarray(batch["images_bnhwc"])[:, which]
        # The sampler will encode them again: near enough to look at.
        latents_bmhwc, size = np.asarray(batch["latents_bnhwc"])[:, which], sampler.image_size
        latents_khwc = latents_bmhwc.reshape(-1, *latents_bmhwc.shape[2:])
        decode = sampler.programs["decode"]
        images_khwc = images_in_pieces(
            lambda x_khwc: decode(sampler.place(x_khwc)), latents_khwc, size, sampler.num_devices
        )
        return images_khwc.reshape(*latents_bmhwc.shape[:2], size, size, 3)

    def sampler(self, params: Params, step: int) -> Sampler:
        """Return the sampler of these parameters, with the config's settings."""
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
