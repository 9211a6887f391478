"""The transformer block of Stable Diffusion's U-Net, with Image-Set Attention in the place of text cross-attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.attention.backends import BACKENDS, attend
from m2m_jax.attention.layout import SetLayout
from m2m_jax.models.layers import zeros


@dataclasses.dataclass(frozen=True)
class ImageSets:
    """The conditioning channel of Image-Set Attention: how the rows of a flat batch form sets.

    Attributes:
      layout: the images of every set; row `b * layout.num_images + i` of the flat batch is image i of set b.
      keep_context_b: bool [b]; the noised images of a set marked False see no context (dropout for guidance).
    """

    layout: SetLayout
    keep_context_b: jax.Array | None = None


class Attention(nnx.Module):
    """Projections that both attentions share: to_q, to_k, to_v without bias, to_out with one."""

    def __init__(self, channels: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        project = functools.partial(nnx.Linear, channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.to_out = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

    def heads(self, x: jax.Array) -> jax.Array:
        """[..., t, c] to [..., t, h, d]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class SelfAttention(Attention):
    """attn1: the tokens of one image attend to one another."""

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        q_bthd, k_bthd, v_bthd = (self.heads(project(x_btc)) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(attend(q_bthd, k_bthd, v_bthd).reshape(x_btc.shape))


class ImageSetAttention(Attention):
    """attn2 of M2M-Self: tokens attend to the clean images of their set, under `SetLayout`'s mask.

    Queries come from all images, keys and values from the features of the clean ones at this layer.
    """

    def __init__(self, channels: int, num_heads: int, *, backend: str, dtype, rngs: nnx.Rngs):
        super().__init__(channels, num_heads, dtype=dtype, rngs=rngs)
        self.backend = backend

    def __call__(self, x_btc: jax.Array, sets: ImageSets) -> jax.Array:
        layout = sets.layout
        num_clean = len(layout.clean)
        if not num_clean:
            return self.to_out(jnp.zeros_like(x_btc))
        x_bqtc = x_btc.reshape(-1, layout.num_images, *x_btc.shape[1:])
        q_bqthd = self.heads(self.to_q(x_bqtc))
        k_bkthd, v_bkthd = (self.heads(project(x_bqtc[:, :num_clean])) for project in (self.to_k, self.to_v))
        out_bqthd = BACKENDS[self.backend](q_bqthd, k_bkthd, v_bkthd, layout)
        if sets.keep_context_b is not None:
            is_clean_q = jnp.arange(layout.num_images) < num_clean
            keep_bq = is_clean_q[None, :] | sets.keep_context_b[:, None]
            out_bqthd = jnp.where(keep_bq[:, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))
        return self.to_out(out_bqthd.reshape(x_btc.shape))


class FeedForward(nnx.Module):
    """GEGLU with the exact (erf) gelu; four times the width."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(channels, channels * 8, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(channels * 4, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.up(x_btc), 2, axis=-1)
        return self.down(hidden * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Pre-norm attn1, attn2 (where the model has one) and feed-forward, each added to its input."""

    def __init__(self, channels: int, num_heads: int, *, attn2: str, backend: str, dtype, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, channels, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm1 = norm()
        self.attn1 = SelfAttention(channels, num_heads, dtype=dtype, rngs=rngs)
        self.has_attn2 = attn2 == "image_set"
        if self.has_attn2:
            self.norm2 = norm()
            self.attn2 = ImageSetAttention(channels, num_heads, backend=backend, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array, sets: ImageSets | None) -> jax.Array:
        x_btc = x_btc + self.attn1(self.norm1(x_btc))
        if self.has_attn2:
            x_btc = x_btc + self.attn2(self.norm2(x_btc), sets)
        return x_btc + self.ff(self.norm3(x_btc))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of a feature map: diffusers' Transformer2DModel."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        num_layers: int,
        norm_num_groups: int,
        use_linear_projection: bool,
        attn2: str,
        backend: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.GroupNorm(channels, norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
        project = functools.partial(nnx.Linear, channels, channels)
        if not use_linear_projection:
            project = functools.partial(nnx.Conv, channels, channels, (1, 1))
        self.proj_in = project(dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(channels, num_heads, attn2=attn2, backend=backend, dtype=dtype, rngs=rngs)
                for _ in range(num_layers)
            ]
        )
        self.proj_out = project(kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array, sets: ImageSets | None) -> jax.Array:
        h = self.proj_in(self.norm(x_bhwc))
        h_btc = h.reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            h_btc = block(h_btc, sets)
        return x_bhwc + self.proj_out(h_btc.reshape(x_bhwc.shape))
