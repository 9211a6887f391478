"""Sets from sets: of each set of a data set some images are given, and further ones are made of them.

From a program: `python -m m2m_jax.generate`. From Python, with the same result byte for byte:

    options = SetGeneration(checkpoint="runs/emoji", data="runs/emoji/test_sets", given=3, num_images=4, output="made")
    generate_sets(options, steps=25)                      # settings of sampling, as for `Sampler.from_checkpoint`
    open_named("made")[0].images                          # PNGs of the first set: 3 given, 4 made

The noise of a set depends on (seed, number of the set in its data set) alone. A device makes the same sets together
however many devices and processes share the work, so their numbers agree to the last bit where the machines run the
same kernels, as CPUs of one kind do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m2m_jax.core import disk, runtime, work_sharing
from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.images import on_white, png_bytes
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.printing import say
from m2m_jax.data import generated, records
from m2m_jax.data.fetch import HostFetch
from m2m_jax.data.source import RecordSource, open_named
from m2m_jax.sampling import bundle
from m2m_jax.sampling.generation_options import SetGeneration
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.set_sampler import SetSampler
from m2m_jax.sampling.settings import SamplingSettings

_KINDS_SHOWN = 5


def generate_sets(
    options: SetGeneration,
    *,
    sampler: SetSampler | None = None,
    report: Callable[[str], object] = say,
    **settings: Any,
) -> int:
    """Make this process's shards of generated sets, and return an exit code: 0, or that of `Interruption`.

    Shards that are there already are left. Processes that JAX joined return when all shards are there.

    Args:
      options: from what, how many and where to.
      sampler: in the place of the one of `options.checkpoint`, with settings of its own.
      report: given a line for each shard.
      settings: fields of `SamplingSettings` that replace those of the run's config; a bundle's are fixed.

    Raises:
      UserError: model or data cannot be used so, there are too few sets, or the folder holds sets that were made
        otherwise, or cannot be written.
    """
    SamplingSettings(**settings)  # refuses bad ones before anything is read
    runtime.fix_cpu_threads()
    runtime.start()
    source = open_named(options.data)
    numbers = _choose(source, options)
    sampler = sampler or _open(options.checkpoint, settings)
    manifest = _manifest(options, source, numbers, sampler)
    generated.start(options.output, manifest)
    index, count = options.process()
    with Interruption(together=False) as interruption:
        shards = range(len(manifest.shards))[index::count]
        missing = [shard for shard in shards if not generated.is_done(options.output, manifest, shard)]
        if len(missing) < len(shards):
            report(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
        try:
            for shard in missing:
                of_shard = numbers[manifest.shards[shard]]
                made = _made_sets(options, source, of_shard, sampler, lambda: interruption.requested(0))
                generated.write_shard(options.output, manifest, shard, made)
                last = manifest.shards[shard].stop
                report(f"shard {shard + 1} of {len(manifest.shards)}: up to set {last} of {len(numbers)}")
        except _Stopped:
            report("stopped; the same command goes on")
            return interruption.exit_code()
        whole = work_sharing.wait_for_all(lambda: generated.all_named(options.output, manifest), interruption)
        if not whole:
            stopped = interruption.requested(0)
            report("stopped; the same command goes on" if stopped else "done; other processes have shards to make")
            return interruption.exit_code() if stopped else 0
    with disk.errors(options.output):
        disk.remove_leftovers(options.output)
    report(f"{options.output}: {len(numbers)} sets, {options.given} images given and {options.num_images} made of each")
    return 0


class _Stopped(Exception):
    """The process was told to stop; what was begun is left out."""


def set_seed(seed: int, number: int) -> int:
    """Return the seed of the noise of one set, in [0, 2**32), of the seed of all and the set's number."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _open(checkpoint: Path, settings: dict[str, Any]) -> SetSampler:
    """Return the sampler of a checkpoint, or of a bundle, on all devices of this process."""
    if not (checkpoint / bundle.PARAMS).exists():
        return Sampler.from_checkpoint(checkpoint, devices=tuple(jax.local_devices()), **settings)
    if settings:
        raise UserError(f"--{next(iter(settings))}: {checkpoint} is a bundle, whose settings are fixed; export another")
    return bundle.Bundle(checkpoint)


