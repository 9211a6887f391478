"""Scores of generated sets while a run trains: what is logged, what ranks checkpoints, and what is refused at once."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from run_fixtures import one_level_arguments, run

from m2m_jax.config_rules import validate
from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.tasks.generated import Generated

SCORES = ("similarity", "frechet")


def task(**changes) -> SimpleNamespace:
    config = default_config()
    config.update({"data.images_per_set": 4, "eval.generate_scores": SCORES, **changes})
    return SimpleNamespace(config=config, frozen={}, continued=None)


def sets(noise: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (10, 1, 4, 4, 3)).repeat(4, 2).repeat(4, 3)
    images = np.clip(pattern + rng.normal(0, 12, (10, 4, 1, 1, 3)), 0, 255).astype(np.uint8)
    made = np.clip(images[:, 2:] + rng.normal(0, noise, (10, 2, 16, 16, 3)), 0, 255).astype(np.uint8)
    return {"given_bmhwc": images[:, :2], "generated_bnhwc": made, "real_bnhwc": images[:, 2:]}


def test_worse_sets_score_worse_and_anchors_stand_beside():
    metric, found = Generated(task()), {}
    for noise in (0, 120):
        figures = metric.judge_sets(sets(noise))
        found[noise] = metric.score({f"eval/{name}": value for name, value in figures.items()})
    assert found[0] < found[120]  # lower is better, though the first figure is a likeness
    name = "generated/similarity_to_given/pixels-8"
    assert {name, f"{name}/real", f"{name}/drift", "generated/frechet/pixels-8"} <= figures.keys()
    assert figures[name] < figures[f"{name}/real"] == metric.judge_sets(sets(0))[name]


def test_nothing_ranks_a_step_without_sets():
    with pytest.raises(KeyError):
        Generated(task()).score({"eval/loss": 1.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval.generate_scores": ("mnd",)}, "unknown score 'mnd'"),
        ({"eval.generate_encoder": "pixels=nowhere"}, "pixels=nowhere: no such folder"),
        ({"eval.generate_given": 4}, "none is left to make"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(changes, words):
    with pytest.raises(UserError, match=words):
        Generated(task(**changes))


def test_a_config_that_names_one_half_is_refused():
    for changes in ({"eval.generate_every": 1000}, {"eval.metrics": ("generated",)}):
        config = default_config()
        config.update(changes)
        with pytest.raises(UserError, match="need both"):
            validate(config.eval)
    config = default_config()
    config.update({"eval.generate_every": 1500, "eval.metrics": ("generated",)})
    with pytest.raises(UserError, match=r"must be a multiple of config\.eval\.every, 1000"):
        validate(config.eval)


@pytest.mark.slow
def test_a_run_logs_them_and_keeps_the_best(tmp_path_factory, tmp_path):
    result = run(
        *("train", *one_level_arguments(tmp_path_factory), f"--workdir={tmp_path / 'run'}"),
        *("--config.eval.metrics=generated", "--config.eval.score=generated", "--config.eval.every=3"),
        *("--config.eval.generate_every=6", "--config.eval.generate_sets=9"),
        f"--config.eval.generate_scores={','.join(SCORES)}",
    )
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    name = "eval/generated/similarity_to_given/pixels-8"
    assert [line["step"] for line in lines if name in line] == [6]
    assert "eval/generated/similarity_to_given" in result.out and "/drift" not in result.out
