"""One training step, compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from m2m_jax.core.parameters import Params
from m2m_jax.data import transform
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.models.trained import PARAMETERS, Trained
from m2m_jax.tasks.protocol import Objective
from m2m_jax.training import sharding
from m2m_jax.training.state import TrainState

if TYPE_CHECKING:
    import optax


RESIDENT = "resident"  # beside the frozen models: {transform.RGBA: the images that devices hold}
# Of a parameter's name: the module, and which one of a list of modules.
_OUTERMOST = re.compile(r"[^.]+(\.\d+)?")

# (state, parameters of the frozen models, batch) -> (next state, scalars for the log); can be lowered and compiled.
Step = jax.stages.Wrapped


def make_train_step(
    task: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    shardings: TrainState,
    mesh: sharding.AnyMesh,
    ema_decay: float,
    trained: Trained = PARAMETERS["all"],
    accumulation: int = 1,
    reduce_dtype: str = "model",
) -> Step:
    """Return the step: (state, frozen, batch, total_steps=None) -> (next state, scalars for the log).

    The state is donated: its buffers are reused. total_steps: int32 [], see `TrainState.apply_gradients`.

    Where loss or gradient are not finite the next state is the last one, a step older: nothing bad gets into
    parameters, moments or average, and so into no checkpoint. `training/divergence.py` decides how the run goes on.

    Args:
      shardings: of the state, as from `sharding.state_shardings`.
      ema_decay: see `TrainState.apply_gradients`.
      trained: which parameters train, and how all become the model's.
      accumulation: the batch is computed in so many parts, one after another. What is random is drawn for the whole
        batch, so the numbers are those of one part; memory for activations is that of a part.
      reduce_dtype: what devices sum gradients in: "model", as layers compute, or "float32".
    """
    separate = reduce_dtype == "float32" and task.compute_dtype != "float32"

    def gradients_of(params: Params, frozen: FrozenParams, inputs: tuple) -> tuple[Params, dict]:
        def loss(values: Params, inputs: tuple) -> tuple[jax.Array, dict]:
            own = trained.effective(params, values)
            # Where each device sums its own gradient, it has whole parameters already.
            own = own if separate else sharding.gathered(own, mesh, task.compute_dtype)
            return task.loss(own, frozen, *inputs)

        return _accumulated(jax.grad(loss, has_aux=True), trained.of(params), inputs, accumulation)

    if separate:
        gradients_of = sharding.summed_in_float32(gradients_of, mesh)

    def train_step(
        state: TrainState, frozen: FrozenParams, batch: dict, total_steps: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = transform.finish(batch, frozen.get(RESIDENT, {}).get(transform.RGBA))
        # By the batch and not by the step: after a rollback the same steps see other batches, and other noise.
        inputs = (batch, task.draw(batch, state.step + state.skipped_batches))
        gradients, metrics = gradients_of(state.params, frozen, inputs)
        metrics |= gradient_norms(gradients)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        # A branch: a select in every element cost 2 % of a step on a CPU, and this nothing.
        state = jax.lax.cond(
            finite,
            lambda: state.apply_gradients(gradients, optimizer, ema_decay, total_steps),
            lambda: state.skip(),
        )
        counts = {"skipped_steps": state.skipped_steps, "skipped_batches": state.skipped_batches}
        return state, metrics | counts | {"finite": finite}

    train_step = sharding.traced_on(mesh, train_step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def gradient_norms(gradients: Params) -> dict[str, jax.Array]:
    """Return {"gradient_norm": of everything, "gradient_norm/down_blocks.0": of one of the outermost modules, ...}."""
    squares: dict[str, jax.Array] = {}
    for name, gradient in gradients.items():
        outermost = _OUTERMOST.match(name)
        module = outermost[0] if outermost else name
        squares[module] = squares.get(module, jnp.float32(0.0)) + jnp.sum(gradient.astype(jnp.float32) ** 2)
    norms = {f"gradient_norm/{module}": jnp.sqrt(square) for module, square in squares.items()}
    return {"gradient_norm": jnp.sqrt(sum(squares.values())), **norms}


def _accumulated(
    gradient: Callable[[Params, tuple], tuple[Params, dict]], values: Params, inputs: tuple, parts: int
) -> tuple[Params, dict]:
    """Return `gradient(values, inputs)`, the mean of that of so many parts of the inputs, one after another."""
    if parts == 1:
        return gradient(values, inputs)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, values, inputs))

    def add(total: tuple, part: tuple) -> tuple[tuple, None]:
        return jax.tree.map(lambda a, b: a + b / parts, total, gradient(values, part)), None

    return jax.lax.scan(add, zero, jax.tree.map(lambda x: _in_parts(x, parts), inputs))[0]


def _in_parts(x: jax.Array, parts: int) -> jax.Array:
    """Reshape [b, ...] to [parts, b / parts, ...]: every device splits the rows that it has, and moves none."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
