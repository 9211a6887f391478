"""M2M-DINO at full size: configs/mis_sd21_self.py with the preceding images as tokens of DINOv2-L.

    python -m m2m_jax.train --config configs/mis_sd21_dino.py --config.data.path=LATENTS \
        --config.init.path=SD21/unet --config.autoencoder.path=SD21/vae \
        --config.image_encoder.path=DINOV2 --workdir runs/mis_sd21_dino

The encoder sees images: LATENTS comes from `m2m_jax.data.precompute --keep_images`, once with --split=train and once
with --split=validation. On image sets without latents (--config.data.name=folder) every step runs the autoencoder, too.
DINOV2 is a local folder in transformers' layout. The paper says "DINO"; which, and at what size, is not known.
"""

import runpy
from pathlib import Path

from m2m_jax.configuration import Config


def get_config(preset: str = "") -> Config:
    """The config of configs/mis_sd21_self.py, as M2M-DINO."""
    config = runpy.run_path(str(Path(__file__).with_name("mis_sd21_self.py")))["get_config"](preset)
    config.image_encoder.path = "dinov2-large"
    return config
