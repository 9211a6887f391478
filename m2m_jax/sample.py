"""Samples: `python -m m2m_jax.sample --checkpoint runs/demo --context=a.png,b.png --num_images=4 --output=out`.

For one set, `--output` receives 000.png, 001.png, ... (the generated images), contact_sheet.png and sample.json. With
`--sets=DIR` every subfolder of DIR is the context of a set; each gets a folder of its own below `--output`, and one
contact sheet shows them all. Everything is written aside first: what stands in `--output` is whole.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import flags

from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError, run_program
from m2m_jax.images import SUFFIXES, write_png
from m2m_jax.sampling.contact_sheet import Row, contact_sheet, context, generated
from m2m_jax.sampling.sampler import MAX_SEED, Sampler, SamplingSettings

RECORD = "sample.json"  # the mark of a folder that this program wrote

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
CONTEXT = flags.DEFINE_list("context", [], "Context images, in order; none is legal.")
SETS = flags.DEFINE_string("sets", None, "Folder of folders of context images, in place of --context.")
NUM_CONTEXT = flags.DEFINE_integer("num_context", None, "Use so many of each set's images, the first by name.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "Images to generate for each set.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of the first set; each further one has the next. The same seed gives the same images."
)
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps an image; the run's config if not given.")
STEPPER = flags.DEFINE_string("stepper", None, f"{', '.join(STEPPERS)}; the run's config if not given.")
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Over the context, 1 is none; the run's config if not given.")


def main(argv):
    if NUM_IMAGES.value < 1:
        raise UserError(f"--num_images must be at least 1, not {NUM_IMAGES.value}")
    if not 0 <= SEED.value <= MAX_SEED:
        raise UserError(f"--seed must be between 0 and {MAX_SEED}, not {SEED.value}")
    output = Path(OUTPUT.value)
    sets = find_sets()
    check_output(output, sets)
    given = {"steps": STEPS.value, "stepper": STEPPER.value, "guidance_scale": GUIDANCE.value}
    settings = {name: value for name, value in given.items() if value is not None}
    SamplingSettings(**settings)  # refuses bad ones before anything is loaded
    sampler = Sampler.from_checkpoint(CHECKPOINT.value, **settings)
    contexts = {name: sampler.read(files) for name, files in sets.items()}

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}") from error
    try:
        rows = []
        for number, (name, images) in enumerate(contexts.items()):
            start = time.monotonic()
            seed = (SEED.value + number) % (MAX_SEED + 1)
            new_images = sampler(images, NUM_IMAGES.value, seed)
            seconds = (time.monotonic() - start) / NUM_IMAGES.value
            progress = f"[{number + 1}/{len(contexts)}] {name or 'set'}"
            print(f"{progress}: {NUM_IMAGES.value} images, {seconds:.2f} s each", flush=True)
            write_set(aside / name, sets[name], new_images, sampler, seed, seconds)
            rows.append(Row(name, [context(list(images)), generated(list(new_images))]))
        write_png(aside / "contact_sheet.png", contact_sheet(rows))
        move_into(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(output / "contact_sheet.png")


def find_sets() -> dict[str, list[Path]]:
    """{set name: its context files}; the one set of `--context` has the empty name."""
    if NUM_CONTEXT.value is not None and NUM_CONTEXT.value < 0:
        raise UserError(f"--num_context must not be negative, not {NUM_CONTEXT.value}")
    if SETS.value is None:
        return {"": [Path(file) for file in CONTEXT.value[: NUM_CONTEXT.value]]}
    if CONTEXT.value:
        raise UserError("--context and --sets exclude one another")
    root = Path(SETS.value)
    if not root.is_dir():
        raise UserError(f"--sets={root} is not a folder")
    sets = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
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
) -> None:
    """The images of one set, and what they were made from."""
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
