"""What is made of a checkpoint: samples as files, and a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from m2m_jax.core import disk, runtime
from m2m_jax.sampling.bundle import PLATFORMS
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.job import Job
from m2m_jax.sampling.run_job import run
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.settings import SamplingSettings


def sample(checkpoint: str | Path, job: Job, **settings: Any) -> Path | None:
    """Sample from a checkpoint into files, and return the one to look at (None where another process writes them).

    Example:
        sample("runs/demo", Job(context=("a.png", "b.png"), num_images=4, output="out"), steps=50)

    Args:
      checkpoint: a workdir, or one of its checkpoints.
      settings: fields of `SamplingSettings` that replace those of the run's config.

    Raises:
      UserError: no checkpoint there, no such files or settings, or nowhere to write.
    """
    SamplingSettings(**settings)  # refuses bad ones before anything is read
    runtime.start()

    def load(num_sets: int) -> Sampler:
        return Sampler.from_checkpoint(checkpoint, devices=tuple(jax.local_devices()[:num_sets]), **settings)

    return run(job, load, {"checkpoint": str(checkpoint)})


def export_bundle(checkpoint: str | Path, output: Path, **settings: Any) -> str:
    """Write the bundle of a checkpoint into a new folder, and return a line on it.

    The settings are compiled into it; see `sample`.

    Raises:
      UserError: no checkpoint there, no such settings, or the folder exists or cannot be written.
    """
    SamplingSettings(**settings)
    disk.require_new(output)
    runtime.start()
    sampler = Sampler.from_checkpoint(checkpoint, **settings)
    with disk.new_folder(output) as aside:
        write_bundle(sampler, aside)
    size = sum(file.stat().st_size for file in output.iterdir())
    return f"{output}: step {sampler.step}, {size / 1e6:.1f} MB, for {', '.join(PLATFORMS)}"
