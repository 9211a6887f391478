"""How fast image sets from captions are read, against how fast training uses them up: side by side, on the same cores.

    make bench-reading                                         # the demo, its images as content
    python -m benchmarks.mis_reading --config configs/mis_sd21_self.py --notrain --pictures=PHOTOGRAPHS --num_sets=300 \
        --config.data.batch_size=4

Writes a data set as `m2m_jax.data.build_mis` does, of sets of 25 images (WebP) and their latents (float16), and reads
it as `m2m_jax.train` does (Grain, data.threads), with augmentation where the config has it for images, and none for
latents. Examples take 1, 10 or 25 images of a set. All are of a first epoch: nothing was decoded before, but files are
in memory, so a disk must bring the bytes that are said. Training takes steps of the config on a batch that is there.

The two take turns; what counts is the median over rounds. With --notrain only reading is measured, of any size.
"""

import copy
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from m2m_jax.building import build_folder
from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, Data
from m2m_jax.core import runtime
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import SUFFIXES, read_image
from m2m_jax.core.program import run_program
from m2m_jax.data import mis, precomputed, records
from m2m_jax.data.pipeline import batches, inputs, make_dataset, open_examples
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.training import sharding
from m2m_jax.training.setup import set_up
from m2m_jax.training.workload import NOT_READ, frozen_models

CONFIG = define_config_flag()
TRAIN = flags.DEFINE_bool("train", True, "Whether training is measured, too.")
PICTURES = flags.DEFINE_string("pictures", "", "Folder of images to store; empty: images of the config's data set.")
NUM_SETS = flags.DEFINE_integer("num_sets", 4000, "In the data set.", lower_bound=8)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Of each measurement.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 3.0, "Of reading in a round, at most; an epoch may be over sooner.")
STEPS = flags.DEFINE_integer("steps", 3, "Of training in a round.", lower_bound=1)

IMAGES_PER_SET = records.MAX_IMAGES_PER_RECORD
TAKEN = (1, 10, 25)  # images of a set
WANTED = 3.0  # times as fast as training
_PICTURES = 500
WEBP = {"format": "WEBP", "quality": 80}


