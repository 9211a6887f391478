"""Classifier-free guidance over the context images: Ho & Salimans 2022, arXiv:2207.12598."""

import jax
import jax.numpy as jnp


def guide(unconditional: jax.Array, conditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """unconditional + scale * (conditional - unconditional).

    The condition is the context: `conditional` is the network output for a noised image that sees the clean
    images of its set, `unconditional` the output for the same noised image, at the same timestep, that sees
    none of them (a case that context dropout trains). Scale 1 is plain conditional sampling (leave the
    unconditional evaluation out), 0 ignores the context, above 1 exaggerates what the context changes.
    diffusers' `guidance_scale` is this scale; the paper's w is scale - 1.

    Noise, v and the clean image are affine in each other at a fixed noised image, and the two weights sum to
    1: guiding whichever the network outputs is the same guidance.

    Args:
      unconditional: [...] network output without context.
      conditional: [...] network output with context, same shape and dtype.
      scale: a scalar.

    Returns:
      [...], the guided output.
    """
    scale = jnp.asarray(scale, conditional.dtype)
    return unconditional + scale * (conditional - unconditional)
