"""Which process trained on which set when: WORKDIR/examples/PROCESS.jsonl, for `config.data.log_examples`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from m2m_jax.core.disk import run_errors
from m2m_jax.training.metrics import forget_after

FOLDER = "examples"


class ExampleLog:
    """Write a line for each step of a process: {"step": 3, "examples": [16, 17], "sets": ["style/...", "content/..."]}.

    The examples are those whose rows of the batch lie on this process; all processes together have the whole batch. A
    disk that is full or cannot be written is a UserError of every method.
    """

    def __init__(self, workdir: str | Path, set_ids: Callable[[Iterable[int]], list[str]], resumed_step: int):
        """Open the log, and forget what it has of steps after `resumed_step`, which come again.

        Args:
            set_ids: records' indices to names of sets, as `SetExamples.set_ids`.
            resumed_step: of the restored checkpoint; 0 of a new run.
        """
        self._workdir, self._set_ids = Path(workdir), set_ids
        self._open(resumed_step)

    def write(self, step: int, example_index_b: np.ndarray, record_index_b: np.ndarray) -> None:
        """Write which rows of a step's batch this process has; on disk before the step is computed."""
        line = {"step": step, "examples": example_index_b.tolist(), "sets": self._set_ids(record_index_b)}
        with run_errors(self._workdir):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def rewind(self, step: int) -> None:
        """Forget what was written of steps after `step`, to which the run goes back."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _open(self, resumed_step: int) -> None:
        folder, process = self._workdir / FOLDER, jax.process_index()
        with run_errors(self._workdir):
            folder.mkdir(parents=True, exist_ok=True)
            # The run may have had more processes: those of today share their files, too.
            for path in folder.glob("*.jsonl"):
                if int(path.stem) % jax.process_count() == process:
                    forget_after(path, resumed_step)
            self._file = open(folder / f"{process}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
