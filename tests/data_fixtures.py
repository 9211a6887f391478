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
from m2m_jax.core.images import decode_image, on_white
from m2m_jax.data import precomputed
from m2m_jax.data.preparing import prepare
from m2m_jax.data.records import ImageSetRecord

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
        prepare("emoji", IMAGE_SIZE, str(directory), verbose=False)
    return str(directory)


def distinct_images(sets) -> np.ndarray:
    """Every different image of some records, on white: uint8 [n, size, size, 3]."""
    encoded = dict.fromkeys(data for record in sets for data in record.images)
    return on_white(np.stack([np.asarray(decode_image(data, "an image")) for data in encoded]))


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


def write_latents(folder: pathlib.Path, *, splits: tuple[str, ...] = ("train",), num_sets: int = 6) -> pathlib.Path:
    """Precomputed latents of sets of 4 images of `IMAGE_SIZE`, in one shard a split."""
    for split in splits:
        manifest = precomputed.Manifest(
            version=precomputed.VERSION,
            image_size=IMAGE_SIZE,
            autoencoder={},
            latent_shape=[4, 4, 4],
            latent_dtype="float32",
            has_images=False,
            records_per_shard=num_sets,
            kinds=["folder"] * num_sets,
            num_images=[4] * num_sets,
            made_from="nothing",
            command="COMMAND",
        )
        precomputed.write_manifest(folder, split, manifest)
        latents = np.zeros((4, 4, 4, 4), np.float32)
        sets = [ImageSetRecord(f"s{i}", "folder", "", images=(), latents=latents) for i in range(num_sets)]
        precomputed.write_shard(precomputed.shard_path(folder, split, 0, 1), sets)
    return folder
