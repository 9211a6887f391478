"""Saves the EMA of a run as a model folder in diffusers' layout.

    python -m m2m_jax.to_diffusers --checkpoint runs/emoji_vae --output pretrained/vae

An autoencoder's scaling factor is measured here, over `SCALING_BATCHES` batches of its training data, so that its
latents have unit standard deviation. Beside a single-image U-Net the schedule that it was trained under is saved.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import nnx

from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.configuration import from_json
from m2m_jax.core.parameters import Params, abstract, count, merge
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import batches, make_dataset, open_examples
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, pixels_to_float
from m2m_jax.models.diffusers_folder import SCHEDULER, save_autoencoder, save_unet
from m2m_jax.models.folder import config_from
from m2m_jax.models.unet_config import UNetConfig, with_todays_names

SCALING_BATCHES = 50

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STEP.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "What the weights are stored in.")


def main(argv):
    saved = load_for_sampling(CHECKPOINT.value)
    config, output, dtype = from_json(saved.metadata["config"]), Path(OUTPUT.value), np.dtype(DTYPE.value)
    if config.task == "autoencoder":
        autoencoder_config = config_from(AutoencoderConfig, saved.metadata["autoencoder"], {})
        factor = scaling_factor(config, autoencoder_config, saved.ema_params)
        save_autoencoder(
            output, dataclasses.replace(autoencoder_config, scaling_factor=factor), saved.ema_params, dtype
        )
        print(f"scaling factor {factor:.5f}")
    else:
        unet_config = config_from(UNetConfig, with_todays_names(saved.metadata["unet"]), {})
        save_unet(output, unet_config, saved.ema_params, dtype)
        schedule = NoiseSchedule.from_config(vars(config.schedule)).to_config()
        (output / SCHEDULER).write_text(json.dumps(schedule, indent=2) + "\n")
    print(f"{output}: {count(saved.ema_params):,} parameters of step {saved.step} as {dtype}")


def scaling_factor(config, autoencoder_config: AutoencoderConfig, params: Params) -> float:
    """1 / standard deviation of the unscaled latents over the training data (Rombach et al., arXiv 2112.10752, D.1)."""
    graphdef, _ = abstract(lambda: AutoencoderKL(autoencoder_config, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda params, images: merge(graphdef, params).posterior(pixels_to_float(images))[0])
    data = config.data
    examples = open_examples(data, split=data.train_split, seed=config.seed)
    dataset = make_dataset(examples, batch_size=data.batch_size, threads=data.threads)
    stream = batches(dataset, 0, data.prefetch)
    latents = [np.asarray(encode(params, next(stream)["images_bnhwc"])) for _ in range(SCALING_BATCHES)]
    return float(1.0 / np.std(latents))


if __name__ == "__main__":
    run_program(main)
