"""AdamW with clipping, warm-up and cosine, from `config.optimizer`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from m2m_jax.configuration import Optimizer
from m2m_jax.core.errors import UserError
from m2m_jax.models.initialization import is_set_attention

# (updates so far, steps of the whole run or None for those of the config) -> learning rate
LearningRate = Callable[..., jax.Array]


def make_optimizer(config: Optimizer, total_steps: int) -> tuple[optax.GradientTransformationExtraArgs, LearningRate]:
    """Return the optimizer of a flat dict of parameters, and its learning rate as a function of the step, for the log.

    `update(..., total_steps=int32 [])` ends the cosine elsewhere than the config: a run that is given minutes knows its
    steps when it has been compiled (`training/time_limit.py`).

    Args:
        config: `config.optimizer`.
        total_steps: the cosine reaches zero here.

    Raises:
        UserError: the warm-up does not end before the run.
    """
    if config.warmup_steps >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {config.warmup_steps}; it must be less than "
            f"config.train.steps = {total_steps}"
        )

    def learning_rate(count: jax.typing.ArrayLike, last: jax.typing.ArrayLike | None = None) -> jax.Array:
        peak, warmup, count = config.learning_rate, config.warmup_steps, jnp.asarray(count, jnp.float32)
        last = jnp.asarray(total_steps if last is None else last, jnp.float32)
        # The first step already moves a little.
        rising = peak * (count + 1) / (warmup + 1)
        share = jnp.clip((count - warmup) / (last - warmup), 0, 1)
        return jnp.minimum(rising, peak * 0.5 * (1 + jnp.cos(jnp.pi * share)))

    optimizer = optax.chain(
        # Clipped first: the norm is that of the true gradient, whatever the rates of its parts.
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(  # AdamW
            optax.scale_by_adam(b1=config.b1, b2=config.b2),
            optax.add_decayed_weights(config.weight_decay, _decayed),
            _descend(learning_rate),
        ),
        optax.masked(
            optax.scale(config.attn2_rate),  # of the learning rate, and so of the decay, too
            lambda params: {name: is_set_attention(name) for name in params},
        ),
    )
    return _promoting(optimizer), learning_rate


def _descend(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """Return `optax.scale_by_learning_rate`, whose schedule can be told `total_steps`."""

    def update(updates, state, params=None, *, total_steps=None):
        rate = learning_rate(state.count, total_steps)
        updates = jax.tree.map(lambda update: -rate.astype(update.dtype) * update, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )


def _promoting(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Return `optimizer`, running also where JAX's dtype promotion is strict: Optax raises floats to an int32 count."""

    def update(gradients, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _decayed(params: dict) -> dict[str, bool]:
    # Scales and biases are few and have a meaning at their size; only kernels are pulled to zero.
    return {name: name.endswith("kernel") and value.ndim >= 2 for name, value in params.items()}
