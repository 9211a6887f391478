"""Random keys without state: each is computed from (program, seed, step, stream), so resuming replays nothing.

Keys form a tree: the seed, below it a `Domain` for each program, below that what the program counts by. No two programs
share a key, whatever their seeds and steps. A key is either drawn from, or folded, or split, and never two of these:
`jax.random.split(key)[i]` and `jax.random.fold_in(key, i)` are the same key.
"""

from __future__ import annotations

import enum
import hashlib

import jax
import jax.numpy as jnp
import numpy as np


class Domain(enum.IntEnum):
    """Name the program that draws. The numbers are part of a run's randomness: never change or reuse one.

    Example:
        key = jax.random.fold_in(domain_key(Domain.TEXT_TO_IMAGE, seed), image)
    """

    INITIALIZE = 0
    TRAIN = 1
    EVALUATE = 2
    SAMPLE_SETS = 3
    TEXT_TO_IMAGE = 4


class Stream(enum.IntEnum):
    """Name what is drawn at a step. The numbers are part of a run's randomness: never change or reuse one."""

    PARAMS = 0
    NOISE = 1
    TIMESTEP = 2
    CONTEXT_DROPOUT = 3
    POSTERIOR = 6
    ADAPTER = 7


def domain_key(domain: Domain, seed: int | jax.Array) -> jax.Array:
    """Return the key below which all keys of a program lie: a typed key [].

    Args:
      domain: which program draws.
      seed: of the run, in [0, 2**32), or a traced integer scalar [].
    """
    return jax.random.fold_in(jax.random.key(jnp.uint32(seed)), jnp.uint32(domain))


def stream_key(domain: Domain, seed: int, step: int | jax.Array, stream: Stream) -> jax.Array:
    """Return the key of one stream at one step of a program: a typed key [].

    Args:
      domain: which program draws.
      seed: of the run, in [0, 2**32).
      step: a non-negative number or a traced integer scalar []: of training, or of a batch of an evaluation.
      stream: what the key is for.
    """
    key = jax.random.fold_in(domain_key(domain, seed), jnp.asarray(step).astype(jnp.uint32))
    return jax.random.fold_in(key, jnp.uint32(stream))


def named_generator(domain: Domain, seed: int, stream: Stream, name: str) -> np.random.Generator:
    """Return NumPy's generator for one named thing that a program draws on the host, as a parameter at the start.

    Args:
      domain: which program draws.
      seed: of the run, in [0, 2**32).
      stream: what is drawn.
      name: what it is for.
    """
    digest = hashlib.sha256(f"{int(domain)} {int(seed)} {int(stream)} {name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
