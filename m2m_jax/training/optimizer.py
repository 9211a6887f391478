"""AdamW with clipping, warm-up and cosine, from `config.optimizer`."""

from __future__ import annotations

import jax
import optax

from m2m_jax.configuration import Optimizer
from m2m_jax.core.errors import UserError
from m2m_jax.models.initialization import is_set_attention


def make_optimizer(config: Optimizer, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of a flat dict of parameters, and its learning rate as a function of the step, for the log.

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
    schedule = optax.warmup_cosine_decay_schedule(
        # With no warm-up at all, optax begins at the peak; with one, the first step already moves a little.
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
    )
    optimizer = optax.chain(
        # Clipped first: the norm is that of the true gradient, whatever the rates of its parts.
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed),
        optax.masked(
            optax.scale(config.attn2_rate),  # of the learning rate, and so of the decay, too
            lambda params: {name: is_set_attention(name) for name in params},
        ),
    )
    return _promoting(optimizer), schedule


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `optimizer`, running also where JAX's dtype promotion is strict: Optax raises floats to an int32 count."""

    def update(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _decayed(params: dict) -> dict[str, bool]:
    # Scales and biases are few and have a meaning at their size; only kernels are pulled to zero.
    return {name: name.endswith("kernel") and value.ndim >= 2 for name, value in params.items()}
