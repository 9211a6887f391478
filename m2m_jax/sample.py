"""Samples: `python -m m2m_jax.sample --checkpoint runs/demo --context=a.png,b.png --num_images=4 --output=out`.

For one set, `--output` receives 000.png, 001.png, ... (the generated images), contact_sheet.png and sample.json. With
`--sets=DIR` every subfolder of DIR is the context of a set; each gets a folder of its own below `--output`, and one
contact sheet shows them all. `--html` adds index.html, a page of everything that opens from disk. Everything is written
aside first: what stands in `--output` is whole.
"""

import glob
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from m2m_jax import runtime
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError, run_program
from m2m_jax.images import SUFFIXES, write_png
from m2m_jax.sampling.contact_sheet import Row, contact_sheet, context, generated
from m2m_jax.sampling.html_page import html_page
from m2m_jax.sampling.sampler import MAX_SEED, Sampler, SamplingSettings

RECORD = "sample.json"  # the mark of a folder that this program wrote

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
CONTEXT = flags.DEFINE_list("context", [], "Context images in order: files, patterns or folders. None is legal.")
SETS = flags.DEFINE_string("sets", None, "Folder of folders of context images, in place of --context.")
NUM_CONTEXT = flags.DEFINE_integer("num_context", None, "Use so many of each set's images, the first by name.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images to generate for each set.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of the first set; each further one has the next. The same seed gives the same images."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sets sampled at once, on all devices together.")
HTML = flags.DEFINE_bool("html", False, "Write index.html, too.")
# Fields of `SamplingSettings`; the run's config where a flag is not given.
SETTINGS = {
    "steps": flags.DEFINE_integer("steps", None, "Steps of the stepper, an image."),
    "stepper": flags.DEFINE_string("stepper", None, f"One of {', '.join(STEPPERS)}."),
    "guidance_scale": flags.DEFINE_float("guidance_scale", None, "Over the context; 1 is none."),
    "guidance_interval": flags.DEFINE_list("guidance_interval", None, "Fractions of the noise levels: 0.2,0.8."),
    "guidance_rescale": flags.DEFINE_float("guidance_rescale", None, "0 to 1: how far contrast is brought back."),
    "guidance_schedule": flags.DEFINE_string("guidance_schedule", None, "constant, linear or cosine."),
    "cache_size": flags.DEFINE_integer("cache_size", None, "Context images of a set that are kept."),
    "cache_dtype": flags.DEFINE_string("cache_dtype", None, "float32 is exact, bfloat16 half the memory."),
    "slide": flags.DEFINE_bool("slide", None, "In a set that outgrows the cache, forget the oldest image."),
}


def main(argv):
    if NUM_IMAGES.value < 1:
        raise UserError(f"--num_images must be at least 1, not {NUM_IMAGES.value}")
    if BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size must be at least 1, not {BATCH_SIZE.value}")
    if not 0 <= SEED.value <= MAX_SEED:
        raise UserError(f"--seed must be between 0 and {MAX_SEED}, not {SEED.value}")
    output = Path(OUTPUT.value)
    sets = find_sets()
    check_output(output, sets)
    settings = given_settings()
    SamplingSettings(**settings)  # refuses bad ones before anything is loaded
    runtime.start()
    devices = tuple(jax.devices()[: len(sets)])
    sampler = Sampler.from_checkpoint(CHECKPOINT.value, devices=devices, **settings)
    contexts = {name: sampler.read(files) for name, files in sets.items()}
    seeds = {name: (SEED.value + number) % (MAX_SEED + 1) for number, name in enumerate(sets)}

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}") from error
    try:
        names, rows, records = list(sets), [], {}
        for start in range(0, len(names), BATCH_SIZE.value):
            batch = names[start : start + BATCH_SIZE.value]
            images, seconds = sample(sampler, [contexts[n] for n in batch], [seeds[n] for n in batch], start, len(sets))
            for name, new_images in zip(batch, images, strict=True):
                records[name] = write_set(aside / name, sets[name], new_images, sampler, seeds[name], seconds)
                rows.append(Row(name, [context(list(contexts[name])), generated(list(new_images))]))
        write_png(aside / "contact_sheet.png", contact_sheet(rows))
        if HTML.value:
            (aside / "index.html").write_text(html_page(rows, records))
        move_into(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(output / ("index.html" if HTML.value else "contact_sheet.png"))


def sample(
    sampler: Sampler, contexts: list[np.ndarray], seeds: list[int], done: int, total: int
) -> tuple[np.ndarray, float]:
    """(uint8 [sets, num_images, size, size, 3], seconds an image), telling how far it is."""
    start, images = time.monotonic(), []
    for images_bhwc in sampler.stream_sets(contexts, NUM_IMAGES.value, np.array(seeds)):
        images.append(images_bhwc)
        seconds = (time.monotonic() - start) / (len(images) * len(contexts))
        which = f"set {done + 1}" if len(contexts) == 1 else f"sets {done + 1} to {done + len(contexts)}"
        print(f"{which} of {total}: image {len(images)} of {NUM_IMAGES.value}, {seconds:.2f} s each", flush=True)
    return np.stack(images, axis=1), seconds


def given_settings() -> dict:
    """Fields of `SamplingSettings` that flags set."""
    given = {name: flag.value for name, flag in SETTINGS.items() if flag.value is not None}
    if "guidance_interval" in given:
        try:
            given["guidance_interval"] = tuple(float(end) for end in given["guidance_interval"])
        except ValueError as error:
            raise UserError(f"--guidance_interval={','.join(given['guidance_interval'])}: {error}") from error
    return given


def find_context() -> list[Path]:
    """The files that `--context` names, in its order; those of a pattern or a folder by name."""
    files = []
    for item in CONTEXT.value:
        path = Path(item)
        if path.is_dir():
            found = images_in(path)
        elif glob.has_magic(item) and not path.exists():
            found = sorted(Path(match) for match in glob.glob(item))
        else:
            found = [path]
        if not found:
            raise UserError(f"--context: there is no image at {item}")
        files += found
    return files


def images_in(folder: Path) -> list[Path]:
    """Its image files, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def find_sets() -> dict[str, list[Path]]:
    """{set name: its context files}; the one set of `--context` has the empty name."""
    if NUM_CONTEXT.value is not None and NUM_CONTEXT.value < 0:
        raise UserError(f"--num_context must not be negative, not {NUM_CONTEXT.value}")
    if SETS.value is None:
        return {"": find_context()[: NUM_CONTEXT.value]}
    if CONTEXT.value:
        raise UserError("--context and --sets exclude one another")
    root = Path(SETS.value)
    if not root.is_dir():
        raise UserError(f"--sets={root} is not a folder")
    sets = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = images_in(folder)
        if not files:
            raise UserError(f"{folder} holds no image")
        sets[folder.name] = files[: NUM_CONTEXT.value]
    if not sets:
        raise UserError(f"--sets={root} holds no folder of images")
    return sets


def check_output(output: Path, names: Iterable[str]) -> None:
    """Refuses to replace what no earlier call wrote: the images it is given, for one."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder")
    if SETS.value is not None and output.resolve() == Path(SETS.value).resolve():
        raise UserError("--output and --sets are the same folder; name another")
    for folder in (output / name for name in names):
        taken = folder.exists() if folder != output else any(numbered_images(output))
        if taken and not (folder / RECORD).exists():
            raise UserError(f"--output={output}: {folder} holds other files; name another folder")


def numbered_images(folder: Path) -> list[Path]:
    """000.png, 001.png, ..."""
    return [path for path in folder.glob("*.png") if path.stem.isdigit() and len(path.stem) >= 3]


def write_set(
    folder: Path, context_files: list[Path], images: np.ndarray, sampler: Sampler, seed: int, seconds: float
) -> dict:
    """Writes the images of one set and the record of what they were made from, which it returns."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        write_png(folder / f"{i:03d}.png", image)
    record = {
        "checkpoint": CHECKPOINT.value,
        "step": sampler.step,
        "context": [str(file) for file in context_files],
        "num_images": len(images),
        "seed": seed,
        "settings": vars(sampler.settings),
        "seconds_per_image": round(seconds, 4),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def move_into(aside: Path, output: Path) -> None:
    """Renames everything in `aside` into `output`, replacing what an earlier call wrote there."""
    output.mkdir(exist_ok=True)
    if (output / RECORD).exists() and (aside / RECORD).exists():
        for path in numbered_images(output):  # there may be more than now
            path.unlink()
    for path in aside.iterdir():
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)


if __name__ == "__main__":
    run_program(main)
