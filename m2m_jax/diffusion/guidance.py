"""Classifier-free guidance over the context images: Ho & Salimans 2022, arXiv:2207.12598."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from m2m_jax.core.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly the context is exaggerated; static.

    The condition is the context: `conditional` is the network output for a noised image that sees the clean images of
    its set, `unconditional` the output for the same noised image, at the same timestep, that sees none of them (a case
    that context dropout trains).

    Attributes:
      scale: 1 is plain conditional sampling, 0 ignores the context, above 1 exaggerates what the context changes.
        diffusers' `guidance_scale` is this scale above 1, and no guidance at all below; the paper's w is scale - 1.
      interval: guide only between these fractions of the noise levels, 0 clean and 1 noise (Kynkaanniemi et al. 2024,
        arXiv:2404.07724).
      rescale: 0 to 1, how far the guided output is brought back to the standard deviation of the conditional one (Lin
        et al. 2023, arXiv:2305.08891, section 3.4).
      schedule: how the scale goes over the steps: "constant", or from 1 at pure noise to `scale` at the clean image,
        "linear" or along a "cosine" (Wang et al. 2024, arXiv:2404.13040).
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    schedule: str = "constant"

    def __post_init__(self):
        if not 0.0 <= self.scale < math.inf:
            raise UserError(f"guidance_scale must be a number of at least 0, not {self.scale}")
        if not (len(self.interval) == 2 and 0.0 <= self.interval[0] <= self.interval[1] <= 1.0):
            raise UserError(f"guidance_interval must be two fractions, the smaller first, not {self.interval}")
        if not 0.0 <= self.rescale <= 1.0:
            raise UserError(f"guidance_rescale must be between 0 and 1, not {self.rescale}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance_schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")

    @property
    def guides(self) -> bool:
        """Whether the unconditional output is needed at all."""
        return self.scale != 1.0

    def scale_at(self, noise_fraction: jax.Array) -> jax.Array:
        """The scale at a noise level: float32 [], for a fraction [] of the noise levels."""
        noise_fraction = jnp.asarray(noise_fraction, jnp.float32)
        progress = {
            "constant": jnp.ones_like(noise_fraction),
            "linear": 1.0 - noise_fraction,
            "cosine": 0.5 + 0.5 * jnp.cos(jnp.pi * noise_fraction),
        }[self.schedule]
        low, high = self.interval
        inside = (low <= noise_fraction) & (noise_fraction <= high)
        return jnp.where(inside, 1.0 + (self.scale - 1.0) * progress, 1.0)

    def __call__(self, conditional: jax.Array, unconditional: jax.Array, noise_fraction: jax.Array) -> jax.Array:
        """unconditional + scale * (conditional - unconditional), rescaled; [b, ...], shape and dtype of both.

        Noise, v and the clean image are affine in each other at a fixed noised image, and the two weights sum to 1:
        guiding whichever the network outputs is the same guidance. (Rescaling is not: it is of the output.)
        """
        scale = self.scale_at(noise_fraction).astype(conditional.dtype)
        guided = unconditional + scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        axes = tuple(range(1, conditional.ndim))
        factor = conditional.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-8)
        return guided * (1.0 + self.rescale * (factor - 1.0))
