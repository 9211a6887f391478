"""The real emoji data set at 32 px, built once for all test workers (about 20 s), and small image folders.

In a test module:

    @pytest.fixture(scope="module")
    def emoji_directory(tmp_path_factory):
        return build_emoji(tmp_path_factory)
"""

import fcntl
import os
import pathlib

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from m2m_jax.data import prepare
from m2m_jax.images import decode_image, on_white

IMAGE_SIZE = 32


def build_emoji(tmp_path_factory) -> str:
    """The directory with the prepared data set: `data.directory` of a configuration."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own below the one of this run
    directory = root / "emoji_data"
    # Whoever comes second waits here and then finds the data set made.
    with open(root / "emoji_data.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare.prepare_emoji(IMAGE_SIZE, str(directory), verbose=False)
    return str(directory)


def distinct_images(sets) -> np.ndarray:
    """Every different image of some records, on white: uint8 [n, size, size, 3]."""
    encoded = dict.fromkeys(data for record in sets for data in record.images)
    return on_white(np.stack([np.asarray(decode_image(data, "an image")) for data in encoded]))


def data_config(**changes) -> ConfigDict:
    """The `data` part of a configuration: all augmentations on, fields replaced by `changes`."""
    config = ConfigDict(
        {
            "name": "emoji",
            "path": "",
            "latents": False,
            "directory": "data",
            "image_size": IMAGE_SIZE,
            "images_per_set": 4,
            "kinds": ("style", "content"),
            "caption_tag_dropout": 0.0,
            "on_error": "stop",
            "augment": {
                "enabled": True,
                "hue_degrees": 180.0,
                "ground_probability": 0.5,
                "ink_probability": 0.5,
                "contrast": 0.2,
                "scale": 0.15,
                "mirror_probability": 0.5,
            },
        }
    )
    config.update(changes)
    return config


def write_image_folder(root: pathlib.Path, *, num_sets: int, images_per_set: int) -> pathlib.Path:
    """A folder of folders of small coloured pictures of differing sizes and modes; every set is of one colour."""
    rng = np.random.default_rng(0)
    suffixes, modes = (".png", ".JPG", ".webp", ".jpeg"), ("RGBA", "L", "RGB", "RGB")
    for number in range(num_sets):
        subfolder = root / f"set{number:02d}"
        subfolder.mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for position in range(images_per_set):
            height, width = rng.integers(20, 90, 2)
            pixels = np.broadcast_to(colour, (height, width, 3)).astype(np.uint8)
            kind = position % len(suffixes)
            Image.fromarray(pixels).convert(modes[kind]).save(subfolder / f"{position}{suffixes[kind]}")
    return root
