"""Makes image sets from captions: each set is one caption, drawn again and again from other noise ("MIS").

    python -m m2m_jax.data.build_mis --captions=captions.tsv --generator=stable-diffusion-2-1-base --output=data \
        --guidance_scale=7.5
    python -m m2m_jax.train --config configs/mis_sd21_self.py --config.data.name=mis --config.data.path=data ...

Captions are read from the files that `captions.py` knows, and cleaned. The generator is a Stable Diffusion folder, or a
run of this project's text-to-image task; this project's own models run either. A run knows how it samples; for a folder
that is 50 steps of ddim with a guidance scale of 7.5 (FOLDER_SETTINGS of `sampling/text_to_image.py`), where flags do
not say otherwise.

Image j of the caption in row i is made from noise of (--seed, i, j) alone, so any shard can be made again by itself.
Builds with the same settings agree byte for byte, whatever the number of devices and processes, where they run the same
kernels: one kind of CPU does. For GPUs XLA takes the kernels that it finds fastest, which may differ in the last bit.

Shards appear whole: a build that was interrupted, or killed, goes on with the first shard that is missing. SIGTERM and
Ctrl-C end it after the images being made; the shard that was begun is left out. Several processes, also on several
hosts with one file system, share the shards where each is told its --process_index and --process_count; processes that
M2M_PROCESSES joins (`runtime.py`) know theirs. Whichever ends last writes the manifest; of joined ones the first does.
A folder that holds another build is refused. Layout of the folder: `mis.py`.

Cleaning: the flags that are named like rules of `captions.CaptionRules` and `cleaning.SetRules`, which say what
they mean. How many each rule dropped stands in the manifest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags

from m2m_jax.building import build_folder, building
from m2m_jax.building.captions import CaptionRules, clean_captions, read_captions
from m2m_jax.building.cleaning import SetRules
from m2m_jax.core import disk, runtime, work_sharing
from m2m_jax.core.errors import UserError
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.program import run_program
from m2m_jax.data import mis, precomputed, records
from m2m_jax.sampling.text_to_image import TextToImage

CAPTIONS = flags.DEFINE_string("captions", None, "File of captions: .txt, .tsv, .jsonl or .parquet.", required=True)
GENERATOR = flags.DEFINE_string("generator", None, "Stable Diffusion folder, or a text-to-image run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to build in, or to go on in: data.path.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**32 - 1)
IMAGES_PER_SET = flags.DEFINE_integer("images_per_set", records.MAX_IMAGES_PER_RECORD, "Images of a caption.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Pixels a side; the generator's own if not given.")
STEPS = flags.DEFINE_integer("steps", None, "Of the stepper, an image; the generator's default if not given.")
STEPPER = flags.DEFINE_string("stepper", None, "A name in diffusion/steppers.py; likewise.")
DTYPE = flags.DEFINE_enum("dtype", None, ("float32", "bfloat16"), "Of the U-Net's computation; likewise.")
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Of the caption; likewise.")

STORE = flags.DEFINE_enum("store", "images", mis.STORES, "What records hold.")
IMAGE_FORMAT = flags.DEFINE_enum("image_format", "webp_lossless", building.IMAGE_FORMATS, "Of stored images.")
QUALITY = flags.DEFINE_integer("quality", 90, "Of --image_format=webp.", lower_bound=1, upper_bound=100)
LATENTS_DTYPE = flags.DEFINE_enum("latents_dtype", "float16", records.LATENT_DTYPES, "What latents are stored as.")
SETS_PER_SHARD = flags.DEFINE_integer(
    "sets_per_shard", 512, "Captions in a shard: what a kill can cost.", lower_bound=1
)
VALIDATION = flags.DEFINE_float("validation_share", 0.01, "Of the captions, by a hash of each.")
TEST = flags.DEFINE_float("test_share", 0.01, "Likewise.")

SETS_AT_ONCE = flags.DEFINE_integer("sets_at_once", 1, "A device makes together.", lower_bound=1)
IMAGES_AT_ONCE = flags.DEFINE_integer("images_at_once", None, "Of each set; all if not given.")
flags.adopt_module_key_flags(work_sharing)  # in --help

# Rules that have the same name for captions and for images.
_FLAGS_OF_CAPTIONS = {"drop_duplicates": "drop_duplicate_captions"}
_FLAGS_OF_SETS = {"drop_duplicates": "drop_duplicate_images"}
_DEFINE = {
    "bool": flags.DEFINE_bool,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "str": flags.DEFINE_string,
}


def _define_rules(rules: type, names: dict[str, str]) -> Callable[[], object]:
    """A flag for each field of a dataclass. Returns what makes one of the flags' values."""
    defined = {}
    for field in dataclasses.fields(rules):
        name = names.get(field.name, field.name)
        defined[field.name] = _DEFINE[field.type](name, field.default, f"See {rules.__name__}.")
    return lambda: rules(**{name: flag.value for name, flag in defined.items()})


caption_rules = _define_rules(CaptionRules, _FLAGS_OF_CAPTIONS)
set_rules = _define_rules(SetRules, _FLAGS_OF_SETS)


