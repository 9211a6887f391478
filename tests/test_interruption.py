"""A run that is told to stop saves the step it is at, and goes on from there as if nothing had happened."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from compare_runs import differences, losses, metric_lines
from data_fixtures import write_image_folder
from killed_runs import xla_flags
from run_fixtures import ONE_LEVEL, ROOT, Result, config_argument, free_address, make_autoencoder, run

from m2m_jax.core.interruption import INTERRUPTED, PREEMPTED

STEPS = 30
LONG = (
    f"--config.train.steps={STEPS}",
    "--config.eval.every=1000",
    "--config.checkpoint.every=1000",
    *ONE_LEVEL,
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return (
        config_argument("emoji:tiny"),
        "--config.data.name=folder",
        f"--config.data.path={write_image_folder(folder / 'images', num_sets=12, images_per_set=5)}",
        f"--config.autoencoder.path={make_autoencoder(folder / 'vae')}",
        *LONG,
    )


@contextlib.contextmanager
def _signalled(number: int, metrics: pathlib.Path, lines: int):
    """Sends the signal to this process once that file has so many lines."""
    over = threading.Event()

    def send():
        while not over.wait(0.005):
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_stopped_run_goes_on_bit_for_bit(arguments, tmp_path):
    """By SIGTERM, at a step that is saved anyway, then by Ctrl-C, then to its end."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "run"
    result = run("train", *arguments, f"--workdir={unbroken}")
    assert result.code == 0, result.err
    arguments = (*arguments, f"--workdir={workdir}")
    stopped_at = 0
    for number, code, every in ((signal.SIGTERM, PREEMPTED, 1), (signal.SIGINT, INTERRUPTED, 1000)):
        with _signalled(number, workdir / "metrics.jsonl", stopped_at + 2):
            result = run("train", *arguments, f"--config.checkpoint.every={every}")
        assert result.code == code, result.err
        assert ("Ctrl-C again: at once" in result.err) == (number == signal.SIGINT)
        stopped_at = _stopped_after(result)
        assert metric_lines(workdir)[-1]["step"] == stopped_at < STEPS
        assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == stopped_at
    result = run("train", *arguments)
    assert result.code == 0 and f"resumed at step {stopped_at}" in result.out
    assert differences(unbroken, workdir, STEPS) == []
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def _stopped_after(result: Result) -> int:
    return int(re.search(r"stopped after step (\d+), which is saved", result.out)[1])


# A program that is busy with one long call, as training is with compiling, in which Python runs no handler.
BUSY = """
import hashlib
from m2m_jax.core.interruption import Interruption
with Interruption():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_the_second_ctrl_c_is_obeyed_at_once():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        assert program.stderr.readline() == "stopping after this step; Ctrl-C again: at once\n"
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=60) == INTERRUPTED  # the call takes longer on any machine


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def _start(arguments, log: pathlib.Path, devices: int, **environment: str) -> subprocess.Popen:
    environment["XLA_FLAGS"] = xla_flags(devices)
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "m2m_jax.train", *arguments],
            env=_environment(**environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_two_processes_one_of_which_is_told_and_then_one(arguments, tmp_path, number, code):
    """Both save the same step; one process with four devices goes on, with the losses of one that was never stopped."""
    steps = 100
    long = (*arguments, f"--config.train.steps={steps}")
    address = free_address()
    workdir = tmp_path / "run"
    logs = [tmp_path / f"log{i}" for i in range(2)]
    programs = [
        _start(
            (*long, f"--workdir={workdir}"),
            log,
            devices=2,
            M2M_PROCESSES=f"{i}/2",
            JAX_COORDINATOR_ADDRESS=address,
        )
        for i, log in enumerate(logs)
    ]
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert all(program.poll() is None for program in programs), [log.read_text() for log in logs]
        time.sleep(0.05)
    programs[1].send_signal(number)
    assert [program.wait(timeout=900) for program in programs] == [code, code], [log.read_text() for log in logs]
    stopped_at = int(re.search(r"stopped after step (\d+)", logs[0].read_text())[1])
    assert 2 <= stopped_at < steps
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(stopped_at)]

    alone = _start((*long, f"--workdir={workdir}"), tmp_path / "log", devices=4)
    assert alone.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    assert f"resumed at step {stopped_at}" in (tmp_path / "log").read_text()
    result = run("train", *long, f"--workdir={tmp_path / 'unbroken'}")
    assert result.code == 0, result.err
    expected, found = losses(tmp_path / "unbroken"), losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-5)
