"""Small data sets of `m2m_jax.data.mis`, written without a generator."""

import io
import pathlib

import numpy as np
from PIL import Image

from m2m_jax.building import build_folder
from m2m_jax.data import mis, precomputed, records

IMAGE_SIZE, LATENT_SHAPE = 32, (8, 8, 4)


def write_mis(
    directory: pathlib.Path,
    *,
    captions: dict[str, int],
    images_per_set: int = 4,
    store: str = "both",
    sets_per_shard: int = 5,
    autoencoder: dict | None = None,
    image_size: int = IMAGE_SIZE,
    latent_shape: tuple[int, int, int] = LATENT_SHAPE,
    image_options: dict | None = None,
) -> pathlib.Path:
    """Sets of coloured noise: `captions` of them in each split; set i has the id and the caption of `set_name`.

    autoencoder: what `precomputed.describe_autoencoder` gives of the one whose latents these are said to be.
    image_options: of Pillow's `save`.
    """
    build = mis.Build(
        version=mis.VERSION,
        settings={
            "sets_per_shard": sets_per_shard,
            "store": store,
            "image_size": image_size,
            "latent_shape": list(latent_shape),
            "latents_dtype": None if store == "images" else "float16",
            "autoencoder": autoencoder or {},
        },
        captions=captions,
        dropped_captions={},
        command="COMMAND",
    )
    build_folder.start(directory, build)
    for shard in build.shards:
        writer = build_folder.ShardWriter(directory, shard, "nothing")
        for number in shard.captions:
            record = make_record(
                shard.split, number, images_per_set, store, image_size, latent_shape, image_options or {"format": "PNG"}
            )
            writer.add(precomputed.serialize(record), record.num_images)
        writer.finish()
    assert build_folder.finish(directory, build) is not None
    return directory


def set_name(split: str, number: int) -> str:
    return f"{split} {number}"


def make_record(
    split: str,
    number: int,
    images_per_set: int,
    store: str,
    image_size: int,
    latent_shape: tuple[int, int, int],
    image_options: dict,
) -> records.ImageSetRecord:
    rng = np.random.default_rng([ord(split[0]), number])
    images, latents = [], None
    if store != "latents":
        noise = rng.integers(0, 256, (images_per_set, image_size // 8, image_size // 8, 3), np.uint8)
        for image_hwc in noise:
            buffer = io.BytesIO()
            Image.fromarray(image_hwc).resize((image_size, image_size), Image.BICUBIC).save(buffer, **image_options)
            images.append(buffer.getvalue())
    if store != "images":
        latents = rng.standard_normal((images_per_set, *latent_shape)).astype(np.float16)
    name = set_name(split, number)
    return records.ImageSetRecord(name, mis.KIND, name, tuple(images), latents=latents)
