"""What products of float32 are computed in, which is float32 on CPUs alone."""

from __future__ import annotations

import contextlib

import jax

# default: as the platform has it: TF32 on NVIDIA GPUs, bfloat16 on TPUs. highest: float32 everywhere.
PRECISIONS = ("default", "highest")


def products_in(precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which dots and convolutions of float32, and their gradients, are traced at a precision.

    Args:
      precision: one of `PRECISIONS`.

    Example:
        with products_in("highest"):
            latents = encode(images)
    """
    return contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision)
