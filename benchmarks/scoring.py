"""Seconds and memory of scoring many sets whose features are kept: `python -m benchmarks.scoring`.

Writes random records (10,000 sets of 10 images at 64 px unless told otherwise) and the features that an encoder would
have given them, and then runs m2m_jax.score on them in a process of its own. The encoder is never called: figures cost
the same whatever it is, but for the width of its features.

    python -m benchmarks.scoring --sets=10000 --width=1280 --scores=mind,similarity
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from m2m_jax.core import disk
from m2m_jax.core.images import png_bytes
from m2m_jax.data import generated
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.scoring import features
from m2m_jax.scoring.encoders import FEATURES, SetEncoder
from m2m_jax.scoring.sets import open_sets

GIVEN = 4


class Known(SetEncoder):
    """Says random features of any image."""

    def __init__(self, width: int):
        self.name, self.fingerprint, self.dim = "pixels-8", "", width

    def outputs(self, images_bhwc: np.ndarray) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(int(images_bhwc[0, 0, 0].sum()))
        return {FEATURES: rng.standard_normal((len(images_bhwc), self.dim), np.float32)}


def write_sets(folder: pathlib.Path, num_sets: int, num_images: int, size: int, seed: int) -> None:
    """Records of flat images, which are read as fast as any of few bytes."""
    rng = np.random.default_rng(seed)
    names = [f"set{number:06d}" for number in range(num_sets)]
    made = num_images - GIVEN
    manifest = generated.Manifest(
        *(generated.VERSION, {"seed": seed}, GIVEN, made, size, "records", 512, names, ["mis"] * num_sets, {}, {})
    )
    generated.start(folder, manifest)
    for shard, numbers in enumerate(manifest.shards):
        colours = rng.integers(0, 256, (len(numbers), num_images, 1, 1, 3), np.uint8)
        sets = (
            ImageSetRecord(
                *(names[number], "mis", ""),
                images=tuple(png_bytes(np.broadcast_to(colour, (size, size, 3))) for colour in of_set),
            )
            for number, of_set in zip(numbers, colours, strict=True)
        )
        generated.write_shard(folder, manifest, shard, sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("sets", 10_000), ("images", 10), ("size", 64), ("width", 1280)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scores", default="frechet,similarity")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        for seed, name in enumerate(("made", "real")):
            write_sets(root / name, options.sets, options.images, options.size, seed)
            features.features_of(open_sets(str(root / name)), Known(options.width), root / "features")
        began = time.monotonic()
        command = [sys.executable, "-m", "m2m_jax.score", f"--given={GIVEN}", f"--scores={options.scores}"]
        command += [f"--{name}={root / name}" for name in ("features",)] + [f"--output={root / 'scores'}"]
        command += [f"--generated={root / 'made'}", f"--real={root / 'real'}"]
        subprocess.run(command, check=True, cwd=disk.__file__.partition("/m2m_jax/")[0])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{options.sets} sets of {options.images} images at {options.size} px, features of {options.width}: "
            f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU, "
            f"{used.ru_maxrss / 2**20:.2f} GiB"
        )


if __name__ == "__main__":
    main()
