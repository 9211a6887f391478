"""One training step, compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from m2m_jax.core.parameters import Params
from m2m_jax.data import transform
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.training import sharding
from m2m_jax.training.state import TrainState

if TYPE_CHECKING:
    import optax


class Task(Protocol):
    """What a step needs of `SetDiffusion` or `Autoencoding`. Metrics have a "loss"."""

    compute_dtype: str  # of the layers; parameters are float32

    def draw(self, batch: dict, step: jax.Array) -> Any: ...

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, draws: Any) -> tuple[jax.Array, dict]: ...


# Of a parameter's name: the module, and which one of a list of modules.
_OUTERMOST = re.compile(r"[^.]+(\.\d+)?")

Step = Callable[[TrainState, FrozenParams, dict], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
    ema_decay: float,
    trains: Callable[[str], bool] = lambda name: True,
    accumulation: int = 1,
) -> Step:
    """(state, frozen, batch) -> (next state, scalars for the log). The state is donated: its buffers are reused.

    Where loss or gradient are not finite the next state is the last one, a step older: nothing bad gets into
    parameters, moments or average, and so into no checkpoint. `training/divergence.py` decides how the run goes on.

    Args:
      shardings: of the state, as from `sharding.state_shardings`.
      ema_decay: see `TrainState.apply_gradients`.
      trains: see `TrainState.create`. Nothing is computed for the gradient of the others.
      accumulation: the batch is computed in so many parts, one after another. What is random is drawn for the whole
        batch, so the numbers are those of one part; memory for activations is that of a part.
    """

    def train_step(state: TrainState, frozen: FrozenParams, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = transform.finish(batch)
        trained = {name: value for name, value in state.params.items() if trains(name)}

        def gradients_of(inputs: tuple) -> tuple[Params, dict]:
            def loss(trained: Params) -> tuple[jax.Array, dict]:
                params = sharding.gathered(state.params | trained, mesh, task.compute_dtype)
                return task.loss(params, frozen, *inputs)

            return jax.grad(loss, has_aux=True)(trained)

        # By the batch and not by the step: after a rollback the same steps see other batches, and other noise.
        inputs = (batch, task.draw(batch, state.step + state.skipped_batches))
        if accumulation == 1:
            gradients, metrics = gradients_of(inputs)
        else:
            parts = jax.tree.map(lambda x: _in_parts(x, accumulation), inputs)
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients_of, inputs))

            def add(total: tuple, part: tuple) -> tuple[tuple, None]:
                return jax.tree.map(lambda a, b: a + b / accumulation, total, gradients_of(part)), None

            (gradients, metrics), _ = jax.lax.scan(add, zero, parts)
        metrics |= gradient_norms(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        # A branch: a select in every element cost 2 % of a step on a CPU, and this nothing.
        state = jax.lax.cond(
            finite, lambda: state.apply_gradients(gradients, optimizer, ema_decay), lambda: state.skip()
        )
        counts = {"skipped_steps": state.skipped_steps, "skipped_batches": state.skipped_batches}
        return state, metrics | counts | {"finite": finite}

    train_step = sharding.traced_on(mesh, train_step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def gradient_norms(gradients: Params) -> dict[str, jax.Array]:
    """{"gradient_norm": of everything, "gradient_norm/down_blocks.0": of one of the model's outermost modules, ...}."""
    squares: dict[str, jax.Array] = {}
    for name, gradient in gradients.items():
        module = _OUTERMOST.match(name)[0]
        squares[module] = squares.get(module, jnp.float32(0.0)) + jnp.sum(gradient.astype(jnp.float32) ** 2)
    norms = {f"gradient_norm/{module}": jnp.sqrt(square) for module, square in squares.items()}
    return {"gradient_norm": jnp.sqrt(sum(squares.values())), **norms}


def _in_parts(x: jax.Array, parts: int) -> jax.Array:
    """[b, ...] to [parts, b / parts, ...]: every device splits the rows that it has, and moves none."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
