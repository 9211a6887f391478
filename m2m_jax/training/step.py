"""One training step, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from m2m_jax.models.frozen import FrozenParams
from m2m_jax.models.parameters import Params
from m2m_jax.training import sharding
from m2m_jax.training.state import TrainState

if TYPE_CHECKING:
    import optax


class Task(Protocol):
    """What a step needs of `SetDiffusion` or `Autoencoding`."""

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, step: jax.Array) -> tuple[jax.Array, dict]: ...


Step = Callable[[TrainState, FrozenParams, dict], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
    ema_decay: float,
    trains: Callable[[str], bool] = lambda name: True,
) -> Step:
    """(state, frozen, batch) -> (next state, scalars for the log). The state is donated: its buffers are reused.

    Args:
      shardings: of the state, as from `sharding.state_shardings`.
      ema_decay: see `TrainState.apply_gradients`.
      trains: see `TrainState.create`. Nothing is computed for the gradient of the others.
    """

    def train_step(state: TrainState, frozen: FrozenParams, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(trained: Params) -> tuple[jax.Array, dict]:
            return task.loss(state.params | trained, frozen, batch, state.step)

        trained = {name: value for name, value in state.params.items() if trains(name)}
        gradients, metrics = jax.grad(loss, has_aux=True)(trained)
        metrics["gradient_norm"] = jnp.sqrt(sum(jnp.sum(g**2) for g in gradients.values()))
        return state.apply_gradients(gradients, optimizer, ema_decay), metrics

    train_step = sharding.traced_on(mesh, train_step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
