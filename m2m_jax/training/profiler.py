"""A profiler's trace of some steps: `config.profile.steps`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Trace some steps, once.

    A run that is taken up between the two traces nothing: its first step would be of another kind. One that is rolled
    back while it traces goes on tracing, and one that ends meanwhile keeps what there is.
    """

    def __init__(self, steps: tuple[int, int], folder: Path):
        """steps: the first and the last that are traced; folder: gets the trace."""
        self._first, self._last = steps
        self._folder, self._traced, self._tracing = folder, False, False

    def begin(self, step: int) -> None:
        """Begin the trace before its first step: call before each step."""
        if step == self._first and not self._traced:
            jax.profiler.start_trace(str(self._folder))
            self._traced = self._tracing = True

    def end(self, step: int, results: Any) -> None:
        """End the trace after its last step: call after each step, with what the step returned."""
        if self._tracing and step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced, if that was not done."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