def main(argv):
    output = Path(OUTPUT.value)
    check_flags(output)
    make_set = building.SetMaker(
        STORE.value, IMAGE_FORMAT.value, QUALITY.value, LATENTS_DTYPE.value, set_rules(), set_rules().load_filter()
    )
    runtime.fix_cpu_threads()
    runtime.start()
    index, count = work_sharing.process()
    captions, dropped = read_splits()
    with Interruption(together=False) as interruption:
        generator = open_generator()
        build = mis.Build(
            version=mis.VERSION,
            settings=settings(generator),
            captions={split: len(of) for split, of in captions.items()},
            dropped_captions=dropped,
            command=work_sharing.command("m2m_jax.data.build_mis"),
        )
        build_folder.start(output, build)
        mine = build.shards[index::count]
        missing = [shard for shard in mine if not mis.is_done(output, shard)]
        if len(missing) < len(mine):
            say(f"{len(mine) - len(missing)} of {len(mine)} shards are there already")
        done = make(output, missing, captions, generator, make_set, lambda: interruption.requested(0))

        def finished() -> mis.Manifest | None:
            if index == 0 or not jax.distributed.is_initialized():
                return build_folder.finish(output, build)
            # Of processes that JAX joined the first writes it, and all wait for it.
            written = build_folder.all_there(output, build) and (mis.folder(output) / mis.MANIFEST).exists()
            return mis.read_manifest(output) if written else None

        manifest = work_sharing.wait_for_all(finished, interruption) if done else None
        if manifest is None and interruption.requested(0):
            say(f"stopped; go on with: {build.command}")
            return interruption.exit_code()
        if manifest is None:
            say("done; other processes have shards to make: whichever ends last writes the manifest")
            return 0
    counts = (f"{what} {sum(by.values())} {by or ''}".rstrip() for what, by in manifest.dropped.items())
    say(f"{mis.folder(output)}: {manifest.sets} sets, {manifest.images} images; dropped: {'; '.join(counts)}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def check_flags(output: Path) -> None:
    """Refuses flags that cannot be meant, before anything is opened."""
    images, at_once = IMAGES_PER_SET.value, IMAGES_AT_ONCE.value
    if not 1 <= images <= records.MAX_IMAGES_PER_RECORD:
        raise UserError(f"--images_per_set={images}: must be 1 to {records.MAX_IMAGES_PER_RECORD}")
    if at_once is not None and (at_once < 1 or images % at_once):
        raise UserError(f"--images_at_once={at_once} must divide --images_per_set={images}")
    if set_rules().min_images > images:
        raise UserError(
            f"--min_images={set_rules().min_images} is more than --images_per_set={images}: no set would be left"
        )
    if min(VALIDATION.value, TEST.value) < 0 or VALIDATION.value + TEST.value >= 1:
        raise UserError(
            f"--validation_share={VALIDATION.value} and --test_share={TEST.value}: must not be negative, and leave "
            "captions to train on"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    work_sharing.check_process_flags()


def read_splits() -> tuple[dict[str, list[tuple[int, str]]], dict[str, int]]:
    """({split: (row, caption) of its captions, in order}, {rule: captions that it dropped})."""
    kept, dropped = clean_captions(read_captions(CAPTIONS.value), caption_rules())
    captions = {split: [] for split in mis.SPLITS}
    for row, caption in kept:
        captions[mis.split_of(caption, VALIDATION.value, TEST.value)].append((row, caption))
    say(f"{len(kept)} captions ({'; '.join(f'{len(of)} {split}' for split, of in captions.items())})")
    return {split: of for split, of in captions.items() if of}, dict(sorted(dropped.items()))


def make(
    output: Path,
    shards: Sequence[mis.Shard],
    captions: dict[str, list[tuple[int, str]]],
    generator: TextToImage,
    make_set: building.SetMaker,
    should_stop: Callable[[], bool],
) -> bool:
    """`building.build_shards` with the flags' batches."""
    at_once = IMAGES_AT_ONCE.value or IMAGES_PER_SET.value
    batching = building.Batching(IMAGES_PER_SET.value, SETS_AT_ONCE.value, at_once, SEED.value)
    try:
        return building.build_shards(output, shards, captions, generator, batching, make_set, should_stop, say)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the devices have too little memory for --sets_at_once={SETS_AT_ONCE.value} and "
            f"--images_at_once={at_once}: lower them"
        ) from error


def open_generator() -> TextToImage:
    """The generator on this process's devices."""
    return TextToImage.open(
        GENERATOR.value,
        image_size=IMAGE_SIZE.value,
        dtype=DTYPE.value,
        devices=tuple(jax.local_devices()),
        steps=STEPS.value,
        stepper=STEPPER.value,
        guidance_scale=GUIDANCE.value,
    )


def settings(generator: TextToImage) -> dict:
    """All that decides what the records are."""
    captions = Path(CAPTIONS.value)
    return {
        "captions": {
            "file": captions.name,
            "sha256": disk.sha256(captions),
            "rules": dataclasses.asdict(caption_rules()),
        },
        "generator": generator.about,
        "autoencoder": precomputed.describe_autoencoder(*generator.autoencoder),
        "latent_shape": list(generator.latent_shape),
        "image_size": generator.image_size,
        "images_per_set": IMAGES_PER_SET.value,
        "seed": SEED.value,
        "store": STORE.value,
        "image_format": None if STORE.value == "latents" else IMAGE_FORMAT.value,
        "quality": QUALITY.value if STORE.value != "latents" and IMAGE_FORMAT.value == "webp" else None,
        "latents_dtype": None if STORE.value == "images" else LATENTS_DTYPE.value,
        "rules": dataclasses.asdict(set_rules()),
        "validation_share": VALIDATION.value,
        "test_share": TEST.value,
        "sets_per_shard": SETS_PER_SHARD.value,
        "sets_at_once": SETS_AT_ONCE.value,
        "images_at_once": IMAGES_AT_ONCE.value or IMAGES_PER_SET.value,
    }


if __name__ == "__main__":
    run_program(main)
