"""Inception-v3 (Szegedy et al., arXiv 1512.00567) in the form that FID is defined by: TensorFlow's of 2015-12-05.

Structure and names are those of torchvision's Inception3 with the differences of that graph, which pytorch-fid and
torch-fidelity have, too: average pools count no padding, the last block pools by maxima, and there are 1,008 classes.
Written from the architecture; no weights come with this project.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core.parameters import Params, abstract
from m2m_jax.models import folder as folders
from m2m_jax.models.classifiers import ConvNorm
from m2m_jax.models.layers import Linear

FORMAT = folders.Format(library="torch", weights="model.safetensors", renamed=())
SIZE, FEATURES, CLASSES = 299, 2048, 1008

Conv = functools.partial(ConvNorm, padding="VALID")
Same = functools.partial(ConvNorm, padding="SAME")


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """The published network; tests divide its channels.

    Attributes:
      divide: channels of all convolutions are divided by it.
    """

    divide: int = 1

    def __call__(self, channels: int) -> int:
        """Return how many channels stand for so many published ones."""
        return channels // self.divide


PUBLISHED = InceptionConfig()


def _max_pool(x_bhwc: jax.Array, stride: int = 2, pad: int = 0) -> jax.Array:
    return nnx.max_pool(x_bhwc, (3, 3), strides=(stride, stride), padding=((pad, pad), (pad, pad)))


def _mean_pool(x_bhwc: jax.Array) -> jax.Array:
    """Return means of 3x3 pixels, of which those beyond the border do not count."""
    return nnx.avg_pool(x_bhwc, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _chain(x_bhwc: jax.Array, layers: Sequence[nnx.Module]) -> jax.Array:
    for layer in layers:
        x_bhwc = layer(x_bhwc)
    return x_bhwc


class InceptionA(nnx.Module):
    """35x35 pixels: 1x1, 5x5, two 3x3, pooled."""

    def __init__(self, inputs: int, pool: int, c: InceptionConfig, *, rngs: nnx.Rngs):
        self.branch1x1 = Same(inputs, c(64), 1, rngs=rngs)
        self.branch5x5_1 = Same(inputs, c(48), 1, rngs=rngs)
        self.branch5x5_2 = Same(c(48), c(64), 5, rngs=rngs)
        self.branch3x3dbl_1 = Same(inputs, c(64), 1, rngs=rngs)
        self.branch3x3dbl_2 = Same(c(64), c(96), 3, rngs=rngs)
        self.branch3x3dbl_3 = Same(c(96), c(96), 3, rngs=rngs)
        self.branch_pool = Same(inputs, c(pool), 1, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        parts = [
            self.branch1x1(x_bhwc),
            _chain(x_bhwc, (self.branch5x5_1, self.branch5x5_2)),
            _chain(x_bhwc, (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)),
            self.branch_pool(_mean_pool(x_bhwc)),
        ]
        return jnp.concatenate(parts, -1)


class InceptionB(nnx.Module):
    """35x35 to 17x17 pixels."""

    def __init__(self, inputs: int, c: InceptionConfig, *, rngs: nnx.Rngs):
        self.branch3x3 = Conv(inputs, c(384), 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = Same(inputs, c(64), 1, rngs=rngs)
        self.branch3x3dbl_2 = Same(c(64), c(96), 3, rngs=rngs)
        self.branch3x3dbl_3 = Conv(c(96), c(96), 3, stride=2, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        double = _chain(x_bhwc, (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3))
        return jnp.concatenate([self.branch3x3(x_bhwc), double, _max_pool(x_bhwc)], -1)


class InceptionC(nnx.Module):
    """17x17 pixels: 1x1, and 7x7 as rows and columns."""

    def __init__(self, inputs: int, middle: int, c: InceptionConfig, *, rngs: nnx.Rngs):
        seven, row, column = c(middle), (1, 7), (7, 1)
        self.branch1x1 = Same(inputs, c(192), 1, rngs=rngs)
        self.branch7x7_1 = Same(inputs, seven, 1, rngs=rngs)
        self.branch7x7_2 = Same(seven, seven, row, rngs=rngs)
        self.branch7x7_3 = Same(seven, c(192), column, rngs=rngs)
        self.branch7x7dbl_1 = Same(inputs, seven, 1, rngs=rngs)
        self.branch7x7dbl_2 = Same(seven, seven, column, rngs=rngs)
        self.branch7x7dbl_3 = Same(seven, seven, row, rngs=rngs)
        self.branch7x7dbl_4 = Same(seven, seven, column, rngs=rngs)
        self.branch7x7dbl_5 = Same(seven, c(192), row, rngs=rngs)
        self.branch_pool = Same(inputs, c(192), 1, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        double = (self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        parts = [
            self.branch1x1(x_bhwc),
            _chain(x_bhwc, (self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)),
            _chain(x_bhwc, (*double, self.branch7x7dbl_4, self.branch7x7dbl_5)),
            self.branch_pool(_mean_pool(x_bhwc)),
        ]
        return jnp.concatenate(parts, -1)


class InceptionD(nnx.Module):
    """17x17 to 8x8 pixels."""

    def __init__(self, inputs: int, c: InceptionConfig, *, rngs: nnx.Rngs):
        self.branch3x3_1 = Same(inputs, c(192), 1, rngs=rngs)
        self.branch3x3_2 = Conv(c(192), c(320), 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = Same(inputs, c(192), 1, rngs=rngs)
        self.branch7x7x3_2 = Same(c(192), c(192), (1, 7), rngs=rngs)
        self.branch7x7x3_3 = Same(c(192), c(192), (7, 1), rngs=rngs)
        self.branch7x7x3_4 = Conv(c(192), c(192), 3, stride=2, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        three = _chain(x_bhwc, (self.branch3x3_1, self.branch3x3_2))
        seven = _chain(x_bhwc, (self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4))
        return jnp.concatenate([three, seven, _max_pool(x_bhwc)], -1)


class InceptionE(nnx.Module):
    """8x8 pixels: 3x3 as a row and a column side by side. by_max: pools maxima, as the last block of that graph."""

    def __init__(self, inputs: int, c: InceptionConfig, *, by_max: bool, rngs: nnx.Rngs):
        self.by_max = by_max
        self.branch1x1 = Same(inputs, c(320), 1, rngs=rngs)
        self.branch3x3_1 = Same(inputs, c(384), 1, rngs=rngs)
        self.branch3x3_2a = Same(c(384), c(384), (1, 3), rngs=rngs)
        self.branch3x3_2b = Same(c(384), c(384), (3, 1), rngs=rngs)
        self.branch3x3dbl_1 = Same(inputs, c(448), 1, rngs=rngs)
        self.branch3x3dbl_2 = Same(c(448), c(384), 3, rngs=rngs)
        self.branch3x3dbl_3a = Same(c(384), c(384), (1, 3), rngs=rngs)
        self.branch3x3dbl_3b = Same(c(384), c(384), (3, 1), rngs=rngs)
        self.branch_pool = Same(inputs, c(192), 1, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        three = self.branch3x3_1(x_bhwc)
        double = _chain(x_bhwc, (self.branch3x3dbl_1, self.branch3x3dbl_2))
        pooled = _max_pool(x_bhwc, stride=1, pad=1) if self.by_max else _mean_pool(x_bhwc)
        parts = [
            *(self.branch1x1(x_bhwc), self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)),
        ]
        return jnp.concatenate(parts, -1)


class Inception(nnx.Module):
    """Images of 299 pixels a side, normalised as `preprocess` does, to features [b, 2048] and logits [b, 1008].

    The logits go without the bias of the last layer, as the Inception Score of that graph takes them.
    """

    def __init__(self, c: InceptionConfig, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Conv(3, c(32), 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = Conv(c(32), c(32), 3, rngs=rngs)
        self.Conv2d_2b_3x3 = Same(c(32), c(64), 3, rngs=rngs)
        self.Conv2d_3b_1x1 = Conv(c(64), c(80), 1, rngs=rngs)
        self.Conv2d_4a_3x3 = Conv(c(80), c(192), 3, rngs=rngs)
        self.Mixed_5b = InceptionA(c(192), 32, c, rngs=rngs)
        self.Mixed_5c = InceptionA(c(256), 64, c, rngs=rngs)
        self.Mixed_5d = InceptionA(c(288), 64, c, rngs=rngs)
        self.Mixed_6a = InceptionB(c(288), c, rngs=rngs)
        self.Mixed_6b = InceptionC(c(768), 128, c, rngs=rngs)
        self.Mixed_6c = InceptionC(c(768), 160, c, rngs=rngs)
        self.Mixed_6d = InceptionC(c(768), 160, c, rngs=rngs)
        self.Mixed_6e = InceptionC(c(768), 192, c, rngs=rngs)
        self.Mixed_7a = InceptionD(c(768), c, rngs=rngs)
        self.Mixed_7b = InceptionE(c(1280), c, by_max=False, rngs=rngs)
        self.Mixed_7c = InceptionE(c(2048), c, by_max=True, rngs=rngs)
        self.fc = Linear(c(FEATURES), CLASSES, rngs=rngs)

    def __call__(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_bhwc = _max_pool(_chain(images_bhwc, (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)))
        x_bhwc = _max_pool(_chain(x_bhwc, (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)))
        x_bhwc = _chain(x_bhwc, (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a))
        x_bhwc = _chain(x_bhwc, (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e))
        features_bc = _chain(x_bhwc, (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)).mean((1, 2))
        return features_bc, features_bc @ self.fc.kernel[...]


def preprocess(pixels_bhwc: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 255] as the graph takes them."""
    return (pixels_bhwc - 128) / 128


def load_inception(folder: str | Path, config: InceptionConfig = PUBLISHED) -> Params:
    """Return the parameters of a folder that `prepare_inception` wrote.

    The state dict of pytorch-fid or torch-fidelity, saved as `model.safetensors`, will do, too.

    Raises:
      UserError: it holds another network, or none; torchvision's own has 1,000 classes and is another one.
    """
    params = {name: x for name, x in folders.load_params(folder, FORMAT).items() if not name.endswith(folders.COUNTED)}
    folders.require_same(folder, abstract(lambda: Inception(config, rngs=nnx.Rngs(0)))[1], params)
    return params


def save_inception(folder: str | Path, params: Params) -> None:
    """Write a folder that `load_inception` reads."""
    folders.save_folder(folder, {"model_type": "inception_v3_fid"}, params, np.float32, FORMAT)
