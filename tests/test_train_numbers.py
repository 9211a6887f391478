"""The numbers of training: they do not depend on the mesh, and one batch can be learnt by heart."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from run_fixtures import load_config, make_autoencoder

from m2m_jax.configuration import default_config
from m2m_jax.core.parameters import Params
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.training import sharding
from m2m_jax.training.setup import set_up
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import Step


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


def _task(autoencoder, steps: int, blocks: str, platform: str | None = None, **changes) -> SetDiffusion:
    """Of configs/emoji.py:tiny with a U-Net of one level, which compiles in a third of the time."""
    config = load_config("emoji:tiny")
    config.autoencoder.path = str(autoencoder)
    config.train.steps = steps
    config.model.block_out_channels = (16,)
    config.model.down_block_types = (blocks,)
    config.model.num_attention_heads = (2,)
    config.optimizer.update(changes)
    return SetDiffusion(config, platform)


class Training(NamedTuple):
    """What m2m_jax.train makes of a task and a mesh before its first step."""

    state: TrainState
    frozen: dict
    step: Step


def _start(task: SetDiffusion, params: Params, mesh: Mesh) -> Training:
    setup = set_up(task, task.config, mesh)
    return Training(setup.create(params), jax.device_put(task.frozen, sharding.replicated(mesh)), setup.step)


def _one_device() -> Mesh:
    return sharding.make_mesh(default_config().mesh, jax.devices()[:1])


def _images(seed: int, num_sets: int) -> np.ndarray:
    """Sets of four pictures of coarse squares: uint8 [num_sets, 4, 32, 32, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num_sets, 4, 4, 4, 3), np.uint8)
    return coarse.repeat(8, axis=2).repeat(8, axis=3)


def _latents(seed: int, num_sets: int) -> np.ndarray:
    """As coarse, [num_sets, 4, 8, 8, 4]: a step that encodes nothing compiles sooner."""
    coarse = np.random.default_rng(seed).standard_normal((num_sets, 4, 2, 2, 4), np.float32)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


def _losses(
    task: SetDiffusion, params: Params, mesh: Mesh, num_steps: int, images: bool = False
) -> tuple[list[float], TrainState]:
    state, frozen, train_step = _start(task, params, mesh)
    losses, batch_size = [], task.config.data.batch_size
    for i in range(num_steps):
        batch = {"images_bnhwc": _images(i, batch_size)} if images else {"latents_bnhwc": _latents(i, batch_size)}
        state, metrics = train_step(state, frozen, sharding.make_global_batch(mesh, batch, batch_size))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device(autoencoder):
    """A task with attention in the middle alone, its parameters, and its losses and last state on one device."""
    # Where a gradient is next to nothing Adam makes its sign a whole step: steps are small, so that such a one is, too.
    task = _task(autoencoder, steps=6, blocks="DownBlock2D", learning_rate=1e-4)
    params = task.init()
    return task, params, *_losses(task, params, _one_device(), 5)


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 4, "fsdp": 2},
    {"data": 4, "tensor": 2},
    {"data": 4, "context": 2},
    {"slice": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "fsdp": 2, "accumulation": 2},
]


# Each mesh with and without recomputation; every other one of the sixteen, in turn, is left to `make test-full`.
CASES = [
    pytest.param(
        axes,
        remat,
        marks=[pytest.mark.slow] if (i + j) % 2 else [],
        id=",".join([*(f"{k}={v}" for k, v in axes.items()), f"remat={remat}"]),
    )
    for i, axes in enumerate(MESHES)
    for j, remat in enumerate(("none", "blocks"))
]


