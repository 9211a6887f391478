"""`train.parameters`: which parameters train; the others cost nothing and stay as they were. And a tiny adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_runs import saved_arrays
from flax import nnx
from model_fixtures import random_params
from run_fixtures import load_config, one_level_arguments, run

from m2m_jax.checkpoints.saved_model import load_for_sampling
from m2m_jax.configuration import default_config
from m2m_jax.core.parameters import abstract
from m2m_jax.models.diffusers_folder import save_unet
from m2m_jax.models.trained import PARAMETERS, Trained
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.tasks.set_diffusion import SetDiffusion
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
    groups = {name: set(PARAMETERS[name].of(SHAPES)) for name in ("all", "attention", "set_attention")}
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


@pytest.mark.parametrize("group", ["all", "attention", "set_attention"])
def test_what_does_not_train_stays_to_the_last_bit_and_costs_nothing(group):
    trained = PARAMETERS[group]
    params = {name: jnp.ones(x.shape) for name, x in SHAPES.items()}
    config = default_config().optimizer
    config.warmup_steps = 0
    optimizer, _ = make_optimizer(config, 10)
    mesh = sharding.make_mesh(default_config().mesh)
    shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer, trained.trains), params)
    shardings = sharding.state_shardings(shapes, mesh)
    state = jax.jit(lambda p: TrainState.create(p, optimizer, trained.trains), out_shardings=shardings)(params)
    step = make_train_step(Quadratic, optimizer, shardings, mesh, 0.9, trained)
    state, metrics = step(state, {}, {})
    names = set(trained.of(SHAPES))
    for name in SHAPES:
        assert np.any(np.asarray(state.params[name]) != 1) == (name in names), name
    assert state.ema_params.keys() == names
    assert all(np.any(np.asarray(x) != 1) for x in state.ema_params.values())
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    count = sum(params[name].size for name in names)
    assert sum(x.size for x in moments) == 2 * count
    np.testing.assert_allclose(metrics["gradient_norm"], 2 * np.sqrt(count), rtol=1e-5)


# An adapter, as docs say that one is added: one entry of PARAMETERS, and nothing else.

DOWN, UP = "adapter.down.", "adapter.up."


def _new(key, params):
    kernels = {name: x for name, x in params.items() if name.endswith((".to_q.kernel", ".to_v.kernel"))}
    keys = jax.random.split(key, len(kernels))
    down = {
        DOWN + name: jax.random.normal(k, (x.shape[0], 2)) for k, (name, x) in zip(keys, kernels.items(), strict=True)
    }
    return down | {UP + name: jnp.zeros((2, x.shape[1])) for name, x in kernels.items()}


def _merge(params):
    own = {name: x for name, x in params.items() if not name.startswith(("adapter.",))}
    for name in [name for name in params if name.startswith(UP)]:
        kernel = name.removeprefix(UP)
        own[kernel] = own[kernel] + params[DOWN + kernel] @ params[name]
    return own


@pytest.fixture
def adapter(monkeypatch):
    """The name of an adapter of rank 2 beside queries and values."""
    monkeypatch.setitem(
        PARAMETERS._registered, "tiny_adapter", Trained(lambda n: n.startswith("adapter."), _new, _merge)
    )
    return "tiny_adapter"


def test_an_adapter_trains_alone_resumes_and_is_sampled(adapter, tmp_path_factory, tmp_path):
    arguments = one_level_arguments(tmp_path_factory)
    config = load_config("emoji:tiny")
    config.model.update(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), num_attention_heads=(2,))
    config.autoencoder.path = next(x.partition("=")[2] for x in arguments if "autoencoder.path" in x)
    # Something to adapt: of a network from scratch the last layer is zero, and stays so.
    task = SetDiffusion(config)
    save_unet(tmp_path / "unet", task.unet_config, random_params(task.shapes))
    arguments = (
        *arguments,
        f"--config.train.parameters={adapter}",
        f"--config.init.path={tmp_path / 'unet'}",
        "--config.optimizer.learning_rate=0.1",
        "--config.optimizer.warmup_steps=0",
    )
    workdir = tmp_path / "run"
    result = run("train", *arguments, "--config.train.steps=3", f"--workdir={workdir}")
    assert result.code == 0, result.err
    arrays = saved_arrays(workdir, 3)
    averages = {name for name in arrays if name.startswith("ema.")}
    assert averages and all(name.startswith(("ema." + DOWN, "ema." + UP)) for name in averages)
    assert any(np.any(arrays[name]) for name in averages if name.startswith("ema." + UP))  # they began at zero
    # What a sampler is given: the model's own names, the kernels with the averaged adapter in them.
    model = load_for_sampling(workdir)
    assert not any(name.startswith("adapter.") for name in model.ema_params)
    for name, x in model.ema_params.items():
        expected = arrays[f"train_state.params.{name}"]
        if f"ema.{UP}{name}" in arrays:
            expected = expected + arrays[f"ema.{DOWN}{name}"] @ arrays[f"ema.{UP}{name}"]
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    result = run("sample", f"--checkpoint={workdir}", "--num_images=1", "--steps=1", f"--output={tmp_path / 'images'}")
    assert result.code == 0, result.err
    result = run("train", *arguments, "--config.train.steps=4", f"--workdir={workdir}")
    assert result.code == 0 and "resumed at step 3" in result.out, result.err
    # Fewer steps than were taken: nothing is left, and no one asked it to stop.
    result = run("train", *arguments, "--config.train.steps=2", f"--workdir={workdir}")
    assert result.code == 0 and "nothing is left" in result.out, result.err
