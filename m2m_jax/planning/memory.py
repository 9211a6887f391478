"""Where a device's memory goes, whether it suffices, and what to change where it does not."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from m2m_jax.training.state import TrainState

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the memory of a device goes, in bytes.

    Attributes:
      parameters, optimizer, ema, frozen, batch: exact, from shapes and shardings, without the padding of layouts.
      peak: of the step, all of these included; by the compiler.
      beside: what else lies on the device: frozen models that the step does not read.
      limit: what there is.
    """

    parameters: int
    optimizer: int
    ema: int
    frozen: int
    batch: int
    peak: float
    beside: int
    limit: float

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.ema

    @property
    def rest(self) -> float:
        """Return the bytes of gradients, activations, and padding."""
        return self.peak - self.state - self.batch - (self.frozen - self.beside)

    @property
    def needed(self) -> float:
        return self.peak + self.beside

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit


def bytes_per_device(tree: Any) -> int:
    """Return the bytes a device of ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_bytes(state: TrainState) -> dict[str, int]:
    """Return the bytes a device of the three parts of a train state of ShapeDtypeStructs."""
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema_params}
    return {name: bytes_per_device(part) for name, part in parts.items()}


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
    """Return (bytes that the program needs, bytes that there are) of XLA's message; None of another message.

    It has two, and "temporaries" are arguments and results, too (libtpu 0.0.42.1, tried with a program of known sizes):

        Ran out of memory on HBM, the total memory required for HLO temporaries (15.76G) exceeds available HBM (15.75G).
        ... CompileTimeHbmOom ... Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G. ...
    """
    match = next((match for pattern in _TOO_LARGE if (match := pattern.search(message))), None)
    if match is None:
        return None
    needed, needed_unit, limit, limit_unit = match.groups()
    return float(needed) * _UNITS[needed_unit], float(limit) * _UNITS[limit_unit]


def advice(
    memory: Memory,
    state_at_fsdp: Mapping[int, int],
    fsdp: int,
    parts: int,
    sets: int,
    kept: Mapping[str, float],
    context: int | None,
) -> list[str]:
    """Return what to change so that a step fits, and what each change gives: for activations about.

    Args:
      state_at_fsdp: bytes a device of the state for every value that config.mesh.fsdp can have here.
      fsdp, parts: config.mesh.fsdp, config.train.accumulation.
      sets: that a device has of a batch.
      kept: {config.model.remat: what a set keeps for its gradient, before XLA fuses anything}: of the config's own, and
        then of those that keep less.
      context: a value of config.mesh.context that would split each set further; None where there is none.
    """
    excess = memory.needed - memory.limit
    fixed = memory.needed - memory.rest
    lines = []
    (own, *stronger) = kept
    saved = {remat: memory.rest * (1 - kept[remat] / kept[own]) for remat in stronger if kept[remat] < kept[own]}
    if saved:
        remat = next((remat for remat in saved if saved[remat] >= excess), max(saved, key=lambda remat: saved[remat]))
        lines.append(
            f"--config.model.remat={remat}: activations take about {gib(saved[remat])} less, and are computed again"
            + ("" if saved[remat] >= excess else "; alone not enough")
        )
    split = {n: memory.state - state for n, state in state_at_fsdp.items() if n > fsdp and state < memory.state}
    enough = [n for n in sorted(split) if split[n] >= excess]
    if split and max(split.values()) > 0.05 * excess:
        n = enough[0] if enough else max(split)
        lines.append(
            f"--config.mesh.fsdp={n} (and data to match): the state takes {gib(split[n])} less"
            + ("" if enough else ", which alone is not enough")
        )
    # Activations are about proportional to the sets that are computed at once.
    at_once = sets // parts
    room = memory.limit - fixed
    fitting = [n for n in range(1, at_once) if at_once % n == 0 and memory.rest * n / at_once <= room]
    if fitting:
        n = max(fitting)
        less = gib(memory.rest * (1 - n / at_once))
        lines.append(f"--config.train.accumulation={parts * at_once // n}: activations take about {less} less")
        lines.append(f"--config.data.batch_size / {at_once // n}, likewise")
    elif at_once > 1:
        less = gib(memory.rest * (1 - 1 / at_once))
        lines.append(f"--config.train.accumulation={sets}: activations take about {less} less, alone not enough")
    if context and not fitting:
        lines.append(
            f"--config.mesh.context={context} (and data to match): devices share each set, and activations take about "
            f"{gib(memory.rest / 2)} less" + ("" if memory.rest / 2 >= excess else "; alone not enough")
        )
    return lines


def gib(size: float) -> str:
    """Return a size as text: '12.3 GiB'."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
