"""What the backward pass finds in memory of a residual or transformer block, and what it computes again."""

from __future__ import annotations

from typing import Any

import jax

from m2m_jax.attention.splash import CHECKPOINT_NAME

# Primitives whose results "dots" keeps: convolutions, and what cuDNN's attention leaves for its gradient.
_KEPT = ("conv_general_dilated", "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def _convolutions_and_attention(primitive: Any, *_, **params: Any) -> bool:
    """Say whether a result is kept, to `jax.checkpoint`."""
    return primitive.name in _KEPT or (primitive.name == "name" and params["name"] == CHECKPOINT_NAME)


# {model.remat: policy of `jax.checkpoint`}, from what keeps most to what keeps least.
REMAT = {
    "none": None,  # everything is kept
    # Of dots those with a kernel; of attention the output, for its weights are the largest arrays there are.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _convolutions_and_attention
    ),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
