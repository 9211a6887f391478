"""Convolutional parts that the U-Net and the autoencoder share. Attribute names are those of diffusers."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.core.initializers import embedding, lecun_normal, ones, zeros

# Flax's, with initializers that can be described without drawing: `core/initializers.py`. A module of another kind
# works, too, but draws its numbers each time that the network's structure is asked for.
Linear = functools.partial(nnx.Linear, kernel_init=lecun_normal, bias_init=zeros)
Conv = functools.partial(nnx.Conv, kernel_init=lecun_normal, bias_init=zeros)
Embed = functools.partial(nnx.Embed, embedding_init=embedding)
Conv3x3 = functools.partial(Conv, kernel_size=(3, 3), padding=1)
# Every norm of every model. Flax's default takes the variance as E[x^2] - E[x]^2, which loses all digits of features
# whose mean is large beside their spread; this is the mean of (x - E[x])^2.
GroupNorm = functools.partial(nnx.GroupNorm, use_fast_variance=False, scale_init=ones, bias_init=zeros)
LayerNorm = functools.partial(nnx.LayerNorm, use_fast_variance=False, scale_init=ones, bias_init=zeros)


def timestep_features(timestep_b: jax.Array, num_channels: int) -> jax.Array:
    """Return sinusoidal features [b, num_channels], cosines first (diffusers: flip_sin_to_cos=True, freq_shift=0)."""
    half = num_channels // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles_bc = timestep_b.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles_bc), jnp.sin(angles_bc)], axis=-1)


def gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution's integral up to x, by erf as torch does it, in float32.

    `jax.nn.gelu(approximate=False)` goes by erfc, which costs an XLA CPU program three times as much.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * 2.0**-0.5))).astype(x.dtype)


class TimestepEmbedding(nnx.Module):
    """Two-layer perceptron from timestep features to the global embedding channel."""

    def __init__(self, in_channels: int, time_embed_dim: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_channels, time_embed_dim, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x_bc: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x_bc)))


class ResnetBlock(nnx.Module):
    """norm, silu, conv, (+ global embedding), norm, silu, conv, + input: diffusers' ResnetBlock2D."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_num_groups: int,
        norm_eps: float,
        time_embed_dim: int | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        norm = functools.partial(GroupNorm, num_groups=norm_num_groups, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        self.norm1 = norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels, dtype=dtype, rngs=rngs)
        if time_embed_dim is not None:
            self.time_emb_proj = Linear(time_embed_dim, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = norm(out_channels)
        # Zero, the block passes its input on unchanged (Goyal et al., arXiv 1706.02677; ADM, arXiv 2105.05233).
        self.conv2 = Conv3x3(out_channels, out_channels, kernel_init=zeros, dtype=dtype, rngs=rngs)
        shortcut = functools.partial(Conv, kernel_size=(1, 1), dtype=dtype, rngs=rngs)
        self.conv_shortcut = shortcut(in_channels, out_channels) if in_channels != out_channels else None

    def __call__(self, x_bhwc: jax.Array, embedding_bc: jax.Array | None = None) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x_bhwc)))
        if embedding_bc is not None:
            h = h + self.time_emb_proj(jax.nn.silu(embedding_bc))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x_bhwc if self.conv_shortcut is None else self.conv_shortcut(x_bhwc))


class Downsample(nnx.Module):
    """Strided 3x3 convolution. The U-Net pads both sides; the autoencoder pads right and bottom only."""

    def __init__(self, channels: int, *, padding, dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, (3, 3), strides=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.conv(x_bhwc)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, cropped to `size` where the way down met an odd one, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv3x3(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        x_bhwc = x_bhwc.repeat(2, axis=1).repeat(2, axis=2)
        if size is not None:
            x_bhwc = x_bhwc[:, : size[0], : size[1]]
        return self.conv(x_bhwc)
