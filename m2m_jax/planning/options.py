"""Options of the planner."""

import dataclasses
from pathlib import Path

from m2m_jax.core.chips import gpus_of
from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option

JOBS = ("train", "sample", "build_mis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning(Options):
    """What is planned, and for which machine.

    Example:
        Planning(topology="v5p:4x4x4", search=True)
    """

    topology: str = option("Chips and how they are connected: v5p:4x4x4; or GPUs of a node: h100:8.")
    slices: int = option("How many of that topology, side by side.", 1, low=1)
    formula: bool = option("Of GPUs: compile nothing, and answer within seconds.", False)
    search: bool = option("Find the mesh and the batch size that promise most.", False)
    job: str = option("What is planned.", "train", choices=JOBS)
    sets_per_device: int = option("Of --job=sample: sets that a device samples at once.", 1, low=1)
    captions: int = option("Of --job=build_mis: how many.", 12_000_000, low=1)
    mfu: float = option("Of --job=build_mis: the share of the chips' peak that is assumed.", 0.3)
    hlo: Path | None = option("File to write: the text of the compiled step.", None)
    json: bool = option("Print JSON.", False)

    def __post_init__(self):
        super().__post_init__()
        gpus = self.job != "build_mis" and gpus_of(self.topology)
        if self.formula and not gpus:
            raise UserError(f"--formula is of GPUs, and --topology={self.topology} is none of them")
        if self.job == "sample" and self.search:
            raise UserError("--search is for training; try values of --sets_per_device")
        if self.formula and (self.job == "sample" or self.search or self.hlo):
            raise UserError("by --formula one training step is planned: without --job=sample, --search and --hlo")
        if self.hlo and (self.job != "train" or self.search):
            raise UserError("--hlo is of one training step that is compiled, without --search")
