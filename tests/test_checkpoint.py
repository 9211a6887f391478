"""Checkpoints: bit-exact, on any mesh, and clear about what is wrong with a folder."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.configuration import default_config
from m2m_jax.errors import UserError
from m2m_jax.training import sharding
from m2m_jax.training.checkpoint import Checkpointer, load_for_sampling
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState

CONFIG = default_config().optimizer
CONFIG.warmup_steps = 1
OPTIMIZER, _ = make_optimizer(CONFIG, 100, lambda name: "attn2" in name)
FROZEN = {"autoencoder": {"decoder.conv_in.kernel": jnp.full((3, 3, 4, 8), 0.3)}}
METADATA = {"config": {"task": "set_diffusion", "sizes": [1, 2]}}


def _create(names=("a.0.kernel", "a.1.attn2.kernel", "a.1.norm.bias")):
    shapes = {name: (16, 8) if name.endswith("kernel") else (8,) for name in names}
    keys = jax.random.split(jax.random.key(0), len(names))
    params = {name: jax.random.normal(key, shapes[name]) for name, key in zip(names, keys, strict=True)}
    return TrainState.create(params, OPTIMIZER)


def _advance(state):
    gradients = jax.tree.map(lambda x: jnp.sin(x) / 3.0, state.params)
    return state.apply_gradients(gradients, OPTIMIZER, 0.9)


def _target(state, mesh):
    placed = sharding.state_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def _mesh(data, fsdp):
    config = default_config().mesh
    config.update({"data": data, "fsdp": fsdp})
    return sharding.make_mesh(config)


def _assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 2 and 3 (1 was dropped), the states, and what was asked to be kept: 2."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpointer(workdir, keep=2)
    assert checkpoints.latest_step() is None
    step = jax.jit(_advance, donate_argnums=0)
    state, states = _create(), {}
    for i in (1, 2, 3):
        state = step(state)
        states[i] = jax.tree.map(np.array, state)
        # The next step overwrites the state while it is written: what is saved must be a copy.
        checkpoints.save(i, state, frozen=FROZEN, metadata=METADATA)
    jax.block_until_ready(step(state))
    checkpoints.close()
    return workdir, states


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_round_trip_is_bit_exact_on_any_mesh(saved, mesh):
    workdir, states = saved
    target = _target(states[3], _mesh(*mesh))
    checkpoints = Checkpointer(workdir, keep=2)
    assert checkpoints.latest_step() == 3
    restored = checkpoints.restore_train_state(target)
    _assert_bit_equal(restored, states[3])
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    _assert_bit_equal(checkpoints.restore_train_state(target, 2), states[2])
    assert checkpoints.metadata() == METADATA
    checkpoints.close()


def test_older_checkpoints_are_dropped(saved):
    assert sorted(p.name for p in (saved[0] / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_sampling_restores_the_average(saved, folder):
    workdir, states = saved
    model = load_for_sampling(workdir / folder)
    assert (model.metadata, model.step) == (METADATA, 3)
    _assert_bit_equal(model.ema_params, states[3].ema_params)
    _assert_bit_equal(model.frozen, FROZEN)
    _assert_bit_equal(load_for_sampling(workdir, 2).ema_params, states[2].ema_params)


def test_saving_a_step_again_keeps_the_first(saved):
    checkpoints = Checkpointer(saved[0], keep=2)
    checkpoints.save(3, _create(), frozen=FROZEN, metadata=METADATA)
    checkpoints.close()
    _assert_bit_equal(load_for_sampling(saved[0]).ema_params, saved[1][3].ema_params)


def test_without_frozen_models(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(0, _create(), frozen={}, metadata={})
    checkpoints.close()
    assert load_for_sampling(tmp_path).frozen == {}


def test_other_leaves_are_named(saved):
    checkpoints = Checkpointer(saved[0], keep=2)
    other = _create(("a.0.kernel", "a.1.norm.bias", "a.2.kernel"))
    with pytest.raises(UserError) as error:
        checkpoints.restore_train_state(_target(other, _mesh(-1, 1)))
    assert "params.a.2.kernel (not in the checkpoint)" in str(error.value)
    assert "params.a.1.attn2.kernel (only in the checkpoint)" in str(error.value)

    state = _create()
    state.params["a.0.kernel"] = jnp.zeros((16, 9))
    with pytest.raises(UserError, match=r"a\.0\.kernel \(float32\[16, 8\] in the checkpoint, float32\[16, 9\] now\)"):
        checkpoints.restore_train_state(_target(state, _mesh(-1, 1)))
    checkpoints.close()


def test_missing_and_empty_folders(tmp_path, saved):
    with pytest.raises(UserError, match=r"nowhere.*--workdir"):
        load_for_sampling(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_for_sampling(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 2, 3"):
        load_for_sampling(saved[0], 7)


@pytest.mark.parametrize("item", ["ema", "autoencoder", "about"])
@pytest.mark.parametrize("damage", ["folder", "content", "bytes"])
def test_partial_checkpoints_name_the_folder_and_the_remedy(tmp_path, saved, item, damage):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "3" / item
    if damage == "folder":
        shutil.rmtree(folder)
    else:
        for file in [f for f in folder.rglob("*") if f.is_file()]:
            file.unlink() if damage == "content" else file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"checkpoints/3 is not whole.*delete that folder"):
        load_for_sampling(tmp_path / "run")
    assert load_for_sampling(tmp_path / "run", 2).step == 2
