"""Guidance as a table: under which conditions the network is evaluated, and how its outputs are weighted.

Every guidance is a set of branches, conditions under which the network sees the same noised image at the same timestep,
with a weight for each branch at each step. The weights are functions of the noise level alone and sum to one. So it is
the same guidance whether noise, v or the clean image is guided: they are affine in one another at a fixed noised image.

    classifier-free guidance        w * f(context) + (1 - w) * f()
    text and images, two scales     f() + v * (f(images) - f()) + w * (f(images, text) - f(images))
    history guidance                f(all) + w * (f(all, noised) - f())

A guidance is a function that makes such a table on the host, in float64, and registers itself in `GUIDANCES`; how
outputs are combined, where a weighted sum is not meant, is a function in `COMBINATIONS`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry, nearest

# Bounds of the context images that a branch sees, as of a Python slice.
Bounds = tuple[int | None, int | None]
ALL: Bounds = (None, None)
NONE: Bounds = (0, 0)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A condition under which the network is evaluated.

    Attributes:
      images: bounds of the context images that it sees, as of a Python slice: `ALL`, `NONE`, `(-2, None)` for the last
        two, `(None, -1)` for all but the last.
      level: how much noise these images carry, a fraction of the noise levels: 0 is clean.
      text: whether it is told the caption; else it is told the empty text.

    Example:
        Branch()                                # all that there is
        Branch(images=NONE, text=False)         # nothing
        Branch(images=(-1, None), level=0.4)    # the caption and the last image, noised
    """

    images: Bounds = ALL
    level: float = 0.0
    text: bool = True


EVERYTHING, NOTHING = Branch(), Branch(images=NONE, text=False)


@dataclasses.dataclass(frozen=True, eq=False)
class GuidanceTable:
    """Branches and their weights at each of S steps.

    Attributes:
      branches: g conditions, all different; the first is the full one.
      weights_sg: float64, each row of sum 1. A branch is not evaluated at a step where it weighs 0.
      combination: a name in `COMBINATIONS`.
    """

    branches: tuple[Branch, ...]
    weights_sg: np.ndarray
    combination: str = "sum"

    def __post_init__(self):
        if self.weights_sg.shape[1:] != (len(self.branches),):
            raise ValueError(f"{len(self.branches)} branches and weights of shape {self.weights_sg.shape}")
        if not np.allclose(self.weights_sg.sum(1), 1.0, rtol=0, atol=1e-9):
            raise ValueError(f"the weights of each step must sum to 1, not {self.weights_sg.sum(1)}")

    def reduce(self, *, reads_images: bool, reads_text: bool) -> "GuidanceTable":
        """Return the table for a model that reads a part of the conditions: equal branches are made one.

        The guided output stays the same. Branches that never weigh anything are left out.
        """
        weights: dict[Branch, np.ndarray] = {}
        for branch, weights_s in zip(self.branches, self.weights_sg.T, strict=True):
            images = branch.images if reads_images else ALL
            level = branch.level if reads_images and images != NONE else 0.0
            read = Branch(images, level, branch.text or not reads_text)
            weights[read] = weights.get(read, 0.0) + weights_s
        first, *others = weights
        branches = (first, *(branch for branch in others if weights[branch].any()))
        return dataclasses.replace(
            self, branches=branches, weights_sg=np.stack([weights[branch] for branch in branches], axis=1)
        )


# (noise levels float64 [S], fractions from 1, pure noise, to 0, clean; options by name) -> the table. Any file of this
# package may register one.
GUIDANCES = Registry[Callable[..., GuidanceTable]]("guidance", "m2m_jax.diffusion")
# Fraction of the noise levels -> how much of its scale guidance has, from 0 to 1.
SCHEDULES = Registry[Callable[[np.ndarray], np.ndarray]]("guidance_schedule")
# (outputs of the branches that weigh something, [b, ...] each; their weights, scalars) -> the guided output.
COMBINATIONS = Registry[Callable[[Sequence[jax.Array], Sequence[jax.Array]], jax.Array]]("combination")

SCHEDULES.register("constant")(np.ones_like)
# From none at pure noise to the whole scale at the clean image: Wang et al. 2024, arXiv:2404.13040.
SCHEDULES.register("linear")(lambda noise_s: 1.0 - noise_s)
SCHEDULES.register("cosine")(lambda noise_s: 0.5 + 0.5 * np.cos(np.pi * noise_s))


@GUIDANCES.register("cfg")
def classifier_free(
    noise_s: Float[np.ndarray, " s"],
    *,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    schedule: str = "constant",
) -> GuidanceTable:
    """Return classifier-free guidance over all conditions at once: Ho & Salimans 2022, arXiv:2207.12598.

    Args:
      noise_s: fractions of the noise levels.
      scale: at least 0; 1 is plain conditional sampling, 0 ignores the conditions, above 1 exaggerates what they
        change. diffusers' `guidance_scale` is this scale above 1, and no guidance below; the paper's w is scale - 1.
      interval, schedule: see `fade`.
    """
    return GuidanceTable((EVERYTHING, NOTHING), fade(noise_s, (scale, 1.0 - scale), interval, schedule))


