"""Options of `m2m_jax.generate`."""

import dataclasses
from pathlib import Path

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import MAX_SEED, option
from m2m_jax.core.work_sharing import SharedWork
from m2m_jax.data.records import FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetGeneration(SharedWork):
    """From which model and sets are made how many images, and where they go.

    Example:
        SetGeneration(checkpoint="runs/emoji", data="data:test", given=4, num_images=4, num_sets=500, output="made")
    """

    checkpoint: Path = option("Workdir of a run, WORKDIR/checkpoints/STEP, or a bundle.")
    data: str = option("Folder with a folder of images for each set; or a data set and a split of it, DIR:SPLIT.")
    output: Path = option("Folder to write, or to go on in.")
    given: int = option("Images of each set that are given, the first of it.", 4, low=0)
    num_images: int = option("Images to make of each set.", 4, low=1)
    num_sets: int | None = option("How many sets, chosen at random but always alike; all if not given.", None, low=1)
    kinds: tuple[str, ...] = option("Kinds of sets that are used, of a data set of several; all if not given.", ())
    seed: int = option("Of the noise.", 0, low=0, high=MAX_SEED)
    format: str = option("Records, or a folder of PNGs for each set.", "records", choices=FORMATS)
    sets_at_once: int = option("A device makes together.", 8, low=1)
    sets_per_shard: int = option("What a kill can cost.", 64, low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output={self.output} is a file; name a folder")
