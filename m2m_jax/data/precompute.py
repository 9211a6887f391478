"""Encodes a data set once: training then reads latents and needs no pass through the encoder.

    python -m m2m_jax.data.precompute --config configs/emoji.py --split=train --output=data/latents
    python -m m2m_jax.data.precompute --config configs/emoji.py --split=validation --output=data/latents
    python -m m2m_jax.train --config configs/emoji.py --workdir runs/emoji --config.data.name=precomputed \
        --config.data.path=data/latents --config.data.augment.enabled=False

Every set of the config's data set becomes one record (`records.py`) with the latents of all its images: on white, at
data.image_size, the posterior's mean times the scaling factor, which is what training computes on the fly. Nothing is
augmented, for one augmentation has to be drawn for each set and step: training with augmentation encodes on the fly,
and data.name=precomputed refuses data.augment.enabled. Which images of a set are used, and in which order, is still
drawn at training time. Latents are bound to the weights that made them; training with others is refused.

Shards appear whole: a run that was interrupted, or killed, goes on with the first shard that is missing. SIGTERM and
Ctrl-C end it after the shard being made. Several processes, also on several hosts with one file system, share the
shards of a split where each is told its --process_index and --process_count; processes that M2M_PROCESSES joins
(`runtime.py`) know theirs, and end when all shards are there. Layout of the folder: `precomputed.py`.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, Data, reads_latents
from m2m_jax.core import runtime, work_sharing
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square, on_white
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.program import run_program
from m2m_jax.data import precomputed, records
from m2m_jax.data.pipeline import SOURCES, RecordSource
from m2m_jax.data.shards import count_records
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams

CONFIG = define_config_flag()
SPLIT = flags.DEFINE_string("split", "train", "Which split of the data set.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, or to complete: data.path.", required=True)
FOLDER = flags.DEFINE_string("autoencoder", None, "Folder in diffusers' layout; config.autoencoder.path if not given.")
DTYPE = flags.DEFINE_enum("dtype", "float32", records.LATENT_DTYPES, "What latents are stored as.")
KEEP_IMAGES = flags.DEFINE_bool("keep_images", False, "Store the encoded images beside their latents.")
RECORDS_PER_SHARD = flags.DEFINE_integer("records_per_shard", 512, "Sets in a shard.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images encoded at once.")
flags.adopt_module_key_flags(work_sharing)  # in --help

_SETS_READ_AHEAD = 8
Encode = Callable[[np.ndarray], jax.Array]  # uint8 [batch, S, S, 3] to scaled float32 latents [batch, h, w, c]


def main(argv):
    config, output, split = CONFIG.value, Path(OUTPUT.value), SPLIT.value
    config.autoencoder.path = FOLDER.value or config.autoencoder.path
    config.data.on_error = "stop"  # every set has its place
    validate(config)
    config.image_encoder.path = config.text_encoder.path = ""  # they have no part in this
    check_flags(config, output)
    runtime.start()
    index, count = work_sharing.process()
    source = SOURCES[config.data.name](config.data, split)
    check_source(source)
    models, params = FrozenModels.load(config)
    models.require_image_size(config.data.image_size)
    encode = make_encode(models, params, BATCH_SIZE.value)

    manifest = precomputed.Manifest(
        version=precomputed.VERSION,
        image_size=config.data.image_size,
        autoencoder=precomputed.describe_autoencoder(models.autoencoder, params[AUTOENCODER]),
        latent_shape=list(models.latent_shape(config.data.image_size)),
        latent_dtype=DTYPE.value,
        has_images=KEEP_IMAGES.value,
        records_per_shard=RECORDS_PER_SHARD.value,
        kinds=list(source.kinds),
        num_images=list(source.num_images),
        made_from=source.name,
        command=work_sharing.command("m2m_jax.data.precompute"),
    )
    precomputed.write_manifest(output, split, manifest)
    shards = {
        precomputed.shard_path(output, split, shard, manifest.num_shards): manifest.shard_records(shard)
        for shard in range(manifest.num_shards)
    }
    with Interruption(together=False) as interruption:
        for path, indices in itertools.islice(shards.items(), index, None, count):
            if count_records(path) == len(indices):
                print(f"{path.name}: there already", flush=True)
                continue
            if interruption.requested(0):
                break
            started = time.monotonic()
            precomputed.write_shard(path, encoded_records(source, indices, config.data, encode))
            images = sum(source.num_images[i] for i in indices)
            rate = images / (time.monotonic() - started)
            print(f"{path.name}: {len(indices)} sets, {images} images, {rate:.0f} images/s", flush=True)
        names = {path.name for path in shards}  # a shard has its name when it is whole
        whole = work_sharing.wait_for_all(lambda: names <= set(os.listdir(output)), interruption)
        if not whole and interruption.requested(0):
            print(f"stopped; go on with: {manifest.command}", flush=True)
            return interruption.exit_code()
    return 0


def check_flags(config: Config, output: Path) -> None:
    """Refuses flags that cannot be meant, before anything is opened."""
    if reads_latents(config.data):
        raise UserError(
            f"config.data.name={config.data.name} is latents already; name the data set of images to encode"
        )
    for flag in (RECORDS_PER_SHARD, BATCH_SIZE):
        if flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, not {flag.value}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    work_sharing.check_process_flags()


def check_source(source: RecordSource) -> None:
    """Refuses sets that no record can hold (a folder on disk has no such limit)."""
    most = int(np.argmax(source.num_images))
    if source.num_images[most] > records.MAX_IMAGES_PER_RECORD:
        raise UserError(
            f"{source.name}, set {source[most].set_id!r}: {source.num_images[most]} images; a record holds up to "
            f"{records.MAX_IMAGES_PER_RECORD}: divide the set"
        )


def make_encode(models: FrozenModels, params: FrozenParams, batch_size: int) -> Encode:
    """The compiled encoder of training; the devices of this host share each batch."""
    devices = jax.local_devices()
    if batch_size % len(devices):
        raise UserError(f"--batch_size is {batch_size}; it must be a multiple of the {len(devices)} devices")
    mesh = Mesh(np.array(devices), ("data",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    encode = jax.jit(models.encode)
    return lambda images_bhwc: encode(params, jax.device_put(images_bhwc, NamedSharding(mesh, PartitionSpec("data"))))


def encoded_records(
    source: RecordSource, indices: range, data: Data, encode: Encode
) -> Iterator[records.ImageSetRecord]:
    """The records of one shard, with latents. Batches end with the shard: its bytes do not depend on other shards."""

    def load(index: int) -> tuple[records.ImageSetRecord, np.ndarray]:
        record = source[indices[int(index)]]
        squares = [
            fit_square(decode_image(image, record.image_name(i)), data.image_size)
            for i, image in enumerate(record.images)
        ]
        return record, on_white(np.stack(squares))

    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=_SETS_READ_AHEAD)
    loaded = iter(grain.MapDataset.range(len(indices)).map(load).to_iter_dataset(options))
    sets, ahead = itertools.tee(loaded)
    latents = encode_images((image_hwc for _, images_nhwc in ahead for image_hwc in images_nhwc), encode)
    for record, images_nhwc in sets:
        latents_nhwc = np.stack(list(itertools.islice(latents, len(images_nhwc)))).astype(DTYPE.value)
        if not np.isfinite(latents_nhwc).all():
            raise UserError(
                f"set {record.set_id!r}: its latents are not finite as {DTYPE.value}; is this the autoencoder?"
            )
        yield records.ImageSetRecord(
            set_id=record.set_id,
            kind=record.kind,
            caption=record.caption,
            images=record.images if KEEP_IMAGES.value else (),
            image_captions=record.image_captions,
            latents=latents_nhwc,
        )


def encode_images(images: Iterable[np.ndarray], encode: Encode) -> Iterator[np.ndarray]:
    """Latents float32 [h, w, c] of images uint8 [S, S, 3]."""
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH_SIZE.value)):
        # The last batch is filled up: one shape, compiled once.
        full_bhwc = np.stack(batch + [batch[-1]] * (BATCH_SIZE.value - len(batch)))
        yield from np.asarray(encode(full_bhwc))[: len(batch)]


if __name__ == "__main__":
    run_program(main, CONFIG.take)