def fade(
    noise_s: Float[np.ndarray, " s"], weights: Sequence[float], interval: tuple[float, float], schedule: str
) -> Float[np.ndarray, "s g"]:
    """Return weights [S, g] that go from the first branch alone to `weights`.

    Args:
      noise_s: fractions of the noise levels.
      weights: g of them, the first branch's first.
      interval: the first branch alone counts outside of these fractions, 0 clean and 1 noise (Kynkaanniemi et al. 2024,
        arXiv:2404.07724).
      schedule: a name in `SCHEDULES`.
    """
    low, high = interval
    first = np.eye(1, len(weights))
    progress_s = np.where((low <= noise_s) & (noise_s <= high), SCHEDULES.choose(schedule)(noise_s), 0.0)
    return first + progress_s[:, None] * (np.asarray(weights, np.float64) - first)


def make_table(name: str, noise_s: np.ndarray, options: Mapping[str, Any], given: Mapping[str, Any]) -> GuidanceTable:
    """Return the table of a registered guidance.

    Args:
      name: in `GUIDANCES`.
      noise_s: fractions of the noise levels, one a step.
      options: what every guidance may take, {name: (value, the value that means none)}.
      given: further options, which it must take.

    Raises:
      UserError: there is no such guidance, it does not take an option, or refuses its value.
    """
    guidance = GUIDANCES.choose(name)
    taken = [one.name for one in inspect.signature(guidance).parameters.values() if one.kind is one.KEYWORD_ONLY]
    chosen = {}
    for option, (value, none) in options.items():
        if option in taken:
            chosen[option] = value
        elif value != none:
            raise UserError(f"guidance {name!r} takes no guidance_{option}: leave it at {none!r}")
    for option in given:
        if option not in taken or option in options:
            own = [other for other in taken if other not in options]
            there = f"there are {', '.join(own)}" if own else "it has none"
            raise UserError(f"guidance {name!r} has no option {option!r}{nearest(option, own) or ';'} {there}")
    return guidance(np.asarray(noise_s, np.float64), **chosen, **given)


@COMBINATIONS.register("sum")
def weighted_sum(outputs: Sequence[jax.Array], weights: Sequence[jax.Array]) -> jax.Array:
    """Return the weighted sum of outputs, written as differences from the last, whose weight is what is left of 1."""
    *others, last = outputs
    return functools.reduce(
        lambda total, term: total + term[0] * (term[1] - last), zip(weights, others, strict=False), last
    )


def guide(
    table: GuidanceTable,
    evaluate: Callable[[tuple[Branch, ...]], jax.Array],
    row: Int[jax.Array, ""],
    *,
    rescale: float = 0.0,
) -> Float[jax.Array, "b ..."]:
    """Return the guided output of the network at one step, [b, ...].

    Args:
      table: as many rows as there are steps.
      evaluate: (branches) -> outputs [b, g, ...]. Traced once for each choice of branches that some row makes.
      row: int32 [], the step.
      rescale: see `rescaled`.
    """
    weights_sg = table.weights_sg.astype(np.float32)
    active_sg = weights_sg != 0
    active_sg[:, 0] |= bool(rescale)  # which then is compared with
    choices, choice_s = np.unique(active_sg, axis=0, return_inverse=True)

    def combine(active_g: np.ndarray) -> jax.Array:
        columns = np.flatnonzero(active_g)
        outputs_bg = evaluate(tuple(table.branches[i] for i in columns))
        outputs = [outputs_bg[:, i] for i in range(len(columns))]
        weights_g = jnp.asarray(weights_sg[:, columns], outputs_bg.dtype)[row]
        guided = COMBINATIONS[table.combination](outputs, [weights_g[i] for i in range(len(columns))])
        return rescaled(guided, outputs[0], rescale) if rescale else guided

    branches = [functools.partial(combine, active_g) for active_g in choices]
    if len(branches) == 1:
        return branches[0]()
    return jax.lax.switch(jnp.asarray(choice_s.reshape(-1), jnp.int32)[row], branches)


def rescaled(
    guided: Float[jax.Array, "*image"], conditional: Float[jax.Array, "*image"], amount: float
) -> Float[jax.Array, "*image"]:
    """Bring an output [b, ...] back to the standard deviation of the conditional one, wholly (1) or in part.

    Lin et al. 2023, arXiv:2305.08891, section 3.4. It is of the network's output, whatever that predicts.
    """
    axes = tuple(range(1, guided.ndim))
    factor = conditional.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-8)
    return guided * (1.0 + amount * (factor - 1.0))
