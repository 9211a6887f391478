"""M2M-Self on emoji sets, from the autoencoder and the single-image U-Net in pretrained/.

    python -m m2m_jax.data.prepare
    python -m m2m_jax.train --config configs/emoji.py:demo --workdir runs/demo

Presets: none, the full run (hours on 2 cores, minutes on a GPU); `:demo`, what `make demo` trains (under 10 minutes on
2 cores); `:road`, twice that, for `make road`; `:tiny`, seconds, for tests. `--config.init.path=` (empty) starts from
scratch. Results: docs/emoji.md.
"""

from m2m_jax.configuration import TINY, Config, apply_preset, default_config

PRESETS = {
    "demo": {
        "train.steps": 500,
        "train.log_every": 10,
        "train.ema_decay": 0.99,
        "optimizer.warmup_steps": 25,
        "eval.every": 250,
        "checkpoint.every": 100,
    },
    "road": {  # `make road` compares runs on synthetic and on real sets with each other
        "train.steps": 1_000,
        "train.ema_decay": 0.99,
        "optimizer.warmup_steps": 50,
        "eval.every": 500,
        "checkpoint.every": 100,
    },
    "tiny": {
        **TINY,
        "model.block_out_channels": (16, 32),
        "init.path": "",
        "train.steps": 6,
        "train.log_every": 1,
        "eval.every": 3,
        "checkpoint.every": 3,
    },
}


def get_config(preset: str = "") -> Config:
    """The config of a preset; '' is the full run."""
    config = default_config()
    config.optimizer.learning_rate = 5e-4
    config.optimizer.attn2_rate = 4.0
    config.train.steps = 8_000
    config.train.ema_decay = 0.995
    config.eval.every = 1_000
    config.eval.batches = 16
    config.checkpoint.every = 500
    return apply_preset(config, preset, PRESETS)
