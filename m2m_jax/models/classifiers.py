"""What the frozen convolutional classifiers share: convolution, norm by stored statistics, activation."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from m2m_jax.core.initializers import Initializer, ones, zeros
from m2m_jax.models.layers import Conv

EPSILON = 1e-3  # of the norms of both, as TensorFlow trained them


class FrozenNorm(nnx.Module):
    """Batch norm by the statistics that training left, under torch's names; never updated."""

    def __init__(self, channels: int):
        def of(initializer: Initializer) -> nnx.Param:
            return nnx.Param(initializer(None, (channels,)))

        self.scale, self.bias, self.running_mean, self.running_var = of(ones), of(zeros), of(zeros), of(ones)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        factor_c = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + EPSILON)
        return (
            x_bhwc * factor_c[None, None, None] + (self.bias[...] - self.running_mean[...] * factor_c)[None, None, None]
        )


class ConvNorm(nnx.Module):
    """A convolution without bias, its norm, and perhaps an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: str | tuple[int, int] = "SAME",
        activation: Callable[[jax.Array], jax.Array] | None = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = padding if isinstance(padding, str) else [(n, n) for n in padding]
        self.conv = Conv(in_channels, out_channels, kernel, strides=stride, padding=pad, use_bias=False, rngs=rngs)
        self.bn = FrozenNorm(out_channels)
        self.activation = activation

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.bn(self.conv(x_bhwc))
        return x_bhwc if self.activation is None else self.activation(x_bhwc)
