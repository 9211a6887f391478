"""Options of the programs that evaluate."""

import dataclasses
from pathlib import Path

from m2m_jax.core.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextEvaluation(Options):
    """Which runs are compared, and on what."""

    checkpoints: tuple[Path, ...] = option("Workdirs of runs, or WORKDIR/checkpoints/STEP.")
    split: str = option("Which split of the data set.", "test")
    batches: int = option("So many batches of config.eval.batch_size sets.", 16, low=1)
    output: Path | None = option("JSON file to write: all figures, and what they are of.", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopySearch(Options):
    """Which samples are compared with the training images."""

    samples: Path = option("Output folder of m2m_jax.sample --sets.")
    output: Path = option("PNG to write.")
