"""metrics.jsonl, TensorBoard and the terminal; how fast a run is."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.training import throughput
from m2m_jax.training.metrics import MetricWriter


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_written_at_once(tmp_path):
    writer = MetricWriter(tmp_path / "run", total_steps=10)
    writer.scalars(1, {"train/loss": jnp.float32(0.5)})
    assert _lines(tmp_path / "run") == [{"step": 1, "train/loss": 0.5}]
    writer.scalars(2, {"train/loss": float("nan")})
    assert _lines(tmp_path / "run")[1] == {"step": 2, "train/loss": None}
    writer.image(2, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_resuming_leaves_no_step_twice(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=10)
    for step in range(1, 7):
        writer.scalars(step, {"train/loss": float(step)})
    writer.scalars(4, {"eval/loss": 4.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "trai')  # the process was killed

    writer = MetricWriter(tmp_path, total_steps=10, resumed_step=4)
    writer.scalars(5, {"train/loss": 50.0})
    writer.close()
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert lines[-1]["train/loss"] == 50.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_progress_in_a_log_file(tmp_path, capsys):
    writer = MetricWriter(tmp_path, total_steps=100)
    writer.progress(10, loss=0.25, images_per_second=51.2, data_wait_share=0.034)
    writer.progress(20, loss=0.2, images_per_second=50.0, data_wait_share=0.0)
    writer.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step  10/100  loss 0.2500  51.2 images/s  data wait 3%"
    assert second.endswith(" left") and "\r" not in second


def test_progress_on_a_terminal_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    writer = MetricWriter(tmp_path, total_steps=100)
    writer.progress(10, loss=0.25, images_per_second=51.2, data_wait_share=0.0)
    writer.progress(20, loss=0.2, images_per_second=50.0, data_wait_share=0.0)
    writer.message("evaluated")
    writer.close()
    out = capsys.readouterr().out
    assert out.count("\r\x1b[K") == 2
    assert out.endswith("\nevaluated\n") and out.count("\n") == 2


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writer = MetricWriter(tmp_path / "run", total_steps=10)
    writer.scalars(1, {"train/loss": 0.5})
    writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    writer.progress(1, loss=0.5, images_per_second=1.0, data_wait_share=0.0)
    writer.message("text")
    writer.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_run_goes_on_without_flops_that_cannot_be_counted(monkeypatch, capsys):
    def count(config):
        raise UserError("of no such model")

    monkeypatch.setattr(throughput, "count_model_flops", count)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    clock = throughput.Throughput(default_config(), "float32")
    clock.count_step()
    while "of no such model" not in capsys.readouterr().err:
        time.sleep(0.01)
    assert set(clock.take()) == {"images_per_second", "step_seconds", "data_wait_share"}


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "mfu"), ("float32", "share_of_bfloat16_peak")])
def test_what_computes_in_float32_has_no_utilisation_of_a_peak_in_bfloat16(monkeypatch, dtype, name):
    monkeypatch.setattr(throughput, "count_model_flops", lambda config: 1e9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(throughput.chips, "peak_flops", lambda devices: 1e15)
    clock = throughput.Throughput(default_config(), dtype)
    clock.count_step()
    clock._flops.result()
    assert clock.take().keys() & {"mfu", "share_of_bfloat16_peak"} == {name}
