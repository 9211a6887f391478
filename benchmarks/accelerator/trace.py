"""The kernels of a program that take longest, by name, of a profiler's trace."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


def longest_kernels(call: Callable[[], Any], calls: int = 2, most: int = 20) -> list[dict[str, Any]]:
    """Return [{"kernel", "times" and "ms" a call, "share" of all kernels' time}], the longest first.

    Args:
      call: runs the program once and waits for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        found = list(kernels(jax.profiler.ProfileData.from_file(str(file))))
    total: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in found:
        total[name] += nanoseconds
        times[name] += 1
    whole = sum(total.values()) or 1
    return [
        {
            "kernel": name[:120],
            "times": round(times[name] / calls, 1),
            "ms": round(nanoseconds / calls / 1e6, 3),
            "share": round(nanoseconds / whole, 4),
        }
        for name, nanoseconds in total.most_common(most)
    ]


def kernels(trace: Any) -> Iterator[tuple[str, float]]:
    """Yield (name, nanoseconds) of all that ran on devices: of a GPU's streams, of a TPU's core, of a CPU's threads."""
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith(("Stream", "XLA Ops")):
                continue  # the same once more, by module or by name in the program
            for event in line.events:
                if devices or "hlo_op" in dict(event.stats):
                    yield event.name, event.duration_ns
