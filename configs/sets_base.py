r"""The single-image latent diffusion model of 64 px emoji in many hands, from which M2M on them starts.

    python -m m2m_jax.train --config configs/sets_base.py --workdir runs/sets_base \
        --config.autoencoder.path=pretrained/sets_vae
    python -m m2m_jax.to_diffusers --checkpoint runs/sets_base --output pretrained/sets_unet

`pretrained/sets_vae` is the first stage of configs/sets_vae.py. 8.9 million parameters, two levels over latents of
8x8x32, no Image-Set Attention: trained on sets of one image, unconditional. Trained on the training split only.
"""

from m2m_jax.configuration import TINY, apply_preset, default_config

PRESETS = {
    "tiny": {
        **TINY,
        "data.image_size": 32,
        "model.block_out_channels": (16, 32),
        "model.num_attention_heads": (2, 4),
    },
}


def get_config(preset: str = ""):
    config = default_config()
    config.data.name = "emoji_hands"
    config.data.image_size = 64
    config.data.images_per_set = 1
    config.data.batch_size = 64
    config.autoencoder.path = "pretrained/sets_vae"
    config.model.attentions = ("self",)
    config.model.block_out_channels = (96, 192)
    config.model.num_attention_heads = (3, 6)
    config.init.path = ""
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 300
    config.train.steps = 8_000
    config.eval.every = 1_000
    config.eval.batches = 8
    config.eval.batch_size = 64
    config.sample.guidance_scale = 1.0
    config.checkpoint.every = 50
    return apply_preset(config, preset, PRESETS)
