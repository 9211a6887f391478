"""The watchdog, and a stall. Its clock is set by hand: on a busy machine any moment may last a second."""

import contextlib
import os
import time
import types

import pytest

from m2m_jax.training import watchdog
from m2m_jax.training.watchdog import KNOWN_AFTER, Watchdog


class Clock:
    """What the watchdog takes for the time."""

    now = 0.0

    def pass_by(self, seconds: float) -> None:
        """Time goes on, and the watchdog looks at what has become of it."""
        self.now += seconds
        time.sleep(0.1)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@contextlib.contextmanager
def watching(path, **limits):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with Watchdog(times=20, file=file, **limits) as dog:
        yield dog
    os.close(file)


def stalls_here(clock, path):
    clock.now += 1.0
    while "stalls_here" not in path.read_text():
        time.sleep(0.01)


def test_a_stall_is_told_once_with_the_stacks_of_all_threads(clock, tmp_path):
    path = tmp_path / "stderr"
    with watching(path, least=0.1) as dog:
        dog.step(1)
        clock.pass_by(0.5)  # nobody knows yet how long a step takes
        for step in range(2, KNOWN_AFTER + 8):
            dog.step(step)
            clock.now += 0.004
        with dog.allowing("the evaluation"):
            clock.pass_by(0.6)
        assert path.read_text() == ""
        dog.step(20)
        stalls_here(clock, path)
        clock.pass_by(1.0)
        dog.step(21)
        clock.pass_by(0.01)
    text = path.read_text()
    assert text.count("step ") == text.count("Current thread") == 1
    assert "process 0: step 20 has taken " in text and "stalls_here" in text


def test_twenty_times_the_median_where_that_is_more(clock, tmp_path):
    path = tmp_path / "stderr"
    with watching(path, least=0.1) as dog:
        for step in range(1, KNOWN_AFTER + 2):
            dog.step(step)
            clock.now += 0.05
        dog.step(100)
        clock.pass_by(0.9)
        assert path.read_text() == ""
        stalls_here(clock, path)
