"""A data set encoded once: training then reads latents and needs no pass through the encoder.

    precompute(config, Precomputation(split="train", output="data/latents"))

What is stored, and how several processes share the work: the docstring of `m2m_jax.data.precompute`.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2m_jax.building.options import Precomputation
from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, Data, reads_latents
from m2m_jax.core import runtime, work_sharing
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image, fit_square, on_white
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.printing import say
from m2m_jax.data import precomputed, records
from m2m_jax.data.pipeline import RecordSource, open_source
from m2m_jax.data.shards import count_records
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams

_SETS_READ_AHEAD = 8
Encode = Callable[[np.ndarray], jax.Array]  # uint8 [batch, S, S, 3] to scaled float32 latents [batch, h, w, c]


def precompute(
    config: Config,
    options: Precomputation,
    *,
    command: str = "m2m_jax.building.latents.precompute",
    report: Callable[[str], object] = say,
) -> int:
    """Encode this process's shards of a split, and return an exit code: 0, or that of `Interruption` if told to stop.

    Shards that are there already are left. Processes that JAX joined return when all shards are there.

    Args:
      config: names the data set of images, its size, and the autoencoder, where `options` does not.
      command: what makes a shard again that is damaged; for messages.
      report: given a line for each shard.

    Raises:
      UserError: the data or the autoencoder cannot be used so, or the folder holds other latents or cannot be written.
    """
    config = copy.deepcopy(config)
    config.autoencoder.path = str(options.autoencoder or config.autoencoder.path)
    config.data.on_error = "stop"  # every set has its place
    validate(config)
    if reads_latents(config.data):
        raise UserError(
            f"config.data.name={config.data.name} is latents already; name the data set of images to encode"
        )
    config.image_encoder.path = config.text_encoder.path = ""  # they have no part in this
    runtime.start()
    index, count = options.process()
    source = open_source(config.data, options.split)
    _check_source(source)
    models, params = FrozenModels.load(config)
    models.require_image_size(config.data.image_size)
    encode = _make_encode(models, params, options.batch_size)

    manifest = precomputed.Manifest(
        version=precomputed.VERSION,
        image_size=config.data.image_size,
        autoencoder=precomputed.describe_autoencoder(models.autoencoder, params[AUTOENCODER]),
        latent_shape=list(models.latent_shape(config.data.image_size)),
        latent_dtype=options.dtype,
        has_images=options.keep_images,
        records_per_shard=options.records_per_shard,
        kinds=list(source.kinds),
        num_images=list(source.num_images),
        attributes=dict(source.attributes),
        made_from=source.name,
        command=command,
    )
    precomputed.write_manifest(options.output, options.split, manifest)
    shards = {
        precomputed.shard_path(options.output, options.split, shard, manifest.num_shards): manifest.shard_records(shard)
        for shard in range(manifest.num_shards)
    }
    with Interruption(together=False) as interruption:
        for path, indices in itertools.islice(shards.items(), index, None, count):
            if count_records(path) == len(indices):
                report(f"{path.name}: there already")
                continue
            if interruption.requested(0):
                break
            started = time.monotonic()
            precomputed.write_shard(path, _encoded_records(source, indices, config.data, options, encode))
            images = sum(source.num_images[i] for i in indices)
            rate = images / (time.monotonic() - started)
            report(f"{path.name}: {len(indices)} sets, {images} images, {rate:.0f} images/s")
        names = {path.name for path in shards}  # a shard has its name when it is whole
        whole = work_sharing.wait_for_all(lambda: names <= set(os.listdir(options.output)), interruption)
        if not whole and interruption.requested(0):
            report(f"stopped; go on with: {manifest.command}")
            return interruption.exit_code()
    return 0


def _check_source(source: RecordSource) -> None:
    """Refuse sets that no record can hold (a folder on disk has no such limit)."""
    most = int(np.argmax(source.num_images))
    if source.num_images[most] > records.MAX_IMAGES_PER_RECORD:
        raise UserError(
            f"{source.name}, set {source[most].set_id!r}: {source.num_images[most]} images; a record holds up to "
            f"{records.MAX_IMAGES_PER_RECORD}: divide the set"
        )


def _make_encode(models: FrozenModels, params: FrozenParams, batch_size: int) -> Encode:
    """Return the compiled encoder of training; the devices of this host share each batch."""
    devices = jax.local_devices()
    if batch_size % len(devices):
        raise UserError(f"--batch_size is {batch_size}; it must be a multiple of the {len(devices)} devices")
    mesh = Mesh(np.array(devices), ("data",))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    encode = jax.jit(models.encode)
    return lambda images_bhwc: encode(params, jax.device_put(images_bhwc, NamedSharding(mesh, PartitionSpec("data"))))


def _encoded_records(
    source: RecordSource, indices: range, data: Data, options: Precomputation, encode: Encode
) -> Iterator[records.ImageSetRecord]:
    """Yield the records of one shard, with latents. Batches end with it: its bytes depend on no other shard."""

    def load(index: int) -> tuple[records.ImageSetRecord, np.ndarray]:
        record = source[indices[int(index)]]
        squares = [
            fit_square(decode_image(image, record.image_name(i)), data.image_size)
            for i, image in enumerate(record.images)
        ]
        return record, on_white(np.stack(squares))

    ahead_of_use = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=_SETS_READ_AHEAD)
    loaded = iter(grain.MapDataset.range(len(indices)).map(load).to_iter_dataset(ahead_of_use))
    sets, ahead = itertools.tee(loaded)
    latents = _encode_images(
        (image_hwc for _, images_nhwc in ahead for image_hwc in images_nhwc), encode, options.batch_size
    )
    for record, images_nhwc in sets:
        latents_nhwc = np.stack(list(itertools.islice(latents, len(images_nhwc)))).astype(options.dtype)
        if not np.isfinite(latents_nhwc).all():
            raise UserError(
                f"set {record.set_id!r}: its latents are not finite as {options.dtype}; is this the autoencoder?"
            )
        yield records.ImageSetRecord(
            set_id=record.set_id,
            kind=record.kind,
            caption=record.caption,
            images=record.images if options.keep_images else (),
            image_captions=record.image_captions,
            latents=latents_nhwc,
            attributes=record.attributes,
        )


def _encode_images(images: Iterable[np.ndarray], encode: Encode, batch_size: int) -> Iterator[np.ndarray]:
    """Yield latents float32 [h, w, c] of images uint8 [S, S, 3]."""
    images = iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        # The last batch is filled up: one shape, compiled once.
        full_bhwc = np.stack(batch + [batch[-1]] * (batch_size - len(batch)))
        yield from np.asarray(encode(full_bhwc))[: len(batch)]
