"""Random keys without state: each is computed from (seed, step, stream), so resuming replays nothing."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """What a key is for. The numbers are part of a run's randomness: never change or reuse one."""

    PARAMS = 0
    NOISE = 1
    TIMESTEP = 2
    CONTEXT_DROPOUT = 3
    EVAL = 4
    SAMPLE = 5
    AUTOENCODER = 6


def stream_key(seed: int, step: int | jax.Array, stream: Stream) -> jax.Array:
    """The key of `stream` at `step`: a typed key [].

    Args:
        seed: of the run, in [0, 2**32).
        step: a non-negative number or a traced integer scalar [].
        stream: what the key is for.
    """
    key = jax.random.fold_in(jax.random.key(jnp.uint32(seed)), jnp.asarray(step).astype(jnp.uint32))
    return jax.random.fold_in(key, jnp.uint32(stream))
