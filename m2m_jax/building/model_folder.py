"""A run saved as a model folder in diffusers' layout.

Example:
    save_model_folder(ModelExport(checkpoint="runs/emoji_vae", output="models/vae"))
"""

import dataclasses
import json

import jax
import numpy as np

from m2m_jax.building.options import ModelExport
from m2m_jax.checkpoints import shipped
from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.configuration import Config, from_json
from m2m_jax.core import runtime
from m2m_jax.core.parameters import Params, count, merge
from m2m_jax.data.pipeline import batches, make_dataset, open_examples
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.autoencoder import AutoencoderConfig, autoencoder_structure, pixels_to_float
from m2m_jax.models.diffusers_folder import SCHEDULER, save_autoencoder, save_unet
from m2m_jax.models.folder import config_from
from m2m_jax.models.unet_config import UNetConfig, with_todays_names

SCALING_BATCHES = 50


def save_model_folder(options: ModelExport) -> str:
    """Save the EMA of a run, and return lines on what was saved.

    The scaling factor of an autoencoder is measured over `SCALING_BATCHES` batches of the data that it was trained on.
    Beside a U-Net the schedule that it was trained under is saved; with M2M, what sampling from the folder needs.

    Raises:
      UserError: no checkpoint there, its data are gone, or the folder cannot be written.
    """
    runtime.start()
    saved = load_for_sampling(options.checkpoint)
    config, output, dtype = from_json(saved.metadata["config"]), options.output, np.dtype(options.dtype)
    line = f"{output}: {count(saved.ema_params):,} parameters of step {saved.step} as {dtype}"
    if config.task == "autoencoder":
        autoencoder_config = config_from(AutoencoderConfig, saved.metadata["autoencoder"], {})
        factor = scaling_factor(config, autoencoder_config, saved.ema_params)
        save_autoencoder(
            output, dataclasses.replace(autoencoder_config, scaling_factor=factor), saved.ema_params, dtype
        )
        return f"scaling factor {factor:.5f}\n{line}"
    save_unet(output, config_from(UNetConfig, with_todays_names(saved.metadata["unet"]), {}), saved.ema_params, dtype)
    schedule = NoiseSchedule.from_config(vars(config.schedule)).to_config()
    (output / SCHEDULER).write_text(json.dumps(schedule, indent=2) + "\n")
    if config.task == "set_diffusion" and config.data.images_per_set > 1:
        shipped.describe(output, saved.metadata, saved.step)
    return line


def scaling_factor(config: Config, autoencoder_config: AutoencoderConfig, params: Params) -> float:
    """Return 1 / standard deviation of the unscaled latents of the training data.

    Source: Rombach et al., arXiv 2112.10752, D.1.
    """
    graphdef, _ = autoencoder_structure(autoencoder_config)
    encode = jax.jit(lambda params, images: merge(graphdef, params).posterior(pixels_to_float(images))[0])
    data = config.data
    examples = open_examples(data, split=data.train_split, seed=config.seed)
    dataset = make_dataset(examples, batch_size=data.batch_size, threads=data.threads)
    stream = batches(dataset, 0, data.prefetch)
    latents = [np.asarray(encode(params, next(stream)["images_bnhwc"])) for _ in range(SCALING_BATCHES)]
    return float(1.0 / np.std(latents))
