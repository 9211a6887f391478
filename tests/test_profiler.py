"""The profiler's trace: of the steps that were asked for, once, whatever becomes of the run."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from m2m_jax.training.profiler import Profiler

STEPS = (2, 3)


def traced(folder: Path, steps: list[int]) -> int:
    """So many files of traces are written by a run that takes these steps."""
    profiler = Profiler(STEPS, folder)
    for step in steps:
        profiler.begin(step)
        profiler.end(step, jnp.ones(()) + step)
    profiler.close()
    return len(list(folder.rglob("*.xplane.pb")))


@pytest.mark.parametrize(
    ("steps", "files"),
    [
        ([1, 2, 3, 4], 1),
        ([3, 4], 0),  # taken up between the two
        ([1, 2, 1, 2, 3, 4], 1),  # rolled back between the two
        ([1, 2, 3, 1, 2, 3, 4], 1),  # and after them
        ([1, 2], 1),  # ended between the two
        ([4, 5], 0),
    ],
)
def test_one_trace_whatever_the_run_does(tmp_path, steps, files):
    assert traced(tmp_path, steps) == files
