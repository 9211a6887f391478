"""`train.parameters`: which parameters train, and that the others cost the optimizer nothing and stay as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m2m_jax.configuration import default_config
from m2m_jax.core.parameters import abstract
from m2m_jax.models.initialization import TRAINED
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import make_train_step

CONFIG = UNetConfig(
    block_out_channels=(8, 8),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    norm_num_groups=4,
    order_embedding=True,
)
SHAPES = abstract(lambda: UNet(CONFIG, rngs=nnx.Rngs(0)))[1]


def test_the_groups_are_nested_and_named_for_what_they_hold():
    groups = {name: {n for n in SHAPES if trains(n)} for name, trains in TRAINED.items()}
    assert groups["all"] == set(SHAPES)
    assert groups["set_attention"] < groups["attention"] < groups["all"]
    for name in groups["attention"]:
        assert ".transformer_blocks." in name and any(
            f".{part}." in name for part in ("attn1", "attn2", "norm1", "norm2")
        )
    block = "mid_block.attentions.0.transformer_blocks.0."
    assert block + "attn2.order.kernel" in groups["set_attention"]
    assert block + "norm2.scale" in groups["set_attention"] and block + "norm1.scale" not in groups["set_attention"]
    assert block + "norm3.scale" not in groups["attention"]
    assert "mid_block.resnets.0.norm1.scale" not in groups["attention"]  # a resnet's norm1 has that name, too


class Quadratic:
    """A task whose loss pulls every parameter to zero."""

    compute_dtype = "float32"

    @staticmethod
    def draw(batch, step):
        return None

    @staticmethod
    def loss(params, frozen, batch, draws):
        loss = sum(jnp.sum(x**2) for x in params.values())
        return loss, {"loss": loss}


@pytest.mark.parametrize("group", TRAINED)
def test_what_does_not_train_stays_to_the_last_bit(group):
    trains = TRAINED[group]
    params = {name: jnp.ones(x.shape) for name, x in SHAPES.items()}
    config = default_config().optimizer
    config.warmup_steps = 0
    optimizer, _ = make_optimizer(config, 10)
    mesh = sharding.make_mesh(default_config().mesh)
    shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer, trains), params)
    shardings = sharding.state_shardings(shapes, mesh)
    state = jax.jit(lambda p: TrainState.create(p, optimizer, trains), out_shardings=shardings)(params)
    step = make_train_step(Quadratic, optimizer, shardings, mesh, 0.9, trains)
    state, metrics = step(state, {}, {})
    trained = {name for name in SHAPES if trains(name)}
    for name in SHAPES:
        for tree in (state.params, state.ema_params):
            assert np.any(np.asarray(tree[name]) != 1) == (name in trained), name
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(params[name].size for name in trained)
    count = sum(params[name].size for name in trained)
    np.testing.assert_allclose(metrics["gradient_norm"], 2 * np.sqrt(count), rtol=1e-5)
