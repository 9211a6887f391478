"""Options of the training program."""

import dataclasses
from pathlib import Path

from m2m_jax.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun(Options):
    """Where a run lives."""

    workdir: Path = option("Folder for checkpoints, metrics and samples.")