def _choose(source: RecordSource, options: SetGeneration) -> np.ndarray:
    """Return the numbers of the sets that are used, in order.

    Fewer than there are are a choice that depends on nothing but how many there are: a data set may be sorted.
    """
    if not source.has_images:
        raise UserError(f"--data={options.data} holds latents alone; name the data set of images they were made from")
    kinds = np.asarray(source.kinds)
    if unknown := set(options.kinds) - set(source.kinds):
        there = ", ".join(sorted(set(source.kinds))[:_KINDS_SHOWN])
        raise UserError(f"--kinds={','.join(sorted(unknown))}: {source.name} has {there}")
    wanted = np.isin(kinds, options.kinds) if options.kinds else np.ones(len(kinds), bool)
    needed = options.given
    if source.attributes:  # the model may be told values of the images that it makes
        needed += options.num_images
    # What is damaged counts no images, and is named when it is read.
    counts = np.asarray(source.num_images)
    enough = (counts >= needed) | (counts == 0)
    if few := int((wanted & ~enough).sum()):
        warn(f"{source.name}: {few} sets with fewer than {needed} images are left out")
    numbers = np.flatnonzero(wanted & enough)
    if not len(numbers) or len(numbers) < (options.num_sets or 0):
        raise UserError(
            f"--data={options.data} has {len(numbers)} sets of at least {needed} images: lower "
            f"{'--num_sets' if len(numbers) else '--given'}"
        )
    if options.num_sets:
        numbers = np.sort(np.random.default_rng(0).permutation(numbers)[: options.num_sets])
    return numbers


def _manifest(
    options: SetGeneration, source: RecordSource, numbers: np.ndarray, sampler: SetSampler
) -> generated.Manifest:
    """Describe what will be made. Reads all sets, and decodes no image."""
    total = options.given + options.num_images
    if total > records.MAX_IMAGES_PER_RECORD:
        raise UserError(
            f"--given={options.given} and --num_images={options.num_images}: a set holds up to "
            f"{records.MAX_IMAGES_PER_RECORD} images"
        )
    content, set_ids = hashlib.sha256(), []
    for number in numbers.tolist():
        record = source[number]
        set_ids.append(record.set_id)
        content.update(f"{number} {record.set_id}\0{record.caption}\0".encode(errors="surrogateescape"))
        for image in range(options.given):
            content.update(hashlib.sha256(record.images[image]).digest())
    about = {name: value for name, value in sampler.about.items() if name != "bundle"}
    return generated.Manifest(
        version=generated.VERSION,
        made_by={
            "model": {"sha256": sampler.fingerprint, **about},
            "data": {"sha256": content.hexdigest()},
            "conditioned_on": sampler.conditioned_on,
            "seed": options.seed,
            "sets_at_once": options.sets_at_once,
        },
        given=options.given,
        num_images=options.num_images,
        image_size=sampler.image_size,
        format=options.format,
        sets_per_shard=options.sets_per_shard,
        set_ids=set_ids,
        kinds=[source.kinds[number] for number in numbers],
        attributes=dict(source.attributes),
        made_from={"checkpoint": str(options.checkpoint), "data": source.name},
    )


def _made_sets(
    options: SetGeneration,
    source: RecordSource,
    numbers: np.ndarray,
    sampler: SetSampler,
    should_stop: Callable[[], bool],
) -> Iterator[records.ImageSetRecord]:
    """Yield the sets of a shard. Raises _Stopped between two calls of the sampler."""
    fetch, total = HostFetch(source, sampler.image_size), options.given + options.num_images
    at_once = options.sets_at_once * sampler.num_devices
    for first in range(0, len(numbers), at_once):
        if should_stop():
            raise _Stopped
        batch = numbers[first : first + at_once].tolist()
        # One compiled shape, whatever is left: the last set fills the places behind it.
        padded = batch + [batch[-1]] * (at_once - len(batch))
        given = [on_white(fetch.images(number, range(options.given))) if options.given else _NONE for number in batch]
        globals = {
            name: [source[number].attributes[name][:total] for number in padded] for name in sampler.global_widths
        }
        made_bnhwc = sampler.sample_sets(
            given + [given[-1]] * (at_once - len(batch)),
            options.num_images,
            np.array([set_seed(options.seed, number) for number in padded], np.uint32),
            globals=globals,
        )
        for number, given_mhwc, made_nhwc in zip(batch, given, made_bnhwc):
            record = source[number]
            yield records.ImageSetRecord(
                set_id=record.set_id,
                kind=source.kinds[number],
                caption=record.caption,
                images=tuple(map(png_bytes, (*given_mhwc, *made_nhwc))),
                attributes={name: values_nc[:total] for name, values_nc in record.attributes.items()},
            )


_NONE = np.zeros((0, 1, 1, 3), np.uint8)
