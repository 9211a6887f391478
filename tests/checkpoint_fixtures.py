"""A train state of a few small arrays, and a workdir with its checkpoints."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.configuration import default_config
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState

CONFIG = default_config().optimizer
CONFIG.warmup_steps = 1
OPTIMIZER, _ = make_optimizer(CONFIG, 100)
FROZEN = {"autoencoder": {"decoder.conv_in.kernel": jnp.full((3, 3, 4, 8), 0.3)}}
METADATA = {
    "config": {"task": "set_diffusion", "sizes": [1, 2], "autoencoder": {"path": "vae"}},
    "sha256": {"autoencoder": "00"},
}


def create(names=("a.0.kernel", "a.1.attn2.kernel", "a.1.norm.bias")) -> TrainState:
    shapes = {name: (16, 8) if name.endswith("kernel") else (8,) for name in names}
    keys = jax.random.split(jax.random.key(0), len(names))
    params = {name: jax.random.normal(key, shapes[name]) for name, key in zip(names, keys, strict=True)}
    return TrainState.create(params, OPTIMIZER)


def advance(state: TrainState) -> TrainState:
    gradients = jax.tree.map(lambda x: jnp.sin(x) / 3.0, state.params)
    return state.apply_gradients(gradients, OPTIMIZER, 0.9)


def target(state: TrainState, data: int = -1, fsdp: int = 1) -> TrainState:
    """What `restore_train_state` is told, on a mesh of these axes."""
    config = default_config().mesh
    config.update({"data": data, "fsdp": fsdp})
    placed = sharding.state_shardings(state, sharding.make_mesh(config))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def save(checkpoints: Checkpointer, step: int, state: TrainState, score: float | None = None) -> None:
    checkpoints.save(step, state, frozen=FROZEN, metadata=METADATA, score=score)


def save_three(workdir: pathlib.Path) -> dict[int, TrainState]:
    """Checkpoints of steps 1, 2 and 3, of which the last two are kept. Returns what was saved: NumPy arrays."""
    step = jax.jit(advance, donate_argnums=0)
    state, states = create(), {}
    with Checkpointer(workdir, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for i in (1, 2, 3):
            state = step(state)
            states[i] = jax.tree.map(np.array, state)
            # The next step overwrites the state while it is written: what is saved must be a copy.
            save(checkpoints, i, state)
        jax.block_until_ready(step(state))
    return states


def steps_in(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def assert_bit_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
