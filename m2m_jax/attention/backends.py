"""Executions of image-set attention. Each gets its mask from `SetLayout.mask_qk`, and none falls back silently.

All take `q_bqthd` (queries of the images of the stack, t tokens an image) and `k_bkshd`, `v_bkshd` (of the clean
images, s tokens an image), and return `[b, q, t, h, d]`. A query image that sees no key gets zeros.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.attention.layout import SetLayout
from m2m_jax.errors import UserError


def attend(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask_qk: np.ndarray | None = None) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax. `mask_qk`: bool over tokens, shared by the batch."""
    scale = q_bthd.shape[-1] ** -0.5
    logits_bhqk = jnp.einsum("bqhd,bkhd->bhqk", q_bthd * scale, k_bthd, preferred_element_type=jnp.float32)
    if mask_qk is not None:
        logits_bhqk = jnp.where(mask_qk[None, None], logits_bhqk, jnp.finfo(jnp.float32).min)
    weights_bhqk = jax.nn.softmax(logits_bhqk, axis=-1).astype(v_bthd.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_bhqk, v_bthd)


def dense(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """The reference: one attention over all tokens under the dense mask. Works on forbidden blocks too."""
    b, q, t, h, d = q_bqthd.shape
    flat = (jax.lax.collapse(x, 1, 3) for x in (q_bqthd, k_bkshd, v_bkshd))
    out_bqthd = attend(*flat, mask_qk=layout.token_mask_qk(t, k_bkshd.shape[2])).reshape(b, q, t, h, d)
    sees_something_q = layout.mask_qk().any(1)
    return jnp.where(sees_something_q[None, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))


def prefix(q_bqthd: jax.Array, k_bkshd: jax.Array, v_bkshd: jax.Array, layout: SetLayout) -> jax.Array:
    """Plain attention calls over slices of the keys: no work on forbidden blocks, no mask in memory.

    Query images that see the same run of key images share one call: with `clean_sees="preceding"` clean i and
    noised i + 1 do, so a training set of n images takes n - 1 calls.

    Raises:
      UserError: a row of the mask is not one contiguous run of key images.
    """
    b, _, t, h, d = q_bqthd.shape
    groups = _contiguous_runs(layout)
    out_q: list[jax.Array | None] = [None] * layout.num_images
    for (start, stop), queries in groups.items():
        if start == stop:
            shares = [jnp.zeros((b, t, h, d), v_bkshd.dtype)] * len(queries)
        else:
            q_bthd = jnp.concatenate([q_bqthd[:, i] for i in queries], axis=1)
            keys, values = (jax.lax.collapse(x[:, start:stop], 1, 3) for x in (k_bkshd, v_bkshd))
            shares = jnp.split(attend(q_bthd, keys, values), len(queries), axis=1)
        for i, share in zip(queries, shares, strict=True):
            out_q[i] = share
    return jnp.stack(out_q, axis=1)


def _contiguous_runs(layout: SetLayout) -> dict[tuple[int, int], list[int]]:
    """{(first key image, one past the last): query images that see exactly these}."""
    groups: dict[tuple[int, int], list[int]] = {}
    for query, row_k in enumerate(layout.mask_qk()):
        seen = np.flatnonzero(row_k)
        run = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        if run[1] - run[0] != seen.size:
            raise UserError(
                f"attention backend 'prefix' needs each image to see one contiguous run of clean images, but image "
                f"{query} of {layout} sees {seen.tolist()}; use model.attention_backend='dense'"
            )
        groups.setdefault(run, []).append(query)
    return groups


Backend = Callable[[jax.Array, jax.Array, jax.Array, SetLayout], jax.Array]
BACKENDS: dict[str, Backend] = {"dense": dense, "prefix": prefix}
