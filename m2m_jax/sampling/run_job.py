"""Sampling from files to files, whatever the sampler: what `python -m m2m_jax.sample` and the sampler binary share.

For one set, `output` receives 000.png, 001.png, ... (the generated images), contact_sheet.png and sample.json. With
`sets` every subfolder is the context of a set; each gets a folder of its own below `output`, and one contact sheet
shows them all. Everything is written aside first, and renamed when all is there: every file, and every folder of a
set, is whole.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from m2m_jax.core import disk, gathering
from m2m_jax.core.images import write_png
from m2m_jax.core.options import MAX_SEED
from m2m_jax.core.printing import say
from m2m_jax.sampling.job import RECORD, Job, numbered_images
from m2m_jax.sampling.set_sampler import OnStep, Progress, SetSampler
from m2m_jax.view.contact_sheet import Row, contact_sheet, context, generated
from m2m_jax.view.html_page import html_page


def run(
    job: Job,
    load: Callable[[int], SetSampler],
    about: dict[str, Any],
    report: Callable[[str], object] = say,
) -> Path | None:
    """Sample, write the files, and return the one to look at.

    Processes that JAX joined share the sets and must all call; the first writes what all have made, and the others
    return None.

    Args:
      load: (number of sets that this process samples) -> the sampler; called once it is known that there is something
        to do.
      about: where the model came from, for the record of each set.
      report: given a line for each image that is done.

    Raises:
      UserError: see `Job.find_sets`; a context image cannot be read; the disk is full.
    """
    sets = job.find_sets()
    sampler = load(-(-len(sets) // jax.process_count()))
    contexts = {name: sampler.read(files) for name, files in sets.items()}
    sampled = _sample_sets(job, sampler, contexts, report)
    if jax.process_index():
        for _ in sampled:
            pass
        gathering.wait_for_all()
        return None
    output = job.output
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
            (aside / "index.html").write_text(html_page(rows, records), encoding="utf-8")
        _move_into(aside, output)
    gathering.wait_for_all()
    return output / ("index.html" if job.html else "contact_sheet.png" if job.contact_sheet else "")


def _sample_sets(
    job: Job, sampler: SetSampler, contexts: dict[str, np.ndarray], report: Callable[[str], object]
) -> Iterator[tuple[str, int, np.ndarray, float]]:
    """Yield (name, seed, uint8 [num_images, size, size, 3], seconds an image) of each set, on every process alike."""
    process, count = jax.process_index(), jax.process_count()
    room = max(map(len, contexts.values())) + job.num_images - 1  # of every batch: one compilation
    numbered = [(name, (job.seed + number) % (MAX_SEED + 1)) for number, name in enumerate(contexts)]
    for start in range(0, len(numbered), job.batch_size * count):
        batch = numbered[start : start + job.batch_size * count]
        which = f"set {start + 1}" if len(batch) == 1 else f"sets {start + 1} to {start + len(batch)}"
        own, began = batch[process::count], time.monotonic()
        # The first process has as many as any.
        images = np.zeros((len(batch[::count]), job.num_images, *(sampler.image_size,) * 2, 3), np.uint8)
        if own:
            given, seed_b = [contexts[name] for name, _ in own], np.array([seed for _, seed in own])
            which = f"{which} of {len(contexts)}"
            images[: len(own)] = _sample(sampler, given, seed_b, job.num_images, room, which, report)
        images = gathering.gather(images)
        seconds = (time.monotonic() - began) / (len(batch) * job.num_images)
        for (name, seed), new_images in zip(batch, images, strict=False):
            yield name, seed, new_images, seconds


def _sample(
    sampler: SetSampler,
    contexts: list[np.ndarray],
    seed_b: np.ndarray,
    num_images: int,
    room: int,
    which: str,
    report: Callable[[str], object],
) -> np.ndarray:
    """Sampled images, uint8 [sets, num_images, size, size, 3]; the first process tells how far it is."""
    start, images, tells = time.monotonic(), [], jax.process_index() == 0
    # A step's progress overwrites itself, which only a terminal can show.
    on_step = step_line(sys.stdout, which) if tells and sys.stdout.isatty() else None
    for images_bhwc in sampler.stream_sets(contexts, num_images, seed_b, on_step, room=room):
        images.append(images_bhwc)
        seconds = (time.monotonic() - start) / (len(images) * len(contexts))
        if tells:
            report(f"{which}: image {len(images)} of {num_images}, {seconds:.2f} s each")
    return np.stack(images, axis=1)


def step_line(stream: TextIO, which: str) -> OnStep:
    """Return what shows the steps of each image on one line of a terminal, and the time left.

    A finished image clears the line.
    """
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
    """Rename everything in `aside` into `output`, replacing what an earlier call wrote there."""
    output.mkdir(exist_ok=True)
    if (output / RECORD).exists() and (aside / RECORD).exists():
        for path in numbered_images(output):  # there may be more than now
            path.unlink()
    for path in sorted(aside.iterdir()):
        target = output / path.name
        if target.is_dir():  # no folder can be renamed to the name of a full one
            target.rename(aside / f"{path.name}.before")
        path.rename(target)


def _write_set(folder: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        write_png(folder / f"{i:03d}.png", image)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
