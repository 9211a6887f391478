"""Steppers: from noise to an image by a fixed number of network evaluations. They never clip.

Each is a table of steps, and one loop walks them all, as a whole or a part at a time.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import TERMS, StepTable

# What a walk has so far; all shaped like the image.
Carry = dict[str, Float[jax.Array, "*image"]]


def begin(table: StepTable, noise: Float[jax.Array, "*image"]) -> Carry:
    """Return what a walk has before the first row of the table.

    Args:
      noise: standard normal, of any shape.

    Returns:
      The image ("x"), the clean image last predicted ("previous"), and what else the rows need.
    """
    # Clean images of before the first row weigh 0, and so does what it finds kept: any finite value will do.
    carry = {term: jnp.zeros_like(noise) for term in ("kept", "before_previous") if term in _used(table)}
    return carry | {"x": jnp.asarray(table.start, noise.dtype) * noise, "previous": jnp.zeros_like(noise)}


def advance(
    schedule: NoiseSchedule,
    table: StepTable,
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: Carry,
    fresh_noise: Callable[[jax.Array], jax.Array],
    first: int | jax.Array,
    end: int | jax.Array,
) -> Carry:
    """Walk the table's rows from `first` to before `end`.

    Args:
      schedule: what the output of `denoise` means.
      denoise: (image, float32 scalar that the network is told, int32 number of the row) -> network output of the same
        shape, guidance included.
      fresh_noise: (number of the row, int32 scalar) -> standard normal, like the noise and independent of it.
        Deterministic steppers never call it.
    """
    used, dtype = _used(table), carry["x"].dtype
    columns: dict[str, Any] = {**table._asdict(), "start": None}  # which no row has
    rows: StepTable = jax.tree.map(jnp.asarray, StepTable(**columns))

    def weigh(weights: jax.Array, terms: Carry) -> jax.Array:
        products = (weights[i].astype(dtype) * terms[term] for i, term in enumerate(TERMS) if term in terms)
        return functools.reduce(operator.add, products)

    def update(number: jax.Array, carry: Carry) -> Carry:
        step = jax.tree.map(lambda column: column[number], rows)
        x = carry["x"]
        output = denoise(x, step.timestep, number)
        clean = schedule.clean_at(output, x, step.alpha.astype(dtype), step.sigma.astype(dtype))
        terms = carry | {"clean": clean}
        if "noise" in used:
            terms["noise"] = fresh_noise(number)
        terms = {term: terms[term] for term in TERMS if term in used}
        after = {"x": weigh(step.x, terms), "previous": clean, "before_previous": carry["previous"]}
        if "kept" in used:
            after["kept"] = weigh(step.kept, terms)
        return {term: after[term] for term in carry}

    return jax.lax.fori_loop(jnp.int32(first), jnp.int32(end), update, carry)


def _used(table: StepTable) -> set[str]:
    """Return the terms that some row gives a weight.

    The others are left out of what is traced: most steppers keep nothing and draw nothing.
    """
    return {term for i, term in enumerate(TERMS) if table.x[:, i].any() or table.kept[:, i].any()}
