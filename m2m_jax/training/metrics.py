"""What a run reports: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from m2m_jax.core import disk
from m2m_jax.core.disk import run_errors
from m2m_jax.core.printing import duration

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FLUSH_SECONDS = 60


class MetricWriter:
    """Write the metrics of one run; on every process but the first, methods do nothing.

    WORKDIR/metrics.jsonl has one object a line: `step` and the metrics of one call. WORKDIR/tensorboard has the same,
    and images. A disk that is full or cannot be written is a UserError of every method.
    """

    def __init__(self, workdir: str | Path, total_steps: int, resumed_step: int = 0):
        """Open the files, and forget what they have of steps after `resumed_step`, which come again.

        Args:
          total_steps: of the whole run, for the time that is left.
          resumed_step: of the restored checkpoint; 0 of a new run.
        """
        self._active = jax.process_index() == 0
        self.total_steps = total_steps
        self._first: tuple[int, float] | None = None  # step and time of the first progress line
        if not self._active:
            return
        self._workdir = Path(workdir)
        self._tty = sys.stdout.isatty()
        self._line_open = False
        self._open(resumed_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, on disk when this returns. values: {"train/loss": number or array []}."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON knows neither NaN nor infinity.
        writable = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with run_errors(self._workdir):
            self._file.write(json.dumps({"step": step} | writable) + "\n")
            self._file.flush()
            for name, value in values.items():
                if math.isfinite(value):
                    self._add(step, summary=summary.scalar(name, value))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Write an image, uint8 [height, width, 3], to TensorBoard."""
        if not self._active:
            return
        with run_errors(self._workdir):
            self._add(step, summary=summary.image(name, image_hwc, dataformats="HWC"))
            self._flush()

    def progress(self, step: int, *, loss: float, images_per_second: float, data_wait_share: float) -> None:
        """Print a line, over the last one on a terminal, and below it in a file.

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
            left = f"  {duration(seconds_per_step * (self.total_steps - step))} left"
        text = (
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {loss:.4f}  "
            f"{images_per_second:.1f} images/s  data wait {data_wait_share:.0%}{left}"
        )
        if self._tty:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._line_open = True
        else:
            print(text, flush=True)

    def message(self, text: str) -> None:
        """Print a line that progress does not overwrite."""
        if not self._active:
            return
        self._end_line()
        print(text, flush=True)

    def rewind(self, step: int) -> None:
        """Forget what was written of steps after `step`, to which the run goes back."""
        if not self._active:
            return
        self._close()
        self._first = None
        self._open(step)

    def close(self) -> None:
        """Put everything on disk, and the terminal on a new line."""
        if not self._active:
            return
        self._end_line()
        self._close()

    def _open(self, resumed_step: int) -> None:
        with run_errors(self._workdir):
            (self._workdir / TENSORBOARD).mkdir(parents=True, exist_ok=True)
            forget_after(self._workdir / FILE, resumed_step)
            self._file = open(self._workdir / FILE, "a", encoding="utf-8")  # noqa: SIM115 (closed by _close)
            # Not a SummaryWriter: its thread dies of a full disk, and who writes next waits for it for ever.
            self._events = EventsWriter(str(self._workdir / TENSORBOARD / "events"))
            self._add(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides what it had of them
            self._flush()

    def _add(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(step=step, wall_time=time.time(), **what))

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def _close(self) -> None:
        with run_errors(self._workdir):
            self._file.close()
            self._events.close()

    def _end_line(self) -> None:
        if self._line_open:
            print(flush=True)
            self._line_open = False


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a crash left unfinished; all at once or not at all."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    disk.write(path, "".join(kept).encode())
