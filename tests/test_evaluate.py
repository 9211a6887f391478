"""The evaluation of runs side by side: the same figures as training's own, and what is not comparable refused."""

import json

import numpy as np
import pytest
from run_fixtures import run, train_tiny

from m2m_jax.evaluation.context import run_line
from m2m_jax.tasks.evaluation import mean_and_error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def evaluate(tiny, *arguments, checkpoints):
    joined = ",".join(map(str, checkpoints))
    return run("evaluate", *tiny.arguments, "--split=validation", "--batches=2", f"--checkpoints={joined}", *arguments)


def test_figures_are_those_of_training_and_do_not_depend_on_who_stands_beside(tiny, tmp_path):
    steps = [tiny.workdir / "checkpoints" / str(step) for step in (3, 6)]
    result = evaluate(tiny, f"--output={tmp_path / 'table.json'}", checkpoints=steps)
    assert result.code == 0, result.err
    table = json.loads((tmp_path / "table.json").read_text())["runs"]
    alone = evaluate(tiny, f"--output={tmp_path / 'alone.json'}", checkpoints=steps[1:])
    assert alone.code == 0
    assert json.loads((tmp_path / "alone.json").read_text())["runs"][str(steps[1])] == table[str(steps[1])]
    assert table[str(steps[0])]["loss_own_context"] != table[str(steps[1])]["loss_own_context"]
    assert "own context" in result.out and "16 sets of 4 images, validation" in result.out


def test_curves_are_in_the_order_of_their_sizes():
    row = {"step": 1, "loss_own_context": [1.0, None], "loss_other_context": [2.0, None]}
    row |= {f"loss_by_context_size/{k}": [k / 100, None] for k in sorted(range(12), key=str)}
    assert run_line("runs/a", row, 12).endswith(", ".join(f"{k / 100:.4f}" for k in range(12)))


def test_training_has_the_same_mean(tiny, tmp_path):
    """Training's `config.eval.batches` is 1 in the tiny run; two batches here, the first of which is that one."""
    lines = [json.loads(line) for line in (tiny.workdir / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if line["step"] == 6 and "eval/loss_own_context" in line)
    result = run(
        *("evaluate", *tiny.arguments, "--split=validation", "--batches=1"),
        f"--checkpoints={tiny.workdir}",
        f"--output={tmp_path / 'table.json'}",
    )
    assert result.code == 0, result.err
    (row,) = json.loads((tmp_path / "table.json").read_text())["runs"].values()
    assert row["loss_own_context"][0] == pytest.approx(trained["eval/loss_own_context"], rel=1e-5)
    assert row["loss_own_context"][1] > 0  # one batch, of several records


def test_repeating_a_set_makes_no_error_smaller_and_one_set_has_none():
    rng = np.random.default_rng(0)
    value_k = rng.normal(size=8)
    mean, error = mean_and_error(value_k, np.arange(8))
    assert error == pytest.approx(value_k.std(ddof=1) / 8**0.5)  # records that come once: the usual standard error
    repeated = mean_and_error(np.tile(value_k, 100), np.tile(np.arange(8), 100))
    assert repeated == pytest.approx((mean, error))
    assert mean_and_error(rng.normal(size=100), np.zeros(100, int))[1] is None


def test_what_is_not_comparable_is_refused(tiny, tmp_path):
    result = evaluate(tiny, "--config.data.image_size=64", checkpoints=[tiny.workdir])
    assert result.code == 2 and "64" in result.err
    result = evaluate(tiny, "--config.data.images_per_set=1", checkpoints=[tiny.workdir])
    assert result.code == 2 and "no context" in result.err
    result = evaluate(tiny, checkpoints=[tmp_path / "nothing"])
    assert result.code == 2 and "no checkpoint folder" in result.err


def test_runs_with_two_schedules_are_refused(tiny, tmp_path):
    other = run(
        *("train", *tiny.arguments, "--config.schedule.rescale_betas_zero_snr=False", "--config.train.steps=1"),
        *("--config.eval.every=5", "--config.optimizer.warmup_steps=0", f"--workdir={tmp_path / 'other'}"),
    )
    assert other.code == 0, other.err
    result = evaluate(tiny, checkpoints=[tiny.workdir, tmp_path / "other"])
    assert result.code == 2 and "noise schedules" in result.err and "rescale_betas_zero_snr" in result.err


def test_sets_are_shown_with_their_captions(tiny, tmp_path):
    result = run("data.show", *tiny.arguments, "--num_sets=2", f"--output={tmp_path / 'sets.png'}")
    assert result.code == 0, result.err
    assert (tmp_path / "sets.png").stat().st_size > 1000
