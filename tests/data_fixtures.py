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
from PIL import Image

from m2m_jax.configuration import Data
from m2m_jax.data.emoji.preparing import prepare_emoji

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
        prepare_emoji(IMAGE_SIZE, str(directory), verbose=False)
    return str(directory)


def data_config(**changes) -> Data:
    """The `data` part of a configuration: all augmentations on, fields replaced by `changes`."""
    config = Data(image_size=IMAGE_SIZE)
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
