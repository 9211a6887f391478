"""Steppers: from noise to an image by a fixed number of network evaluations. They never clip."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.diffusion import step_tables
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import TERMS, StepTable


@dataclasses.dataclass(frozen=True)
class Stepper:
    """A table of steps, and the scan that walks it.

    Attributes:
      table: (schedule, number of steps) -> the steps; UserError where the schedule is none for this stepper.
    """

    table: Callable[[NoiseSchedule, int], StepTable]

    def sample(
        self,
        schedule: NoiseSchedule,
        num_steps: int,
        denoise: Callable[[jax.Array, jax.Array], jax.Array],
        noise: jax.Array,
        fresh_noise: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """Walks from noise to a clean image.

        Args:
          schedule: noise levels, and what the output of `denoise` means.
          num_steps: evaluations of `denoise` (of heun 2 * num_steps - 1); static.
          denoise: (image, float32 scalar that the network is told) -> network output of the same shape, guidance
            included.
          noise: standard normal, of any shape.
          fresh_noise: (number of the evaluation, int32 scalar) -> standard normal, like `noise` and independent of
            it. Deterministic steppers never call it.

        Returns:
          The image, with the shape and dtype of `noise`.
        """
        table = self.table(schedule, num_steps)
        # What no row gives a weight is left out when this is traced: most steppers keep nothing and draw nothing.
        used = {term for i, term in enumerate(TERMS) if table.x[:, i].any() or table.kept[:, i].any()}

        def weigh(weights: jax.Array, terms: dict[str, jax.Array]) -> jax.Array:
            products = (weights[i].astype(noise.dtype) * terms[term] for i, term in enumerate(TERMS) if term in terms)
            return functools.reduce(operator.add, products)

        def update(carry: dict[str, jax.Array], row: tuple[jax.Array, StepTable]):
            number, step = row
            x = carry["x"]
            level = (step.alpha.astype(x.dtype), step.sigma.astype(x.dtype))
            terms = carry | {"clean": schedule.clean_at(denoise(x, step.timestep), x, *level)}
            if "noise" in used:
                terms["noise"] = fresh_noise(number)
            terms = {term: terms[term] for term in TERMS if term in used}
            after = {
                "x": weigh(step.x, terms),
                "kept": weigh(step.kept, terms) if "kept" in used else None,
                "previous": terms.get("clean"),
                "before_previous": carry.get("previous"),
            }
            return {term: after[term] for term in carry}, None

        # Clean images of before the first row weigh 0, and so does what it finds kept: any finite value will do.
        carry = {term: jnp.zeros_like(noise) for term in ("kept", "previous", "before_previous") if term in used}
        carry["x"] = table.start.astype(noise.dtype) * noise
        rows = (np.arange(len(table.timestep), dtype=np.int32), table._replace(start=None))
        return jax.lax.scan(update, carry, jax.tree.map(jnp.asarray, rows))[0]["x"]


STEPPERS: dict[str, Stepper] = {
    "ddpm": Stepper(step_tables.ddpm),
    "ddim": Stepper(step_tables.ddim),
    "euler": Stepper(step_tables.euler),
    "euler_ancestral": Stepper(step_tables.euler_ancestral),
    "dpmpp_2m": Stepper(step_tables.dpmpp_2m),
    "dpmpp_2m_sde": Stepper(step_tables.dpmpp_2m_sde),
    "unipc": Stepper(step_tables.unipc),
    "heun": Stepper(step_tables.heun),
}
