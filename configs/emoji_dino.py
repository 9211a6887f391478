"""M2M-DINO on emoji sets: configs/emoji.py with the preceding images as tokens of a frozen vision transformer.

    pip install -r requirements-dino.txt
    python -m m2m_jax.data.prepare
    python -m m2m_jax.data.prepare_vit --output data/vit_s14
    python -m m2m_jax.train --config configs/emoji_dino.py:demo --workdir runs/emoji_dino

The encoder has the shape of DINOv2-S/14 and is tuned for saliency: its last blocks are no longer features of the image,
those after block 9 are. It sees images of 56 pixels, 16 patches. Presets as in configs/emoji.py.
"""

import runpy
from pathlib import Path

from m2m_jax.configuration import Config


def get_config(preset: str = "") -> Config:
    """The config of a preset of configs/emoji.py, as M2M-DINO."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji.py")))["get_config"](preset)
    config.image_encoder.path = "data/vit_s14"
    config.image_encoder.image_size = 56
    config.image_encoder.layer = 9
    return config
