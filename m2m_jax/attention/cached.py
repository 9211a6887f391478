"""Image-set attention to finished images whose keys and values are kept: sampling's form of the mask.

A sampler makes one image a set at a time, so all that is left of the mask (`layout.allowed`) is which of the kept
images each row sees and, where it is a clean image, itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from m2m_jax.core.registry import Registry

# See `plain`.
CachedAttention = Callable[..., jax.Array]
CACHED_BACKENDS = Registry[CachedAttention]("backend of attention to kept images")


@CACHED_BACKENDS.register("plain")
def plain(
    q_bgthd: Float[jax.Array, "b g t h d"],
    k_bmshd: Float[jax.Array, "b m s h d"],
    v_bmshd: Float[jax.Array, "b m s h d"],
    sees_bgm: Bool[jax.Array, "b g m"],
    own: tuple[Float[jax.Array, "b own h d"], Float[jax.Array, "b own h d"]] | None = None,
) -> Float[jax.Array, "b g t h d"]:
    """Attend from each row to those of the m kept images of its set that it sees; zeros where it sees nothing.

    The softmax is accumulated image by image (Milakov & Gimelshein, arXiv 1805.02867), in float32, up to the last image
    that any row sees: shapes are those of the whole cache, and work grows with what is in it.

    Args:
      q_bgthd: queries of g rows a set, t tokens each.
      k_bmshd, v_bmshd: kept images, s tokens each; cast to the dtype of `q_bgthd`.
      sees_bgm: bool.
      own: keys and values [b, s, h, d] of one more image a set, which all of its rows see.

    Returns:
      [b, g, t, h, d], in the dtype of `q_bgthd`.
    """
    b, g, t, h, d = q_bgthd.shape
    dtype = q_bgthd.dtype
    q_bgthd = q_bgthd * d**-0.5

    def add(k_bshd, v_bshd, seen_bg, carry):
        """Add one image to (largest logit, sum of weights, weighted sum of values) of the rows that see it."""
        top_bhgt, weight_bhgt, sum_bhgtd = carry
        logits_bhgts = jnp.einsum(
            "bgthd,bshd->bhgts", q_bgthd, k_bshd.astype(dtype), preferred_element_type=jnp.float32
        )
        logits_bhgts = jnp.where(seen_bg[:, None, :, None, None], logits_bhgts, -jnp.inf)
        new_top_bhgt = jnp.maximum(top_bhgt, logits_bhgts.max(-1))
        # A row that has seen nothing yet has no top: exp(-inf - -inf) would be NaN.
        shift_bhgt = jnp.where(jnp.isfinite(new_top_bhgt), new_top_bhgt, 0.0)
        decay_bhgt, weights_bhgts = jnp.exp(top_bhgt - shift_bhgt), jnp.exp(logits_bhgts - shift_bhgt[..., None])
        new_bhgtd = jnp.einsum(
            "bhgts,bshd->bhgtd", weights_bhgts.astype(dtype), v_bshd.astype(dtype), preferred_element_type=jnp.float32
        )
        weight_bhgt = decay_bhgt * weight_bhgt + weights_bhgts.sum(-1)
        return new_top_bhgt, weight_bhgt, decay_bhgt[..., None] * sum_bhgtd + new_bhgtd

    def add_kept(j, carry):
        k_bshd, v_bshd = (jax.lax.dynamic_index_in_dim(x, j, 1, keepdims=False) for x in (k_bmshd, v_bmshd))
        return add(k_bshd, v_bshd, jax.lax.dynamic_index_in_dim(sees_bgm, j, 2, keepdims=False), carry)

    carry = (jnp.full((b, h, g, t), -jnp.inf), jnp.zeros((b, h, g, t)), jnp.zeros((b, h, g, t, d)))
    if own is not None:
        carry = add(*own, jnp.ones((b, g), bool), carry)
    one_past_last = jnp.where(sees_bgm.any((0, 1)), jnp.arange(1, sees_bgm.shape[2] + 1), 0).max(initial=0)
    _, weight_bhgt, sum_bhgtd = jax.lax.fori_loop(0, one_past_last, add_kept, carry)
    out_bhgtd = sum_bhgtd / jnp.where(weight_bhgt > 0, weight_bhgt, 1.0)[..., None]
    return out_bhgtd.transpose(0, 2, 3, 1, 4).astype(dtype)
