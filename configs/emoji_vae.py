"""The first stage of the demo: a KL autoencoder of 32 px emoji, 8x8x4 latents. Ships as `pretrained/vae`.

    python -m m2m_jax.train --config configs/emoji_vae.py --workdir runs/emoji_vae
    python -m m2m_jax.to_diffusers --checkpoint runs/emoji_vae --output pretrained/vae

Trained on the training split only. Figures and time: pretrained/README.md.
"""

from m2m_jax.configuration import TINY, apply_preset, default_config

PRESETS = {"tiny": {**TINY, "autoencoder.block_out_channels": (16, 16, 16)}}


def get_config(preset: str = ""):
    config = default_config()
    config.task = "autoencoder"
    config.data.images_per_set = 1
    config.data.batch_size = 32
    config.init.path = ""
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 1_600
    config.train.ema_decay = 0.995
    config.eval.every = 400
    config.eval.batch_size = 32
    config.checkpoint.every = 200
    return apply_preset(config, preset, PRESETS)
