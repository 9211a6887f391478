"""Seconds of a compiled program, and the share of the chip that it uses."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.executable import Compiled
from m2m_jax.core.chips import peak_flops

ROUNDS = 3
ROUND_SECONDS = 1.0  # of calls that are queued one after another


@dataclasses.dataclass
class Running:
    """A program with arguments on the device."""

    compiled: Compiled
    arguments: list[jax.Array]

    @classmethod
    def start(cls, compiled: Compiled) -> Running:
        """Fill all arguments."""
        device = jax.local_devices()[0]
        return cls(compiled, [jax.device_put(one.make(), device) for one in compiled.description.arguments])

    def set(self, values: dict[str, float]) -> None:
        """Give arguments, named by their paths, other values."""
        for i, one in enumerate(self.compiled.description.arguments):
            if one.path in values:
                self.arguments[i] = jax.device_put(one.make(values[one.path]), self.arguments[i].sharding)

    def call(self, times: int = 1) -> list[jax.Array]:
        """Call so often, each with what the last one carried, and wait for the last; return its results."""
        results: list[jax.Array] = []
        for _ in range(times):
            results = self.compiled.call(*self.arguments)
            self.arguments[: self.compiled.description.carried] = results[: self.compiled.description.carried]
        return jax.block_until_ready(results)


def measure(running: Running) -> Iterator[dict[str, Any]]:
    """Yield figures of each case: the median of rounds, in each of which calls queue up as they do in training.

    "first_seconds" is the first call's, which loads kernels and lays plans.
    """
    about = running.compiled.description
    for case, values in about.cases.items() or [("", {})]:
        running.set(values)
        first, once = _seconds(running, 1), _seconds(running, 1)
        times = max(1, min(50, math.ceil(ROUND_SECONDS / once)))
        rounds = [_seconds(running, times) / times for _ in range(ROUNDS)]
        seconds = statistics.median(rounds)
        figures = {
            "program": about.name,
            **({"case": case} if case else {}),
            "seconds": round(seconds, 6),
            "spread": round((max(rounds) - min(rounds)) / seconds, 3),
            f"{about.unit}_per_second": round(about.items / seconds, 3),
            "first_seconds": round(first, 3),
            "calls": times * ROUNDS,
        }
        peak = peak_flops(jax.local_devices()[:1])
        if peak and about.flops:
            figures["mfu"] = round(about.flops / seconds / peak, 4)
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            figures["peak_gib_so_far"] = round(memory["peak_bytes_in_use"] / 2**30, 2)
        yield figures | _loss(running) | running.compiled.made


def _seconds(running: Running, times: int) -> float:
    started = time.perf_counter()
    running.call(times)
    return time.perf_counter() - started


def _loss(running: Running) -> dict[str, float]:
    """Return the loss of another call: what is not finite was skipped, and no step was timed."""
    number = running.compiled.description.loss
    return {} if number is None else {"loss": float(np.asarray(running.call()[number], np.float32))}
