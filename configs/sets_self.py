"""M2M-Self on 64 px emoji in many hands, from the first stage and the single-image model of the same data.

    make npm-emoji hands
    python -m m2m_jax.train --config configs/sets_self.py --workdir runs/sets_self

Starts from `pretrained/sets_vae` and `pretrained/sets_unet` (configs/sets_vae.py, configs/sets_base.py); `make
pretrain` trains all of them in turn. Sets of six: a content row shows one subject in six
hands, a style row six subjects in one. The test splits hold subjects that no stage has seen, `hands` and `test_hands`
hands that none has.
"""

from m2m_jax.configuration import TINY, Config, apply_preset, default_config

PRESETS = {
    "tiny": {
        **TINY,
        "data.image_size": 32,
        "data.images_per_set": 4,
        "model.block_out_channels": (16, 32),
        "model.num_attention_heads": (2, 4),
        "init.path": "",
    },
}


def get_config(preset: str = "") -> Config:
    """The config of a preset; '' is the full run."""
    config = default_config()
    config.data.name = "emoji_hands"
    config.data.image_size = 64
    config.data.images_per_set = 6
    config.data.batch_size = 16
    config.autoencoder.path = "pretrained/sets_vae"
    config.model.block_out_channels = (96, 192)
    config.model.num_attention_heads = (3, 6)
    config.init.path = "pretrained/sets_unet"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.attn2_rate = 4.0
    config.optimizer.warmup_steps = 200
    config.train.steps = 8_000
    config.eval.every = 1_000
    config.eval.batches = 8
    config.checkpoint.every = 100
    return apply_preset(config, preset, PRESETS)
