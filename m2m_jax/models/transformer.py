"""The transformer block of Stable Diffusion's U-Net, with attention to text or, in its place, Image-Set Attention."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from m2m_jax.attention.backends import BACKENDS, attend
from m2m_jax.attention.cached import attend_to_kept
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.splash import CHECKPOINT_NAME
from m2m_jax.models.layers import GroupNorm, LayerNorm, gelu, timestep_features, zeros

ORDER_CHANNELS = 64  # of the sinusoidal features of an image's position in its set
ONE_IMAGE = SetLayout((0,), (), "itself")  # attention within an image, to the backends


@dataclasses.dataclass(frozen=True)
class ImageSets:
    """The conditioning channel of Image-Set Attention: how the rows of a flat batch form sets.

    Attributes:
      layout: the images of every set; row `b * layout.num_images + i` of the flat batch is image i of set b.
      tokens_bmsc: tokens of the clean images by an image encoder, where the layout says `encoded` (M2M-DINO).
      keep_context_b: bool [b]; the noised images of a set marked False see no context (dropout for guidance).
    """

    layout: SetLayout
    tokens_bmsc: jax.Array | None = None
    keep_context_b: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class KeptImages:
    """The conditioning channel of Image-Set Attention when sampling: one image a row, and the finished ones of its set.

    Attributes:
      k_bmshd, v_bmshd: keys and values of the finished images, by attention; see `context_cache.ContextCache`. Empty
        where there are none yet.
      count_b: int32, how many of them each row sees. Rows beyond the b-th see none (guidance).
      position_b: int32; given where the rows are clean images, whose keys and values are appended to `new`, one pair
        an attention: they see the finished images and themselves, or themselves alone.
    """

    k_bmshd: tuple[jax.Array, ...]
    v_bmshd: tuple[jax.Array, ...]
    count_b: jax.Array
    position_b: jax.Array | None = None
    new: list[tuple[jax.Array, jax.Array]] | None = None


class Attention(nnx.Module):
    """Projections that all attentions share: to_q, to_k, to_v without bias, to_out with one."""

    def __init__(self, channels: int, num_heads: int, *, key_channels: int | None = None, dtype, rngs: nnx.Rngs):
        """key_channels: width of what is attended to, where it is another than `channels`."""
        key_channels = key_channels or channels
        project = functools.partial(nnx.Linear, out_features=channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = project(channels), project(key_channels), project(key_channels)
        self.to_out = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

    def heads(self, x: jax.Array) -> jax.Array:
        """[..., t, c] to [..., t, h, d]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def output(self, out: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Project what the heads found, [..., t, h, d], to tokens of `shape`."""
        return self.to_out(checkpoint_name(out, CHECKPOINT_NAME).reshape(shape))


class SelfAttention(Attention):
    """attn1: the tokens of one image attend to one another, by the same backend as those of a set.

    At 64x64 tokens the weights of one image and layer take 0.3 GB: without a kernel they are most of what moves.
    """

    def __init__(self, channels: int, num_heads: int, *, backend: str, dtype, rngs: nnx.Rngs):
        super().__init__(channels, num_heads, dtype=dtype, rngs=rngs)
        self.backend = backend

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        qkv = (self.heads(project(x_btc))[:, None] for project in (self.to_q, self.to_k, self.to_v))
        return self.output(BACKENDS[self.backend](*qkv, ONE_IMAGE), x_btc.shape)


class CrossAttention(Attention):
    """attn2 of Stable Diffusion: the tokens of an image attend to those of its text."""

    def __call__(self, x_btc: jax.Array, text_bsc: jax.Array) -> jax.Array:
        q_btc, k_bsc, v_bsc = self.to_q(x_btc), self.to_k(text_bsc), self.to_v(text_bsc)
        out_bthd = attend(*(self.heads(x) for x in (q_btc, k_bsc, v_bsc)))
        return self.output(out_bthd, x_btc.shape)


class ImageSetAttention(Attention):
    """attn2 of M2M: tokens attend to the clean images of their set, under `SetLayout`'s mask.

    Queries come from all images of the stack. Keys and values come from the features of the clean ones at this layer
    (M2M-Self) or from the tokens that an image encoder made of them (M2M-DINO). With `order_embedding` they are told
    the image's position in its set: its sinusoidal features through a projection that starts at zero. Not the
    paper's choice, which is not known.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        key_channels: int | None,
        order_embedding: bool,
        clean_sees: str,
        backend: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(channels, num_heads, key_channels=key_channels, dtype=dtype, rngs=rngs)
        self.clean_sees = clean_sees
        self.backend = backend
        self.layer = 0  # its number among those of the network, which `UNet` gives
        if order_embedding:
            project = functools.partial(nnx.Linear, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs)
            self.order = project(ORDER_CHANNELS, key_channels or channels)

    def keys_and_values(self, source_bksc: jax.Array, position_bk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, k, s, h, d] of clean images: their features at this layer, or tokens of the image encoder."""
        source_bksc = source_bksc.astype(self.to_k.dtype)
        if hasattr(self, "order"):
            features_kc = timestep_features(position_bk.reshape(-1), ORDER_CHANNELS).astype(source_bksc.dtype)
            source_bksc = source_bksc + self.order(features_kc).reshape(*position_bk.shape, 1, -1)
        return self.heads(self.to_k(source_bksc)), self.heads(self.to_v(source_bksc))

    def __call__(self, x_btc: jax.Array, sets: ImageSets | KeptImages) -> jax.Array:
        if isinstance(sets, KeptImages):
            return self._to_kept(x_btc, sets)
        layout = sets.layout
        if not layout.clean:
            return self.to_out(jnp.zeros_like(x_btc))
        x_bqtc = x_btc.reshape(-1, layout.num_images, *x_btc.shape[1:])
        source_bksc = sets.tokens_bmsc if layout.encoded else x_bqtc[:, : len(layout.clean)]
        q_bqthd = self.heads(self.to_q(x_bqtc))
        position_bk = jnp.broadcast_to(jnp.asarray(layout.clean)[None], source_bksc.shape[:2])
        k_bkshd, v_bkshd = self.keys_and_values(source_bksc, position_bk)
        out_bqthd = BACKENDS[self.backend](q_bqthd, k_bkshd, v_bkshd, layout)
        if sets.keep_context_b is not None:
            is_clean_q = jnp.arange(layout.num_images) < len(layout.stacked_clean)
            keep_bq = is_clean_q[None, :] | sets.keep_context_b[:, None]
            out_bqthd = jnp.where(keep_bq[:, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))
        return self.output(out_bqthd, x_btc.shape)

    def _to_kept(self, x_btc: jax.Array, sets: KeptImages) -> jax.Array:
        q_bthd = self.heads(self.to_q(x_btc))
        if sets.position_b is None:
            b = sets.count_b.shape[0]
            out_bthd = attend_to_kept(q_bthd[:b], sets.k_bmshd[self.layer], sets.v_bmshd[self.layer], sets.count_b)
            out_bthd = jnp.concatenate([out_bthd, jnp.zeros_like(q_bthd[b:])])
        else:
            own = tuple(x_b1shd[:, 0] for x_b1shd in self.keys_and_values(x_btc[:, None], sets.position_b[:, None]))
            sets.new.append(own)
            if self.clean_sees == "itself" or not sets.k_bmshd:
                out_bthd = attend(q_bthd, *own)
            else:
                kept = (sets.k_bmshd[self.layer], sets.v_bmshd[self.layer], sets.count_b)
                out_bthd = attend_to_kept(q_bthd, *kept, own)
        return self.to_out(out_bthd.reshape(x_btc.shape))


class FeedForward(nnx.Module):
    """GEGLU with the exact (erf) gelu; four times the width."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.up = nnx.Linear(channels, channels * 8, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(channels * 4, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.up(x_btc), 2, axis=-1)
        return self.down(hidden * gelu(gate))


class TransformerBlock(nnx.Module):
    """Pre-norm attn1, attn2 (where the model has one) and feed-forward, each added to its input.

    backend: of attn1, a name in `attention.backends`.
    make_attn2: (channels, num_heads, dtype=, rngs=) -> the second attention; None: there is none.
    """

    def __init__(
        self, channels: int, num_heads: int, *, backend: str, make_attn2: Callable | None, dtype, rngs: nnx.Rngs
    ):
        norm = functools.partial(LayerNorm, channels, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm1 = norm()
        self.attn1 = SelfAttention(channels, num_heads, backend=backend, dtype=dtype, rngs=rngs)
        if make_attn2 is not None:
            self.norm2 = norm()
            self.attn2 = make_attn2(channels, num_heads, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array, condition: ImageSets | jax.Array | None) -> jax.Array:
        x_btc = x_btc + self.attn1(self.norm1(x_btc))
        if hasattr(self, "attn2"):
            x_btc = x_btc + self.attn2(self.norm2(x_btc), condition)
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
        backend: str,
        make_attn2: Callable | None,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
        project = functools.partial(nnx.Linear, channels, channels)
        if not use_linear_projection:
            project = functools.partial(nnx.Conv, channels, channels, (1, 1))
        self.proj_in = project(dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                TransformerBlock(channels, num_heads, backend=backend, make_attn2=make_attn2, dtype=dtype, rngs=rngs)
                for _ in range(num_layers)
            ]
        )
        self.proj_out = project(kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array, condition: ImageSets | jax.Array | None) -> jax.Array:
        h = self.proj_in(self.norm(x_bhwc))
        h_btc = h.reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            h_btc = block(h_btc, condition)
        return x_bhwc + self.proj_out(h_btc.reshape(x_bhwc.shape))
