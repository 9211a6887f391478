"""Sampling from files to files, whatever the sampler: what `python -m m2m_jax.sample` and the sampler binary share.

For one set, `output` receives 000.png, 001.png, ... (the generated images), contact_sheet.png and sample.json. With
`sets` every subfolder is the context of a set; each gets a folder of its own below `output`, and one contact sheet
shows them all. Everything is written aside first: what stands in `output` is whole.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from m2m_jax.core import disk, gathering
from m2m_jax.core.errors import UserError
from m2m_jax.core.image_folder import list_images, list_sets
from m2m_jax.core.images import write_png
from m2m_jax.sampling.set_sampler import MAX_SEED, OnStep, Progress, SetSampler
from m2m_jax.view.contact_sheet import Row, contact_sheet, context, generated
from m2m_jax.view.html_page import html_page

RECORD = "sample.json"  # the mark of a folder that this program wrote


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Job:
    """What to sample and where to put it: each field is an option of both programs."""

    output: str | None = _option(None, "Folder to write.")
    context: tuple[str, ...] = _option((), "Context images in order: files, patterns or folders. None is legal.")
    sets: str | None = _option(None, "Folder of folders of context images, in place of --context.")
    num_context: int | None = _option(None, "Use so many of each set's images, the first by name.")
    num_images: int = _option(4, "Images to generate for each set.")
    seed: int = _option(0, "Of the first set; each further one has the next. The same seed gives the same images.")
    batch_size: int = _option(16, "Sets that a process samples at once, on all of its devices together.")
    contact_sheet: bool = _option(True, "Write contact_sheet.png.")
    html: bool = _option(False, "Write index.html, a page of everything that opens from disk.")

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed must be between 0 and {MAX_SEED}, not {self.seed}")
        if self.num_context is not None and self.num_context < 0:
            raise UserError(f"--num_context must not be negative, not {self.num_context}")
        if not self.output:
            raise UserError("--output is missing: name the folder to write")

    def find_sets(self) -> dict[str, list[Path]]:
        """{set name: its context files}; the one set of `context` has the empty name.

        Raises:
          UserError: there are none, or `output` holds what no earlier call wrote: the images it is given, for one.
        """
        sets = self._find_sets()
        output = Path(self.output)
        if output.exists() and not output.is_dir():
            raise UserError(f"--output={output} is a file; name a folder")
        if self.sets is not None and output.resolve() == Path(self.sets).resolve():
            raise UserError("--output and --sets are the same folder; name another")
        for folder in (output / name for name in sets):
            taken = folder.exists() if folder != output else any(_numbered_images(output))
            if taken and not (folder / RECORD).exists():
                raise UserError(f"--output={output}: {folder} holds other files; name another folder")
        return sets

    def _find_sets(self) -> dict[str, list[Path]]:
        if self.sets is None:
            return {"": self._find_context()[: self.num_context]}
        if self.context:
            raise UserError("--context and --sets exclude one another")
        root = Path(self.sets)
        if not root.is_dir():
            raise UserError(f"--sets={root} is not a folder")
        sets = {}
        for one in list_sets(root, follow_links=True)[0]:
            if one.fault:
                raise UserError(one.fault)
            sets[one.name] = list(one.files)[: self.num_context]
        if not sets:
            raise UserError(f"--sets={root} holds no folder of images")
        return sets

    def _find_context(self) -> list[Path]:
        """The files that `context` names, in its order; those of a pattern or a folder by name."""
        files = []
        for item in self.context:
            path = Path(item)
            if path.is_dir():
                found = list_images(path)
            elif glob.has_magic(item) and not path.exists():
                found = sorted(Path(match) for match in glob.glob(item))
            else:
                found = [path]
            if not found:
                raise UserError(f"--context: there is no image at {item}")
            files += found
        return files


def run(job: Job, load: Callable[[int], SetSampler], about: dict[str, Any]) -> Path | None:
    """Does the job and returns the file to look at.

    Processes that JAX joined share the sets and must all call; the first writes what all have made, and the others
    return None.

    Args:
      load: (number of sets that this process samples) -> the sampler; called once it is known that there is something
        to do.
      about: where the model came from, for the record of each set.
    """
    sets = job.find_sets()
    sampler = load(-(-len(sets) // jax.process_count()))
    contexts = {name: sampler.read(files) for name, files in sets.items()}
    sampled = _sample_sets(job, sampler, contexts)
    if jax.process_index():
        for _ in sampled:
            pass
        gathering.wait_for_all()
        return None
    output = Path(job.output)
    with disk.errors(f"--output={output}"), disk.folder_aside(output) as aside:
        rows, records = [], {}
        for name, seed, new_images, seconds in sampled:
            records[name] = {
                **about,
                **sampler.about,
                "context": [str(file) for file in sets[name]],
                "num_images": job.num_images,
                "seed": seed,
                "seconds_per_image": round(seconds, 4),
            }
            _write_set(aside / name, new_images, records[name])
            rows.append(Row(name, [context(list(contexts[name])), generated(list(new_images))]))
        if job.contact_sheet:
            write_png(aside / "contact_sheet.png", contact_sheet(rows))
        if job.html:
            (aside / "index.html").write_text(html_page(rows, records))
        _move_into(aside, output)
    gathering.wait_for_all()
    return output / ("index.html" if job.html else "contact_sheet.png" if job.contact_sheet else "")


def _sample_sets(
    job: Job, sampler: SetSampler, contexts: dict[str, np.ndarray]
) -> Iterator[tuple[str, int, np.ndarray, float]]:
    """(name, seed, images uint8 [num_images, size, size, 3], seconds an image) of each set, on every process alike."""
    process, count = jax.process_index(), jax.process_count()
    numbered = [(name, (job.seed + number) % (MAX_SEED + 1)) for number, name in enumerate(contexts)]
    for start in range(0, len(numbered), job.batch_size * count):
        batch = numbered[start : start + job.batch_size * count]
        which = f"set {start + 1}" if len(batch) == 1 else f"sets {start + 1} to {start + len(batch)}"
        own, began = batch[process::count], time.monotonic()
        # The first process has as many as any.
        images = np.zeros((len(batch[::count]), job.num_images, *(sampler.image_size,) * 2, 3), np.uint8)
        if own:
            given, seed_b = [contexts[name] for name, _ in own], np.array([seed for _, seed in own])
            images[: len(own)] = _sample(sampler, given, seed_b, job.num_images, f"{which} of {len(contexts)}")
        images = gathering.gather(images)
        seconds = (time.monotonic() - began) / (len(batch) * job.num_images)
        for (name, seed), new_images in zip(batch, images, strict=False):
            yield name, seed, new_images, seconds


def _sample(
    sampler: SetSampler, contexts: list[np.ndarray], seed_b: np.ndarray, num_images: int, which: str
) -> np.ndarray:
    """uint8 [sets, num_images, size, size, 3]; the first process tells how far it is."""
    start, images, tells = time.monotonic(), [], jax.process_index() == 0
    # A step's progress overwrites itself, which only a terminal can show.
    on_step = step_line(sys.stdout, which) if tells and sys.stdout.isatty() else None
    for images_bhwc in sampler.stream_sets(contexts, num_images, seed_b, on_step):
        images.append(images_bhwc)
        seconds = (time.monotonic() - start) / (len(images) * len(contexts))
        if tells:
            print(f"{which}: image {len(images)} of {num_images}, {seconds:.2f} s each", flush=True)
    return np.stack(images, axis=1)


def step_line(stream: TextIO, which: str) -> OnStep:
    """Shows the steps of each image on one line of a terminal, and the time left; a finished image clears it."""
    start = time.monotonic()

    def show(progress: Progress) -> None:
        done = progress.image * progress.num_steps + progress.step
        left = (time.monotonic() - start) / done * (progress.num_images * progress.num_steps - done)
        line = (
            f"{which}: image {progress.image + 1} of {progress.num_images}, "
            f"step {progress.step} of {progress.num_steps}, {left:.0f} s left"
        )
        end = "\r\033[K" if progress.step == progress.num_steps else ""
        stream.write(f"\r\033[K{line}{end}")
        stream.flush()

    return show


def _move_into(aside: Path, output: Path) -> None:
    """Renames everything in `aside` into `output`, replacing what an earlier call wrote there."""
    output.mkdir(exist_ok=True)
    if (output / RECORD).exists() and (aside / RECORD).exists():
        for path in _numbered_images(output):  # there may be more than now
            path.unlink()
    for path in aside.iterdir():
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)


def _write_set(folder: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        write_png(folder / f"{i:03d}.png", image)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _numbered_images(folder: Path) -> list[Path]:
    """000.png, 001.png, ..."""
    return [path for path in folder.glob("*.png") if path.stem.isdigit() and len(path.stem) >= 3]
