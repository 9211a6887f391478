"""Being told to stop: by the machine's owner, who wants it back, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: come again. The launchers do.
INTERRUPTED = 130  # what shells say of Ctrl-C


class Interruption:
    """Listens, from `with` to its end, for SIGTERM (and TPUs' maintenance notices, which come as such) and Ctrl-C.

    Nothing is interrupted, whatever the program is doing: it asks after every step. A second Ctrl-C ends the process at
    once. With several processes one that is told tells all, and all stop after the same step.
    """

    def __init__(self, together: bool = True):
        """together: whether processes stop together; each may be at another step, and stop by itself, where not."""
        self._joined = together and jax.distributed.is_initialized()
        self._asked_until = 0
        self._stopping = False
        self._terminated = False
        self._presses = 0

    def __enter__(self) -> Interruption:
        # JAX has its own handler of SIGTERM where there are several processes.
        signals = (signal.SIGINT,) if self._joined else (signal.SIGINT, signal.SIGTERM)
        # Python runs handlers between two of the main thread's instructions, of which compiling is one. The numbers of
        # the signals are written into this pipe at once, for a thread to read.
        self._pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in signals}
        self._wakeup = signal.set_wakeup_fd(wakeup)
        self._thread = threading.Thread(target=self._listen, args=(set(signals),), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(signal.set_wakeup_fd(self._wakeup))  # which ends the thread
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: JAX's, which is not Python's
        self._thread.join()
        os.close(self._pipe)

    def requested(self, step: int) -> bool:
        """Say whether to save and stop after this step: all processes call it after every step, and hear the same."""
        if not self._joined:
            return self._terminated or self._presses > 0
        # JAX agrees on the step after the last one that any process has asked about, and says yes at that one alone: a
        # run that resumes, or was told before its first step, must not jump over it.
        for number in range(min(self._asked_until + 1, step), step + 1):
            self._stopping |= multihost_utils.reached_preemption_sync_point(number)
        self._asked_until = step
        return self._stopping

    def exit_code(self) -> int:
        """Return the exit code of a run that stopped as requested: the same on all processes, which all must call."""
        pressed = self._presses > 0
        if self._joined:
            pressed = bool(np.any(multihost_utils.process_allgather(np.int32(pressed))))
        return INTERRUPTED if pressed else PREEMPTED

    def _listen(self, signals: set[int]) -> None:
        while numbers := os.read(self._pipe, 64):
            for number in signals.intersection(numbers):
                if number == signal.SIGTERM:
                    self._terminated = True
                    continue
                self._presses += numbers.count(number)
                if self._presses > 1:
                    os._exit(INTERRUPTED)
                print("stopping after this step; Ctrl-C again: at once", file=sys.stderr, flush=True)
                if self._joined:
                    signal.raise_signal(signal.SIGTERM)  # which JAX hears, and tells the other processes
