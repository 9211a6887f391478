"""The watchdog, and a real stall."""

import os
import time

from m2m_jax.training.watchdog import KNOWN_AFTER, Watchdog


def stalls_here(seconds):
    time.sleep(seconds)


def test_a_stall_is_told_once_with_the_stacks_of_all_threads(tmp_path):
    path = tmp_path / "stderr"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with Watchdog(times=20, least=0.4, file=file) as watchdog:
        watchdog.step(1)
        time.sleep(0.5)  # nobody knows yet how long a step takes
        for step in range(2, KNOWN_AFTER + 8):
            watchdog.step(step)
            time.sleep(0.005)
        with watchdog.allowing("the evaluation"):
            time.sleep(0.6)
        assert path.read_text() == ""
        watchdog.step(20)
        stalls_here(1.0)
        watchdog.step(21)
        stalls_here(0.01)
    os.close(file)
    text = path.read_text()
    assert text.count("step ") == text.count("Current thread") == 1
    assert "process 0: step 20 has taken " in text and "stalls_here" in text


def test_twenty_times_the_median_where_that_is_more(tmp_path):
    path = tmp_path / "stderr"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with Watchdog(times=20, least=0.1, file=file) as watchdog:
        for step in range(1, KNOWN_AFTER + 2):
            watchdog.step(step)
            time.sleep(0.05)
        watchdog.step(100)
        time.sleep(0.5)
    os.close(file)
    assert path.read_text() == ""
