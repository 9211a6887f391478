"""M2M-Self on your own folders of images, at 32 px, from the emoji models in pretrained/.

    python -m m2m_jax.train --config configs/folder.py:demo --config.data.path=DIR --workdir runs/mine

DIR is a folder of folders of images, each subfolder a set of at least data.images_per_set. Presets as in
configs/emoji.py: `:demo` is under 10 minutes on 2 cores. Sets are mirrored and not otherwise changed: the colours and
grounds of photographs are their own. What it draws is as coarse as its autoencoder, which has seen emoji alone; for
more, train one of your own (configs/emoji_vae.py) or start from Stable Diffusion (configs/mis_sd21_self.py).
"""

import runpy
from pathlib import Path

from m2m_jax.configuration import Config


def get_config(preset: str = "") -> Config:
    """The config of a preset of configs/emoji.py, for folders."""
    config = runpy.run_path(str(Path(__file__).with_name("emoji.py")))["get_config"](preset)
    config.data.name = "folder"
    config.data.augment.update(hue_degrees=0.0, ground_probability=0.0, ink_probability=0.0, contrast=0.0, scale=0.0)
    config.eval.augment = False  # held-out sets are measured as they are
    return config
