"""Image-set attention by cuDNN's flash attention, a kernel for NVIDIA GPUs that keeps no logits in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.mesh import split_over_mesh
from m2m_jax.attention.plain import over_slices
from m2m_jax.core.errors import UserError


def prefix_cudnn(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """Attend as `prefix`, each call by cuDNN, in 16 bits.

    cuDNN is never given a mask, with which it is slow or fails: what a call is given, all of its queries see.

    Raises:
      UserError: as `prefix` and `split_over_mesh`; or cuDNN is not there, or takes no such dtype or width of a head.
    """
    # Left to cuDNN's own partitioner, a mesh that splits rows (context) does not compile.
    run = functools.partial(over_slices, _attend, layout=layout)
    return split_over_mesh(run, "prefix_cudnn", q_bqthd, k_bkshd, v_bkshd)


def _attend(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array) -> jax.Array:
    if q_bthd.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention backend 'prefix_cudnn' computes in 16 bits, not in {q_bthd.dtype}; "
            "set model.dtype='bfloat16' or model.attention_backend='prefix'"
        )
    try:
        return jax.nn.dot_product_attention(q_bthd, k_bthd, v_bthd, implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:  # that it refuses a shape, or that there is none
        raise UserError(
            f"attention backend 'prefix_cudnn' can't attend from {q_bthd.shape} to {k_bthd.shape}: {error} "
            "Set model.attention_backend='prefix'"
        ) from error
