"""How well a first stage rebuilds images: PSNR and ST-LPIPS of whole splits, and a sheet to look at.

    python -m benchmarks.first_stage --config configs/sets_base.py --config.autoencoder.path=models/sets_vae \
        --splits=validation,test,hands --output=runs/first_stage

Every distinct image of a split on white, none augmented: held-out subjects in known hands (validation, test), known
subjects in unseen hands (hands). PSNR is of the mean squared error over a split, in dB, of 8-bit images; beside it the
mean of the images' own. ST-LPIPS (VGG) is measured where --perceptual names a folder of
`m2m_jax.data.prepare_stlpips`. Writes OUTPUT.json, and OUTPUT-SPLIT.png: images above, rebuilt ones below.
"""

import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.core import disk, runtime
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square, on_white, write_png
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import open_source
from m2m_jax.models import stlpips
from m2m_jax.models.frozen import FrozenModels

CONFIG = define_config_flag()
SPLITS = flags.DEFINE_list("splits", ["validation", "test"], "Of the config's data set.")
OUTPUT = flags.DEFINE_string("output", None, "Where to write, without an ending.", required=True)
PERCEPTUAL = flags.DEFINE_string("perceptual", "", "Folder of ST-LPIPS; empty: PSNR alone.")
MAX_IMAGES = flags.DEFINE_integer(
    "max_images", 2000, "Of a split, evenly spread; all where there are fewer.", lower_bound=1
)

BATCH, COLUMNS, ROWS = 32, 16, 3


def distinct_images(source, size: int, at_most: int) -> np.ndarray:
    """Reads the different images of a source, on white: uint8 [n, size, size, 3]. at_most: so many, evenly spread."""
    encoded = list(dict.fromkeys(data for i in range(len(source.kinds)) for data in source[i].images))
    chosen = [encoded[i] for i in np.unique(np.linspace(0, len(encoded) - 1, at_most).astype(int))]
    return on_white(np.stack([np.asarray(fit_square(decode_image(data, source.name), size)) for data in chosen]))


def rebuild(models: FrozenModels, params, images_nhwc: np.ndarray) -> np.ndarray:
    """Encodes and decodes, a batch at a time; the last is filled up, so that one program is compiled."""

    @jax.jit
    def through(params, images_bhwc):
        return models.decode(params, models.encode(params, images_bhwc))

    padded = np.concatenate([images_nhwc, np.repeat(images_nhwc[:1], -len(images_nhwc) % BATCH, axis=0)])
    parts = [np.asarray(through(params, padded[i : i + BATCH])) for i in range(0, len(padded), BATCH)]
    return np.concatenate(parts)[: len(images_nhwc)]


def perceptual_distance(weights, images_nhwc: np.ndarray, rebuilt_nhwc: np.ndarray) -> float:
    """Averages ST-LPIPS (VGG) over uint8 images and what became of them."""
    measure = jax.jit(stlpips.distance)
    scaled = [x.astype(np.float32) / 127.5 - 1 for x in (images_nhwc, rebuilt_nhwc)]
    values = [measure(weights, *(x[i : i + BATCH] for x in scaled)) for i in range(0, len(images_nhwc), BATCH)]
    return float(np.mean(np.concatenate(values)))


def sheet(images_nhwc: np.ndarray, rebuilt_nhwc: np.ndarray) -> np.ndarray:
    """Rows of images, evenly spread, and under each what became of it: uint8 [h, w, 3]."""
    count = min(len(images_nhwc), COLUMNS * ROWS)
    chosen = np.linspace(0, len(images_nhwc) - 1, count).astype(int)
    rows = []
    for first in range(0, count - count % COLUMNS, COLUMNS):
        rows += [np.concatenate(list(x[chosen[first : first + COLUMNS]]), axis=1) for x in (images_nhwc, rebuilt_nhwc)]
    return np.concatenate(rows)


def main(argv):
    del argv
    config = CONFIG.value
    validate(config)
    runtime.start()
    models, params = FrozenModels.load(config)
    weights = stlpips.load_stlpips(PERCEPTUAL.value) if PERCEPTUAL.value else None
    scores = {}
    for split in SPLITS.value:
        source = open_source(config.data, split)
        if not source.has_images:
            raise UserError(f"{source.name} holds latents alone; name the data set of images")
        images = distinct_images(source, config.data.image_size, MAX_IMAGES.value)
        rebuilt = rebuild(models, params, images)
        errors = np.mean((images.astype(np.float64) - rebuilt) ** 2, axis=(1, 2, 3))
        score = {
            "images": len(images),
            "psnr_db": 10 * np.log10(255**2 / errors.mean()),
            "mean_of_psnr_db": float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-3)))),
        }
        if weights is not None:
            score["st_lpips_vgg"] = perceptual_distance(weights, images, rebuilt)
        scores[split] = score
        print(f"{split}: " + "  ".join(f"{name} {value:.4g}" for name, value in score.items()), flush=True)
        write_png(f"{OUTPUT.value}-{split}.png", sheet(images, rebuilt))
    disk.write(Path(f"{OUTPUT.value}.json"), f"{json.dumps(scores, indent=2)}\n".encode())


if __name__ == "__main__":
    run_program(main, CONFIG.take)
