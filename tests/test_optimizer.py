"""The optimizer, the train state and the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState


def _config(**values):
    config = default_config().optimizer
    config.update({"learning_rate": 0.1, "warmup_steps": 4, "weight_decay": 0.0, **values})
    return config


def _params():
    return {
        "a.kernel": jnp.ones((2, 3)),
        "a.bias": jnp.ones((3,)),
        "b.transformer_blocks.0.attn2.to_q.kernel": jnp.ones((2, 3)),
        "c.scale": jnp.ones((3,)),
    }


def _one_update(config, params, gradients):
    optimizer, schedule = make_optimizer(config, 100)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates, schedule(0)


def test_schedule_warms_up_and_ends_at_zero():
    _, schedule = make_optimizer(_config(), 20)
    rates = np.array([schedule(step) for step in range(21)])
    assert np.all(np.diff(rates[:5]) > 0) and rates[0] > 0
    np.testing.assert_allclose(rates[4], 0.1, rtol=1e-6)
    assert np.all(np.diff(rates[4:]) < 0)
    np.testing.assert_allclose(rates[20], 0.0, atol=1e-9)


def test_attn2_moves_faster():
    params = _params()
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, rate = _one_update(_config(attn2_rate=3.0), params, gradients)
    np.testing.assert_allclose(updates["a.kernel"], -rate, rtol=1e-4)
    np.testing.assert_allclose(updates["b.transformer_blocks.0.attn2.to_q.kernel"], -3.0 * rate, rtol=1e-4)


def test_only_kernels_decay():
    params = _params()
    updates, rate = _one_update(_config(weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["a.kernel"], -0.5 * rate, rtol=1e-6)
    assert not np.any(updates["a.bias"]) and not np.any(updates["c.scale"])


def test_clipping_is_of_the_global_norm():
    # Adam forgets the size of a constant gradient: what clipping did is seen in the first moment.
    params = _params()
    optimizer, _ = make_optimizer(_config(clip_norm=2.0), 100)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 50.0), params)
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    norm = np.sqrt(sum(np.sum(np.square(m / 0.1)) for m in opt_state[1][0].mu.values()))
    np.testing.assert_allclose(norm, 2.0, rtol=1e-5)


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps is 4.*train\.steps = 4"):
        make_optimizer(_config(), 4)


def test_ema_follows_with_its_own_warm_up():
    params = {"a.kernel": jnp.zeros((2, 2))}
    optimizer, _ = make_optimizer(_config(warmup_steps=0), 100)
    state = TrainState.create(params, optimizer)
    step = jax.jit(lambda s: s.apply_gradients({"a.kernel": jnp.ones((2, 2))}, optimizer, 0.5), donate_argnums=0)
    expected = np.zeros((2, 2))
    for index in range(20):
        state = step(state)
        decay = min(0.5, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["a.kernel"])
    np.testing.assert_allclose(state.ema_params["a.kernel"], expected, rtol=1e-5)
    assert state.step.dtype == jnp.int32 and int(state.step) == 20


def test_ema_is_float32_whatever_the_parameters():
    optimizer, _ = make_optimizer(_config(), 100)
    state = TrainState.create({"a.kernel": jnp.ones((2, 2), jnp.bfloat16)}, optimizer)
    state = state.apply_gradients({"a.kernel": jnp.ones((2, 2), jnp.bfloat16)}, optimizer, 0.9)
    assert state.params["a.kernel"].dtype == jnp.bfloat16
    assert state.ema_params["a.kernel"].dtype == jnp.float32
