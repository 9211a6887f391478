"""Image-set attention to finished images whose keys and values are kept: sampling's form of the mask.

A sampler makes one image a set at a time, so all that is left of the mask (`layout.allowed`) is a number: an image sees
the first `count` kept images of its set and, where it is clean, itself.
"""

import jax
import jax.numpy as jnp


def attend_to_kept(
    q_bthd: jax.Array,
    k_bmshd: jax.Array,
    v_bmshd: jax.Array,
    count_b: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention of each row to the first `count_b` of its m kept images; zeros where it sees nothing.

    The softmax is accumulated image by image (Milakov & Gimelshein, arXiv 1805.02867), in float32, for as many images
    as the fullest row has: shapes are those of the whole cache, and work grows with what is in it.

    Args:
      q_bthd: queries of the images that are made, t tokens each.
      k_bmshd, v_bmshd: kept images, s tokens each; cast to the dtype of `q_bthd`.
      count_b: int32 [b].
      own: keys and values [b, s, h, d] of one more image that each row sees.

    Returns:
      [b, t, h, d], in the dtype of `q_bthd`.
    """
    b, t, h, d = q_bthd.shape
    dtype = q_bthd.dtype
    q_bthd = q_bthd * d**-0.5

    def add(k_bshd, v_bshd, seen_b, carry):
        """One image: (largest logit, sum of weights, weighted sum of values) so far, to those with it."""
        top_bht, weight_bht, sum_bhtd = carry
        logits_bhts = jnp.einsum("bthd,bshd->bhts", q_bthd, k_bshd.astype(dtype), preferred_element_type=jnp.float32)
        logits_bhts = jnp.where(seen_b[:, None, None, None], logits_bhts, -jnp.inf)
        new_top_bht = jnp.maximum(top_bht, logits_bhts.max(-1))
        # A row that has seen nothing yet has no top: exp(-inf - -inf) would be NaN.
        shift_bht = jnp.where(jnp.isfinite(new_top_bht), new_top_bht, 0.0)
        decay_bht, weights_bhts = jnp.exp(top_bht - shift_bht), jnp.exp(logits_bhts - shift_bht[..., None])
        new_bhtd = jnp.einsum(
            "bhts,bshd->bhtd", weights_bhts.astype(dtype), v_bshd.astype(dtype), preferred_element_type=jnp.float32
        )
        weight_bht = decay_bht * weight_bht + weights_bhts.sum(-1)
        return new_top_bht, weight_bht, decay_bht[..., None] * sum_bhtd + new_bhtd

    def add_kept(j, carry):
        k_bshd, v_bshd = (jax.lax.dynamic_index_in_dim(x, j, 1, keepdims=False) for x in (k_bmshd, v_bmshd))
        return add(k_bshd, v_bshd, j < count_b, carry)

    carry = (jnp.full((b, h, t), -jnp.inf), jnp.zeros((b, h, t)), jnp.zeros((b, h, t, d)))
    if own is not None:
        carry = add(*own, jnp.ones(b, bool), carry)
    _, weight_bht, sum_bhtd = jax.lax.fori_loop(0, count_b.max(), add_kept, carry)
    out_bhtd = sum_bhtd / jnp.where(weight_bht > 0, weight_bht, 1.0)[..., None]
    return out_bhtd.transpose(0, 2, 1, 3).astype(dtype)
