"""What a program that hangs is doing: stacks of its threads."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

TIMES = 20  # the usual time of a step
LEAST = 60.0  # seconds
ELSE = 1800.0  # seconds, for what comes but once in a while: compilation, an evaluation, a checkpoint
KNOWN_AFTER = 5  # steps
_STDERR = 2


class _Doing(NamedTuple):
    what: str
    since: float
    limit: float


class Watchdog:
    """Print the stacks of all threads where something takes far too long, once for every hang; end nothing.

    A thread looks, from `with` to its end. A step has `times` the median of the last steps, and at least `least`
    seconds; all else has half an hour.

    Example:
        with Watchdog() as watchdog:
            for step in range(1, steps + 1):
                watchdog.step(step)
                ...
            with watchdog.allowing("saving"):
                ...
    """

    def __init__(self, times: float = TIMES, least: float = LEAST, file: int = _STDERR):
        """Begin with no step timed. file: the descriptor that is written to."""
        self._times, self._least, self._file = times, least, file
        self._seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._doing: _Doing | None = None
        self._in_step = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def step(self, step: int) -> None:
        """Note that a step begins; the last one, if nothing else was done in it, has shown how long one takes."""
        now = time.monotonic()
        if self._in_step and self._doing is not None:
            self._seconds.append(now - self._doing.since)
        limit = ELSE
        if len(self._seconds) >= KNOWN_AFTER:
            limit = max(self._least, self._times * statistics.median(self._seconds))
        self._doing, self._in_step = _Doing(f"step {step}", now, limit), True

    @contextlib.contextmanager
    def allowing(self, what: str) -> Iterator[None]:
        """Allow half an hour in `with` for something that is no part of a step. what: its name, for the message."""
        self._doing, self._in_step = _Doing(what, time.monotonic(), ELSE), False
        try:
            yield
        finally:
            self._doing = None

    def _watch(self) -> None:
        reported = None
        while not self._closed.wait(min(1.0, self._least / 4)):
            doing = self._doing
            if doing is None or doing is reported:
                continue
            seconds = time.monotonic() - doing.since
            if seconds > doing.limit:
                reported = doing
                line = (
                    f"process {jax.process_index()}: {doing.what} has taken {seconds:.0f} s, and should have taken "
                    f"{doing.limit:.0f} s at most; what its threads are doing:\n"
                )
                os.write(self._file, line.encode())
                faulthandler.dump_traceback(self._file, all_threads=True)
