"""`config.train.minutes`: a run that decides by itself how many steps it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_runs import losses, saved_arrays
from run_fixtures import one_level_arguments, run

from m2m_jax.configuration import default_config
from m2m_jax.training import time_limit
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.time_limit import TimeLimit


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move."""
    now = [100.0]
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    return now


def _limit(minutes: float, decided: int | None = None, **values) -> TimeLimit:
    config = default_config()
    config.update({"train.minutes": minutes, "train.steps": 5_000, "optimizer.warmup_steps": 30, **values})
    return TimeLimit(config, decided)


def _walk(limit: TimeLimit, clock, seconds: float, first: int = 1) -> list[int]:
    """Takes 40 steps of so many seconds; returns those after which the number of steps was decided."""
    decided = []
    for step in range(first, first + 40):
        clock[0] += seconds
        decided += [step] if limit.look(step, {"loss": jnp.zeros(())}) else []
    return decided


def test_as_many_steps_as_fit(clock):
    limit = _limit(minutes=10)
    clock[0] += 100  # compilation
    assert _walk(limit, clock, 0.5) == [26]
    # 600 - 100 - 26 x 0.5 = 487 s are left, of which nine tenths are for steps of 0.5 s.
    assert limit.decided == limit.total_steps == 26 + 876


@pytest.mark.parametrize(("minutes", "steps"), [(1_000, 5_000), (0.01, 31)])
def test_never_more_than_the_config_says_nor_less_than_the_warm_up(clock, minutes, steps):
    limit = _limit(minutes)
    _walk(limit, clock, 0.5)
    assert limit.total_steps == steps


def test_without_minutes_nothing_is_decided(clock):
    limit = _limit(minutes=0, decided=77)
    assert not _walk(limit, clock, 0.5)
    assert (limit.decided, limit.total_steps) == (None, 5_000)


def test_a_resumed_run_keeps_what_was_decided(clock):
    limit = _limit(minutes=10, decided=700)
    assert not _walk(limit, clock, 9.0, first=400)
    assert limit.total_steps == 700


def test_learning_rate_ends_where_it_is_told_to():
    config = default_config().optimizer
    config.warmup_steps = 4
    optimizer, rate = make_optimizer(config, 1_000)
    _, expected = make_optimizer(config, 20)
    rates = jax.jit(jax.vmap(rate, (0, None)))(jnp.arange(21), jnp.int32(20))
    np.testing.assert_array_equal(rates, jax.jit(jax.vmap(expected))(jnp.arange(21)))
    params = {"a.kernel": jnp.ones((2, 2))}
    update = jax.jit(optimizer.update)
    moved, _ = update(params, optimizer.init(params), params, total_steps=jnp.int32(20))
    assert np.all(moved["a.kernel"] < 0)


def test_a_run_of_minutes_is_the_run_of_its_steps(tmp_path_factory, tmp_path):
    """It ends at the step that it decided on, says so, and its numbers are those of a run that was told the number."""
    arguments = one_level_arguments(tmp_path_factory)
    arguments += ("--config.optimizer.warmup_steps=27", "--config.train.log_every=9", "--config.eval.every=1000")
    arguments += ("--config.checkpoint.every=1000",)
    timed, told = tmp_path / "timed", tmp_path / "told"
    minutes = ("--config.train.steps=1000", "--config.train.minutes=0.001")
    result = run("train", *arguments, *minutes, f"--workdir={timed}")
    assert (result.code, result.err) == (0, "")
    assert "28 steps fit into config.train.minutes=0.001" in result.out
    assert "nothing is left" in run("train", *arguments, *minutes, f"--workdir={timed}").out
    assert run("train", *arguments, "--config.train.steps=28", f"--workdir={told}").code == 0
    assert losses(timed) == losses(told)
    a, b = saved_arrays(timed, 28), saved_arrays(told, 28)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
