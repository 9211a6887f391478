"""Options of the programs that take a checkpoint: where it is, and how is sampled from it."""

import dataclasses
from pathlib import Path

from m2m_jax.core.options import Options, all_optional, option
from m2m_jax.sampling.settings import SamplingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromCheckpoint(Options):
    """Which checkpoint."""

    checkpoint: Path = option("Workdir of a run, or WORKDIR/checkpoints/STEP.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleExport(FromCheckpoint):
    """Which checkpoint becomes which bundle."""

    output: Path = option("Folder to write; must not exist.")


# Fields of `SamplingSettings` that stand in the place of those that the run's config chose; None: its own.
ChosenSettings = all_optional(SamplingSettings)
