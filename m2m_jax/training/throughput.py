"""How fast a run is: where the time since the last line of the log went, and the model FLOPs utilisation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator

import jax

from m2m_jax.configuration import Config
from m2m_jax.core import chips
from m2m_jax.core.errors import warn
from m2m_jax.training.workload import count_model_flops


class Throughput:
    """Time the steps of a run.

    On an accelerator the model's FLOPs are counted, too, by a thread, for at the size of Stable Diffusion it takes half
    a minute, most of it beside the compilation. Until it has them, the log goes without. On a CPU, whose peak nobody
    asks for, that time is saved.
    """

    def __init__(self, config: Config, compute_dtype: str):
        """Begin to time. compute_dtype: what layers compute in."""
        self._config, self._compute_dtype = config, compute_dtype
        self._flops: concurrent.futures.Future | None = None
        if jax.default_backend() != "cpu":
            counting = concurrent.futures.ThreadPoolExecutor(1, "flops")
            self._flops = counting.submit(_model_flops, config)
            counting.shutdown(wait=False)
        self._peak = chips.peak_flops(jax.local_devices())
        self.restart()

    def restart(self) -> None:
        """Forget the time until now."""
        self._waited, self._steps, self._clock = 0.0, 0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in `with` as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in `with` out of that of steps."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def count_step(self) -> None:
        """Note that one more step was taken."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Return metrics of the steps since the last call, or `restart`."""
        seconds, data = time.monotonic() - self._clock, self._config.data
        sets_per_second = data.batch_size * self._steps / seconds
        metrics = {
            "images_per_second": sets_per_second * data.images_per_set,
            "step_seconds": seconds / self._steps,
            "data_wait_share": self._waited / seconds,
        }
        if self._flops is not None and self._flops.done() and self._flops.result():
            rate = self._flops.result() * sets_per_second / jax.device_count()
            metrics["model_flops_per_second"] = rate  # of a device
            if self._peak:
                # The peak is that of bfloat16: no utilisation, where float32 is computed.
                name = "mfu" if self._compute_dtype == "bfloat16" else "share_of_bfloat16_peak"
                metrics[name] = rate / self._peak
        memory = jax.local_devices()[0].memory_stats()
        if memory:  # a CPU has none
            metrics["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        self.restart()
        return metrics


def _model_flops(config: Config) -> float | None:
    """Return the FLOPs of a set; None where they cannot be counted: a number in a log is not worth the run."""
    try:
        return count_model_flops(config)
    except Exception as error:
        warn(f"the log goes without MFU, for the model's FLOPs cannot be counted: {error!r:.300}")
        return None