@pytest.mark.parametrize(("axes", "remat"), CASES)
def test_any_mesh_has_the_loss_curve_of_one_device(one_device, axes, remat):
    task, params, expected, one = one_device
    axes = dict(axes)
    config = copy.deepcopy(task.config)
    config.train.accumulation, config.model.remat = axes.pop("accumulation", 1), remat
    config.mesh.update({"data": 1} | axes)
    mesh = sharding.make_mesh(config.mesh)
    losses, state = _losses(SetDiffusion(config), params, mesh, 5)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[4] < losses[0]
    for name, x in state.params.items():
        np.testing.assert_allclose(x, one.params[name], rtol=1e-5, atol=1e-5)
    # The kernels really lie in slices, and so do their moments and averages.
    name = "mid_block.resnets.0.conv1.kernel"
    for tree in (state.params, state.ema_params, state.opt_state[1][0].mu):
        shares = {shard.data.size for shard in tree[name].addressable_shards}
        assert shares == {tree[name].size // (axes.get("fsdp", 1) * axes.get("tensor", 1))}


def test_rows_are_split_at_every_level(autoencoder):
    """Convolutions that halve and double the rows, and attention below, over the context axis: encoder and U-Net."""
    task = _task(autoencoder, steps=6, blocks="DownBlock2D", learning_rate=1e-4)
    model = {"block_out_channels": (16, 32), "num_attention_heads": (1, 1)}
    task.config.model.update(model | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")})
    task = SetDiffusion(task.config)
    params = task.init()
    expected, one = _losses(task, params, _one_device(), 2, images=True)
    task.config.mesh.update({"data": 4, "context": 2})
    losses, state = _losses(task, params, sharding.make_mesh(task.config.mesh), 2, images=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name, x in state.params.items():
        np.testing.assert_allclose(x, one.params[name], rtol=1e-5, atol=1e-5)


def test_a_step_in_bfloat16_keeps_its_state_in_float32_and_reuses_its_memory(one_device):
    task, params, expected, _ = one_device
    config = copy.deepcopy(task.config)
    config.model.dtype, config.model.remat = "bfloat16", "dots"
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16
        before, frozen, train_step = _start(SetDiffusion(config), params, _one_device())
        batch = {"latents_bnhwc": jnp.asarray(_latents(0, config.data.batch_size))}
        after, metrics = train_step(before, frozen, batch)
    assert float(metrics["loss"]) == pytest.approx(expected[0], rel=0.02)
    moments = after.opt_state[1][0]
    for tree in (after.params, after.ema_params, moments.mu, moments.nu):
        assert {x.dtype for x in tree.values()} == {jnp.dtype(jnp.float32)}
    assert all(x.is_deleted() for tree in (before.params, before.ema_params) for x in tree.values())


def test_one_batch_is_learnt_by_heart(autoencoder):
    task = _task(autoencoder, steps=120, blocks="CrossAttnDownBlock2D", learning_rate=3e-3, warmup_steps=20)
    state, frozen, train_step = _start(task, task.init(), _one_device())
    batch = {"latents_bnhwc": jnp.asarray(_latents(0, 2))}
    losses = []
    for _ in range(task.config.train.steps):
        # The same step number, so the same noise, timesteps and dropout.
        state, metrics = train_step(state.replace(step=jnp.zeros((), jnp.int32)), frozen, batch)
        losses.append(metrics["loss"])
    losses = np.array([float(loss) for loss in losses])
    assert losses[0] > 0.1
    assert losses[-10:].max() < losses[0] / 10


def test_the_train_step_lowers_for_tpus(autoencoder):
    """On a machine without one, with a kernel for each direction of attention, run by each device for its own sets."""
    task = _task(autoencoder, 10, "CrossAttnDownBlock2D", platform="tpu")
    assert task.summary == "set_diffusion, attention by splash"
    task.config.mesh.fsdp = 2
    mesh = sharding.make_mesh(task.config.mesh)
    setup = set_up(task, task.config, mesh)

    def placed(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    frozen = jax.tree.map(lambda x: placed(x, sharding.replicated(mesh)), task.frozen)
    batch = {"images_bnhwc": placed(_images(0, 16), sharding.batch_sharding(mesh, "images_bnhwc"))}
    text = setup.step.trace(setup.state, frozen, batch).lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    for kind in ("fwd", "dq", "dkv"):
        assert any(f"splash_mha_{kind}" in call for call in calls)
    # 16 sets on 8 devices, two heads; attention within images takes all that stand in the stack.
    within = f"tensor<{2 * (2 * task.config.data.images_per_set - 1)}x2x"
    assert all("tensor<2x2x" in call or within in call for call in calls)
    assert any("tensor<2x2x" in call for call in calls) and any(within in call for call in calls)
