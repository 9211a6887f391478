"""M2M-Self on emoji sets, from the pretrained first stage and single-image U-Net in pretrained/.

python -m m2m_jax.train --config configs/emoji.py --workdir DIR       # hours on 2 cores, minutes on a GPU
python -m m2m_jax.train --config configs/emoji.py:demo --workdir DIR  # under 10 minutes on 2 cores
python -m m2m_jax.train --config configs/emoji.py:tiny --workdir DIR  # seconds: it works, no more
"""

from ml_collections import ConfigDict

from m2m_jax.configuration import apply_preset, default_config

PRESETS = {
    "demo": {
        "train.steps": 500,
        "train.log_every": 10,
        "train.ema_decay": 0.99,
        "optimizer.warmup_steps": 25,
        "eval.every": 250,
        "checkpoint.every": 250,
    },
    "tiny": {
        "data.images_per_set": 3,
        "data.batch_size": 8,
        "model.block_out_channels": (16, 32),
        "init.path": "",
        "train.steps": 8,
        "train.log_every": 2,
        "optimizer.warmup_steps": 2,
        "eval.every": 4,
        "eval.batches": 1,
        "eval.batch_size": 8,
        "sample.steps": 2,
        "checkpoint.every": 4,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    """preset: '' (the full run), demo or tiny."""
    return apply_preset(default_config(), preset, PRESETS)
