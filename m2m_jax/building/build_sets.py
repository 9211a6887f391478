"""Image sets made from captions: each set is one caption, drawn again and again from other noise ("MIS").

    build_sets(SetBuild(captions="captions.tsv", generator="runs/t2i", output="data", images_per_set=4))

What the sets depend on, and how several processes share the work: the docstring of `m2m_jax.data.build_mis`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from m2m_jax.building import build_folder, building
from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.building.captions import clean_captions, read_captions
from m2m_jax.building.cleaning import SetRules
from m2m_jax.building.options import SetBuild
from m2m_jax.core import disk, runtime, work_sharing
from m2m_jax.core.errors import UserError
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.printing import say
from m2m_jax.data import mis, precomputed
from m2m_jax.data.splits import SPLITS
from m2m_jax.sampling.text_to_image import TextToImage

Report = Callable[[str], object]


def build_sets(
    options: SetBuild,
    caption_rules: CaptionRules = CaptionRules(),  # noqa: B008 (frozen)
    set_rules: SetRules = SetRules(),  # noqa: B008
    *,
    command: str = "m2m_jax.building.build_sets.build_sets",
    report: Report = say,
) -> int:
    """Make this process's shards, and return an exit code: 0, or that of `Interruption` if told to stop.

    Shards that are there already are left. Whichever process ends last writes the manifest; processes that JAX joined
    return when it is written.

    Args:
      command: what makes a shard again that is damaged; for messages.
      report: given a line every few seconds.

    Raises:
      UserError: captions or generator cannot be used, no caption or no set is left, the devices have too little memory,
        or the folder holds another build or cannot be written.
    """
    if set_rules.min_images > options.images_per_set:
        raise UserError(
            f"--min_images={set_rules.min_images} is more than --images_per_set={options.images_per_set}: "
            "no set would be left"
        )
    make_set = building.SetMaker(
        store=options.store,
        image_format=options.image_format,
        quality=options.quality,
        latents_dtype=options.latents_dtype,
        rules=set_rules,
        safety_filter=set_rules.load_filter(),
    )
    runtime.fix_cpu_threads()
    runtime.start()
    index, count = options.process()
    captions, dropped = _read_splits(options, caption_rules, report)
    with Interruption(together=False) as interruption:
        generator = TextToImage.open(
            str(options.generator),
            devices=tuple(jax.local_devices()),
            **{name: getattr(options, name) for name in ("image_size", "dtype", "steps", "stepper", "guidance_scale")},
        )
        build = mis.Build(
            version=mis.VERSION,
            settings=_settings(options, caption_rules, set_rules, generator),
            captions={split: len(of) for split, of in captions.items()},
            dropped_captions=dropped,
            command=command,
        )
        build_folder.start(options.output, build)
        mine = build.shards[index::count]
        missing = [shard for shard in mine if not mis.is_done(options.output, shard)]
        if len(missing) < len(mine):
            report(f"{len(mine) - len(missing)} of {len(mine)} shards are there already")
        at_once = options.images_at_once or options.images_per_set
        batching = building.Batching(options.images_per_set, options.sets_at_once, at_once, options.seed)
        with _too_little_memory_said(options, at_once):
            done = building.build_shards(
                options.output,
                missing,
                captions,
                generator,
                batching,
                make_set,
                lambda: interruption.requested(0),
                report,
            )
        finished = functools.partial(_manifest, options, build, index)
        manifest = work_sharing.wait_for_all(finished, interruption) if done else None
        if manifest is None and interruption.requested(0):
            report(f"stopped; go on with: {build.command}")
            return interruption.exit_code()
        if manifest is None:
            report("done; other processes have shards to make: whichever ends last writes the manifest")
            return 0
    counts = (f"{what} {sum(by.values())} {by or ''}".rstrip() for what, by in manifest.dropped.items())
    report(
        f"{mis.folder(options.output)}: {manifest.sets} sets, {manifest.images} images; dropped: {'; '.join(counts)}"
    )
    return 0


def _manifest(options: SetBuild, build: mis.Build, index: int) -> mis.Manifest | None:
    """Return the manifest of a build whose shards are all there, as process `index` finds or writes it; or None."""
    if index == 0 or not jax.distributed.is_initialized():
        return build_folder.finish(options.output, build)
    # Of processes that JAX joined the first writes it, and all wait for it.
    there = (mis.folder(options.output) / mis.MANIFEST).exists()
    written = there and build_folder.all_there(options.output, build)
    return mis.read_manifest(options.output) if written else None


def _read_splits(
    options: SetBuild, rules: CaptionRules, report: Report
) -> tuple[dict[str, list[tuple[int, str]]], dict[str, int]]:
    """Return ({split: (row, caption) of its captions, in order}, {rule: captions that it dropped})."""
    kept, dropped = clean_captions(read_captions(options.captions), rules)
    captions: dict[str, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for row, caption in kept:
        captions[mis.split_of(caption, options.validation_share, options.test_share)].append((row, caption))
    report(f"{len(kept)} captions ({'; '.join(f'{len(of)} {split}' for split, of in captions.items())})")
    return {split: of for split, of in captions.items() if of}, dict(sorted(dropped.items()))


@contextlib.contextmanager
def _too_little_memory_said(options: SetBuild, images_at_once: int) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the devices have too little memory for --sets_at_once={options.sets_at_once} and "
            f"--images_at_once={images_at_once}: lower them"
        ) from error


def _settings(
    options: SetBuild, caption_rules: CaptionRules, set_rules: SetRules, generator: TextToImage
) -> dict[str, Any]:
    """Return all that decides what the records are."""
    return {
        "captions": {
            "file": options.captions.name,
            "sha256": disk.sha256(options.captions),
            "rules": dataclasses.asdict(caption_rules),
        },
        "generator": generator.about,
        "autoencoder": precomputed.describe_autoencoder(*generator.autoencoder),
        "latent_shape": list(generator.latent_shape),
        "image_size": generator.image_size,
        "images_per_set": options.images_per_set,
        "seed": options.seed,
        "store": options.store,
        "image_format": None if options.store == "latents" else options.image_format,
        "quality": options.quality if options.store != "latents" and options.image_format == "webp" else None,
        "latents_dtype": None if options.store == "images" else options.latents_dtype,
        "rules": dataclasses.asdict(set_rules),
        "validation_share": options.validation_share,
        "test_share": options.test_share,
        "sets_per_shard": options.sets_per_shard,
        "sets_at_once": options.sets_at_once,
        "images_at_once": options.images_at_once or options.images_per_set,
    }
