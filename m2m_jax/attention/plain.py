"""Attention in plain XLA, which runs everywhere; a call without a mask for each run of key images that is seen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError

# (q [b, t, h, d], k [b, s, h, d], v [b, s, h, d]) -> [b, t, h, d]; by keyword keep_bk: bool [b, s].
Attend = Callable[..., jax.Array]
# What all backends take: of each image of the stack, of each clean image, and which of these are seen.
Queries = Float[jax.Array, "b q t h d"]
Keys = Float[jax.Array, "b k s h d"]
Keep = Bool[jax.Array, "b k"] | None


def attend(
    q_bthd: Float[jax.Array, "b q h d"],
    k_bthd: Float[jax.Array, "b k h d"],
    v_bthd: Float[jax.Array, "b k h d"],
    mask_qk: Bool[np.ndarray, "q k"] | None = None,
    keep_bk: Bool[jax.Array, "b k"] | None = None,
) -> Float[jax.Array, "b q h d"]:
    """Return scaled dot-product attention with a float32 softmax.

    Args:
      mask_qk: bool over tokens, shared by the batch: where a query sees a key.
      keep_bk: bool over tokens: keys that a row sees. A query that sees none gets their mean.
    """
    scale = q_bthd.shape[-1] ** -0.5
    logits_bhqk = jnp.einsum("bqhd,bkhd->bhqk", q_bthd * scale, k_bthd, preferred_element_type=jnp.float32)
    if mask_qk is not None:
        logits_bhqk = jnp.where(mask_qk[None, None], logits_bhqk, jnp.finfo(jnp.float32).min)
    if keep_bk is not None:
        logits_bhqk = jnp.where(keep_bk[:, None, None, :], logits_bhqk, jnp.finfo(jnp.float32).min)
    weights_bhqk = jax.nn.softmax(logits_bhqk, axis=-1).astype(v_bthd.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights_bhqk, v_bthd)


def dense(q_bqthd: Queries, k_bkshd: Keys, v_bkshd: Keys, layout: SetLayout, keep_bk: Keep = None) -> Queries:
    """Attend by the reference: one attention over all tokens under the dense mask. Works on forbidden blocks too."""
    b, q, t, h, d = q_bqthd.shape
    s = k_bkshd.shape[2]
    q_bthd, k_bthd, v_bthd = (jax.lax.collapse(x, 1, 3) for x in (q_bqthd, k_bkshd, v_bkshd))
    keep_tokens_bk = None if keep_bk is None else jnp.repeat(keep_bk, s, axis=1)
    out_bthd = attend(q_bthd, k_bthd, v_bthd, layout.token_mask_qk(t, s), keep_tokens_bk)
    out_bqthd = out_bthd.reshape(b, q, t, h, d)
    sees_something_q = np.any(layout.mask_qk(), axis=1)
    return jnp.where(sees_something_q[None, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))


def prefix(q_bqthd: Queries, k_bkshd: Keys, v_bkshd: Keys, layout: SetLayout, keep_bk: Keep = None) -> Queries:
    """Attend by calls over slices of the keys: no work on forbidden blocks, and no mask but `keep_bk` in memory.

    Raises:
      UserError: a row of the mask is not one contiguous run of key images.
    """
    return over_slices(attend, q_bqthd, k_bkshd, v_bkshd, layout, keep_bk)


def over_slices(
    attend: Attend, q_bqthd: Queries, k_bkshd: Keys, v_bkshd: Keys, layout: SetLayout, keep_bk: Keep = None
) -> Queries:
    """Return what `attend` gives for each run of key images that is seen.

    Query images that see the same run of key images share one call: with `clean_sees="preceding"` clean i and
    noised i + 1 do, so a training set of n images takes n - 1 calls.

    Raises:
      UserError: as `prefix`.
    """
    b, _, t, h, d = q_bqthd.shape
    groups = _contiguous_runs(layout)
    out_of: dict[int, jax.Array] = {}
    for (start, stop), queries in groups.items():
        if start == stop:
            shares = [jnp.zeros((b, t, h, d), v_bkshd.dtype)] * len(queries)
        else:
            q_bthd = jnp.concatenate([q_bqthd[:, i] for i in queries], axis=1)
            keys, values = (jax.lax.collapse(x[:, start:stop], 1, 3) for x in (k_bkshd, v_bkshd))
            kept = {}
            if keep_bk is not None:
                kept["keep_bk"] = jnp.repeat(keep_bk[:, start:stop], k_bkshd.shape[2], axis=1)
            shares = jnp.split(attend(q_bthd, keys, values, **kept), len(queries), axis=1)
        for i, share in zip(queries, shares, strict=True):
            out_of[i] = share
    return jnp.stack([out_of[i] for i in range(layout.num_images)], axis=1)


def _contiguous_runs(layout: SetLayout) -> dict[tuple[int, int], list[int]]:
    """Return {(first key image, one past the last): query images that see exactly these}."""
    groups: dict[tuple[int, int], list[int]] = {}
    for query, row_k in enumerate(layout.mask_qk()):
        seen = np.flatnonzero(row_k)
        run = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        if run[1] - run[0] != seen.size:
            raise UserError(
                "attention backends 'prefix' and 'prefix_cudnn' need each image to see one contiguous run of clean "
                f"images, but image {query} of {layout} sees {seen.tolist()}; use model.attention_backend='dense'"
            )
        groups.setdefault(run, []).append(query)
    return groups
