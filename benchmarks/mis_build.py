"""What building image sets costs beside generating them: images a second, as a share of the generator's own.

    python -m benchmarks.mis_build --generator=runs/emoji_t2i
    python -m benchmarks.mis_build --generator=stable-diffusion-2-1-base --dtype=bfloat16 --store=both

One side makes shards as `m2m_jax.data.build_mis` does, cleaned, encoded and on disk at the end; the other calls the
generator for the same batches, always two at once, and does nothing with the images. They take turns, and the first of
a pair is the second of the next; what counts is the median of the pairs' shares. On a CPU the threads that encode take
time from the generator; an accelerator has the cores beside it.
"""

import tempfile
import time
from collections.abc import Callable

import jax
from absl import flags

from benchmarks.overhead import median_and_range
from m2m_jax.building import building
from m2m_jax.building.cleaning import SetRules
from m2m_jax.building.image_formats import IMAGE_FORMATS
from m2m_jax.core import runtime
from m2m_jax.core.program import run_program
from m2m_jax.data import mis, records
from m2m_jax.sampling.text_to_image import TextToImage

GENERATOR = flags.DEFINE_string("generator", None, "As for m2m_jax.data.build_mis.", required=True)
DTYPE = flags.DEFINE_string("dtype", None, "Of the U-Net's computation.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Pixels a side.")
STEPS = flags.DEFINE_integer("steps", None, "Of the stepper.")
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Of the caption.")
IMAGES_PER_SET = flags.DEFINE_integer("images_per_set", 25, "Images of a caption.")
SETS_AT_ONCE = flags.DEFINE_integer("sets_at_once", 1, "A device makes together.")
STORE = flags.DEFINE_enum("store", "images", records.STORES, "What records hold.")
IMAGE_FORMAT = flags.DEFINE_enum("image_format", "webp_lossless", IMAGE_FORMATS, "Of stored images.")
BATCHES = flags.DEFINE_integer("batches", 12, "Calls of the generator on each side of a pair.")
ROUNDS = flags.DEFINE_integer("rounds", 8, "Pairs.")

_LIMIT = 0.9  # what is promised


def main(argv):
    runtime.fix_cpu_threads()
    runtime.start()
    generator = TextToImage.open(
        GENERATOR.value,
        image_size=IMAGE_SIZE.value,
        dtype=DTYPE.value,
        steps=STEPS.value,
        guidance_scale=GUIDANCE.value,
    )
    number = BATCHES.value * SETS_AT_ONCE.value * generator.num_devices
    shard, captions = mis.Shard("train", 0, 1, range(number)), {"train": [(i, f"caption {i}") for i in range(number)]}
    batching = building.Batching(IMAGES_PER_SET.value, SETS_AT_ONCE.value, IMAGES_PER_SET.value, seed=0)
    make_set = building.SetMaker(STORE.value, IMAGE_FORMAT.value, 90, "float16", SetRules())

    def build() -> None:
        with tempfile.TemporaryDirectory() as output:
            mis.folder(output).mkdir(parents=True)
            building.build_shards(output, [shard], captions, generator, batching, make_set, report=lambda line: None)

    def generate() -> None:
        before = None
        for _, _, arrays in batching.calls(batching.slots([shard], captions), generator):
            jax.block_until_ready(before)
            before = arrays
        jax.block_until_ready(before)

    images = number * IMAGES_PER_SET.value
    print(
        f"{jax.devices()[0].device_kind}: {generator.num_devices} devices, jax {jax.__version__}; {number} sets of "
        f"{IMAGES_PER_SET.value} images of {generator.image_size} px, {STORE.value} as {IMAGE_FORMAT.value}",
        flush=True,
    )
    generate(), build()  # compiles
    slot = next(batching.slots([shard], captions))
    _, latents_bnhwc, images_bnhwc = next(batching.generate(batching.slots([shard], captions), generator))
    seconds = min(_seconds(lambda: make_set(slot, latents_bnhwc[0], images_bnhwc[0])) for _ in range(5))
    print(f"cleaning and encoding: {1e3 * seconds / IMAGES_PER_SET.value:.2f} ms of one core an image", flush=True)
    print("\n| generated alone | built | share |\n|---|---|---|", flush=True)
    shares = []
    for turn in range(ROUNDS.value):
        seconds = {side: _seconds(side) for side in ((build, generate) if turn % 2 else (generate, build))}
        shares.append(seconds[generate] / seconds[build])
        print(
            f"| {images / seconds[generate]:.1f} images/s | {images / seconds[build]:.1f} | {shares[-1]:.1%} |",
            flush=True,
        )
    median, low, high = median_and_range(shares)
    print(f"\n{median:.1%} of the generator's own images a second ({low:.1%} to {high:.1%} with 95 % confidence)")
    return 0 if median >= _LIMIT else 1


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_program(main)
