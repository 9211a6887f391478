"""The single-image latent diffusion model that M2M starts from in the demo. Ships as `pretrained/unet`.

    python -m m2m_jax.train --config configs/emoji_base.py --workdir runs/emoji_base
    python -m m2m_jax.to_diffusers --checkpoint runs/emoji_base --output pretrained/unet

The U-Net of configs/emoji.py without Image-Set Attention, trained on sets of one image: unconditional, as Stable
Diffusion is without its text. Trained on the training split only. Figures and time: pretrained/README.md.
"""

from m2m_jax.configuration import TINY, apply_preset, default_config

PRESETS = {"tiny": {**TINY, "model.block_out_channels": (16, 32)}}


def get_config(preset: str = ""):
    config = default_config()
    config.model.attentions = ("self",)
    config.data.images_per_set = 1
    config.data.batch_size = 128
    config.init.path = ""
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.train.steps = 2_200
    config.train.log_every = 20
    config.eval.every = 550
    config.eval.batch_size = 64
    config.sample.guidance_scale = 1.0
    config.checkpoint.every = 250
    return apply_preset(config, preset, PRESETS)