class Training:
    """Steps of the config on a batch of its own data set, or on latents."""

    def __init__(self, config: Config, latents: bool):
        mesh = sharding.make_mesh(config.mesh)
        task = SetDiffusion(config)
        setup = set_up(task, config, mesh)
        self._frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
        examples = open_examples(config.data, split=config.data.train_split, seed=config.seed)
        batch = inputs(make_dataset(examples, batch_size=config.data.batch_size)[0])
        if latents:
            sets = batch.pop("images_bnhwc").shape[:2]
            shape = (*sets, *task.models.latent_shape(config.data.image_size))
            batch["latents_bnhwc"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        self._batch = sharding.make_global_batch(mesh, batch, config.data.batch_size)
        self._state = setup.create(task.init())
        self._step = setup.step.lower(self._state, self._frozen, self._batch).compile()
        self._images = config.data.batch_size * config.data.images_per_set

    def images_per_second(self, steps: int) -> float:
        """That training uses up."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(self._state)
        return steps * self._images / (time.perf_counter() - start)


def read_sets(data: Data, seed: int) -> tuple[float, float]:
    """Sets a second that are read of the data set in its first epoch, and seconds of processors that a set takes."""
    size = data.batch_size
    examples = open_examples(data, split="train", seed=seed)
    ready = batches(make_dataset(examples, batch_size=size, threads=data.threads), 0, data.prefetch)
    next(ready)  # threads start
    whole = examples.epoch_length // size - data.prefetch - 2  # what is made ahead is of this epoch, too
    count, start, processors = 0, time.perf_counter(), time.process_time()
    while count < whole and time.perf_counter() - start < SECONDS.value:
        next(ready)
        count += 1
    sets = count * size
    return sets / (time.perf_counter() - start), (time.process_time() - processors) / sets


def write_data_set(directory: Path, pictures: list[np.ndarray], size: int, latent_shape: tuple[int, ...]) -> None:
    """Sets of images uint8 [size, size, 3], each picture in many of them, with latents at random."""
    encoded = itertools.cycle([_webp(picture) for picture in pictures])
    settings = {
        "sets_per_shard": 100,
        "store": "both",
        "image_size": size,
        "latent_shape": list(latent_shape),
        "latents_dtype": "float16",
        "autoencoder": {},
    }
    build = mis.Build(mis.VERSION, settings, {"train": NUM_SETS.value}, {}, "python -m benchmarks.mis_reading")
    build_folder.start(directory, build)
    rng = np.random.default_rng(0)
    for shard in build.shards:
        writer = build_folder.ShardWriter(directory, shard, "")
        for number in shard.captions:
            images = tuple(itertools.islice(encoded, IMAGES_PER_SET))
            latents_nhwc = rng.standard_normal((IMAGES_PER_SET, *latent_shape)).astype(np.float16)
            record = records.ImageSetRecord(f"mis-{number:08d}", mis.KIND, "", images, latents=latents_nhwc)
            writer.add(precomputed.serialize(record), IMAGES_PER_SET)
        writer.finish()
    build_folder.finish(directory, build)


def load_pictures(config: Config, size: int) -> list[np.ndarray]:
    """uint8 [size, size, 3]."""
    if PICTURES.value:
        files = [path for path in sorted(Path(PICTURES.value).glob("**/*")) if path.suffix.lower() in SUFFIXES]
        if not files:
            raise UserError(f"--pictures={PICTURES.value}: no images there")
        return [read_image(file, size) for file in files]
    data = copy.deepcopy(config.data)
    data.update({"image_size": size, "images_per_set": 1})
    examples = open_examples(data, split=data.train_split, seed=0, augment=False)
    return [examples[index]["images_nhwc"][0] for index in range(_PICTURES)]


def main(argv):
    config = CONFIG.value
    config.data.path = config.data.path or NOT_READ
    validate(config)
    runtime.start()
    size = config.data.image_size
    latent_shape = frozen_models(config)[0].latent_shape(size)
    sides = {latents: Training(config, latents) for latents in (False, True)} if TRAIN.value else {}
    with tempfile.TemporaryDirectory() as directory:
        write_data_set(Path(directory), load_pictures(config, size), size, latent_shape)
        stored = sum(file.stat().st_size for file in mis.folder(directory).glob("*-of-*")) / NUM_SETS.value
        print(
            f"{jax.devices()[0].device_kind}: jax {jax.__version__}, {config.data.threads} threads; sets of "
            f"{IMAGES_PER_SET} images of {size} px and latents {list(latent_shape)}, {stored / 1e3:.0f} kB each"
        )
        cases = {}
        for latents, taken in itertools.product((False, True), TAKEN):
            data = copy.deepcopy(config.data)
            data.update({"name": "mis", "path": directory, "image_size": size})
            data.update({"images_per_set": taken, "latents": latents})
            data.augment.enabled &= not latents
            cases[latents, taken] = data
        read: dict[tuple[bool, int], list[tuple[float, float]]] = {case: [] for case in cases}
        used: dict[bool, list[float]] = {latents: [] for latents in sides}
        for number in range(ROUNDS.value):
            for latents, training in sides.items():
                used[latents].append(training.images_per_second(STEPS.value))
            for case, data in cases.items():
                read[case].append(read_sets(data, number))
    return 0 if report(read, used) else 1


def report(read: dict[tuple[bool, int], list[tuple[float, float]]], used: dict[bool, list[float]]) -> bool:
    """Prints the table; whether reading is fast enough everywhere."""
    print(
        "\n| read | of a set | sets/s | images/s | processor, ms an image | training uses, images/s | times as fast |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    enough = True
    for (latents, taken), rounds in read.items():
        sets, seconds = (statistics.median(values) for values in zip(*rounds, strict=True))
        images = sets * taken
        uses = statistics.median(used[latents]) if used else None
        ratio = images / uses if uses else None
        enough &= ratio is None or ratio >= WANTED
        print(
            f"| {'latents' if latents else 'images'} | {taken} | {sets:.4g} | {images:.4g} "
            f"| {1e3 * seconds / taken:.3g} | {f'{uses:.0f}' if uses else ''} | {f'{ratio:.1f}' if ratio else ''} |"
        )
    return enough


def _webp(image_hwc: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_hwc).save(buffer, **WEBP)
    return buffer.getvalue()


if __name__ == "__main__":
    run_program(main, CONFIG.take)
