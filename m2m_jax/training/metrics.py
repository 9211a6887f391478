"""What a run reports: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricWriter:
    """Writes the metrics of one run; on every process but the first its methods do nothing.

    WORKDIR/metrics.jsonl has one object a line: `step` and the metrics of one call. WORKDIR/tensorboard has the same,
    and images.
    """

    def __init__(self, workdir: str | Path, total_steps: int, resumed_step: int = 0):
        """resumed_step: of the restored checkpoint. What was written of later steps is forgotten: they come again."""
        self._active = jax.process_index() == 0
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None  # step and time of the first progress line
        if not self._active:
            return
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._tty = sys.stdout.isatty()
        self._line_open = False
        self._open(resumed_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """`values`: {"train/loss": number or array []}. One line of metrics.jsonl, on disk when this returns."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON knows neither NaN nor infinity.
        writable = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | writable) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """`image_hwc`: uint8 [height, width, 3], to TensorBoard."""
        if not self._active:
            return
        self._tensorboard.add_image(name, image_hwc, step, dataformats="HWC")
        self._tensorboard.flush()

    def progress(self, step: int, *, loss: float, images_per_second: float, data_wait_share: float) -> None:
        """One line: drawn over the last one on a terminal, a line of its own in a file.

        data_wait_share: of the time since the last line, in [0, 1], that was spent waiting for data.
        """
        if not self._active:
            return
        now = time.monotonic()
        # The first line comes after compilation, which would spoil the estimate.
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        left = ""
        if step > first_step:
            seconds_per_step = (now - first_time) / (step - first_step)
            left = f"  {_duration(seconds_per_step * (self._total_steps - step))} left"
        text = (
            f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  loss {loss:.4f}  "
            f"{images_per_second:.1f} images/s  data wait {data_wait_share:.0%}{left}"
        )
        if self._tty:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._line_open = True
        else:
            print(text, flush=True)

    def message(self, text: str) -> None:
        """A line on the terminal that progress does not overwrite."""
        if not self._active:
            return
        self._end_line()
        print(text, flush=True)

    def rewind(self, step: int) -> None:
        """The run goes back behind that step: what was written of later ones is forgotten."""
        if not self._active:
            return
        self._file.close()
        self._tensorboard.close()
        self._first = None
        self._open(step)

    def close(self) -> None:
        """Everything is on disk, and the terminal on a new line."""
        if not self._active:
            return
        self._end_line()
        self._file.close()
        self._tensorboard.close()

    def _open(self, resumed_step: int) -> None:
        forget_after(self._workdir / FILE, resumed_step)
        self._file = open(self._workdir / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=resumed_step + 1)

    def _end_line(self) -> None:
        if self._line_open:
            print(flush=True)
            self._line_open = False


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and a last line that a crash left unfinished; all at once or not at all."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    partial = path.with_suffix(".jsonl.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
