"""ST-LPIPS (VGG, Alex): how different two images look, by features that small shifts don't change.

Ghildyal and Liu, "Shift-tolerant LPIPS" (ECCV 2022), written from the description of the networks: a VGG-16 and an
AlexNet whose pools are blurred, and weights on the squared differences of their features. The weights come from the
package `stlpips-pytorch` (`m2m_jax.data.prepare_stlpips`). They were retrained, so this is "ST-LPIPS (VGG)" or
"ST-LPIPS (Alex)", and never "LPIPS".
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from m2m_jax.core.errors import UserError

WEIGHTS = "model.safetensors"
_BLUR = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
_MIN_SIZE = 16  # pixels a side: smaller ones can't be halved four times and reflected

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Slice:
    """What lies between two features that are compared.

    Attributes:
      convolutions: their numbers in the published network; each is followed by a ReLU.
      channels: of each.
      kernel: pixels along each side. padding: pixels beyond each border.
      pool: pixels along each side whose largest is taken before them, blurred and halved; 0: none is.
      blurred: blurred and halved between the convolution and its ReLU.
    """

    convolutions: tuple[int, ...]
    channels: int
    kernel: int = 3
    padding: int = 1
    pool: int = 0
    blurred: bool = False


NETWORKS = {
    "vgg": (
        Slice((0, 2), 64),
        Slice((6, 8), 128, pool=2),
        Slice((12, 14, 16), 256, pool=2),
        Slice((20, 22, 24), 512, pool=2),
        Slice((28, 30, 32), 512, pool=2),
    ),
    "alex": (
        Slice((0,), 64, kernel=11, padding=2, blurred=True),
        Slice((5,), 192, kernel=5, padding=2, pool=3),
        Slice((9,), 384, pool=3),
        Slice((11,), 256),
        Slice((13,), 256),
    ),
}


def shapes(network: str = "vgg") -> dict[str, tuple[int, ...]]:
    """Name the parameters, with their shapes: kernels are [h, w, in, out], `lin` weights [channels]."""
    made: dict[str, tuple[int, ...]] = {"shift": (3,), "scale": (3,)}
    inputs = 3
    for number, part in enumerate(NETWORKS[network]):
        for conv in part.convolutions:
            made[f"conv{conv}.kernel"] = (part.kernel, part.kernel, inputs, part.channels)
            made[f"conv{conv}.bias"] = (part.channels,)
            inputs = part.channels
        made[f"lin{number}"] = (part.channels,)
    return made


def network_of(params: Mapping[str, Any]) -> str | None:
    """Return the name of the network that has these parameters; None: none has."""
    found = {name: x.shape for name, x in params.items()}
    return next((name for name in NETWORKS if shapes(name) == found), None)


def load_stlpips(folder: str | Path) -> dict[str, np.ndarray]:
    """Read the parameters that `prepare_stlpips` wrote. Raises UserError where they are missing or damaged."""
    path = Path(folder) / WEIGHTS
    remedy = f"make it with python -m m2m_jax.data.prepare_stlpips --output={folder}"
    if not path.is_file():
        raise UserError(f"no perceptual network at {path}: {remedy}")
    try:
        params = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): remove it and {remedy}") from error
    if network_of(params) is None:
        raise UserError(f"{path} holds another network: remove it and {remedy}")
    return {name: x.astype(np.float32) for name, x in params.items()}


def distance(params: Params, images_bhwc: jax.Array, others_bhwc: jax.Array, num_slices: int = 5) -> jax.Array:
    """Measure how different images look from others, each from its own: float32 [b], 0 for equal ones.

    images_bhwc, others_bhwc: float32 in [-1, 1], at least 16 pixels a side.
    num_slices: how many of the five slices are computed and added; 5 is ST-LPIPS, fewer are a cheaper loss.
    """
    total = jnp.zeros(len(images_bhwc), jnp.float32)
    # One pass for both.
    for number, x in enumerate(_features(params, jnp.concatenate([images_bhwc, others_bhwc]), num_slices)):
        ours, theirs = jnp.split(x, 2)
        total += jnp.mean((ours - theirs) ** 2 @ params[f"lin{number}"], axis=(1, 2))
    return total


def distances(params: Params, images_bhwc: jax.Array) -> jax.Array:
    """Measure how different images look from each other, each passing the network once: float32 [b, b].

    images_bhwc: as `distance` takes them.
    """
    total = jnp.zeros((len(images_bhwc), len(images_bhwc)), jnp.float32)
    for number, x in enumerate(_features(params, images_bhwc)):
        weight = _per_channel(params[f"lin{number}"])
        inner = jnp.einsum("bhwc,dhwc->bd", x, x * weight, precision="highest") / np.float32(x.shape[1] * x.shape[2])
        own = jnp.diagonal(inner)
        total += jnp.maximum(own[:, None] + own[None] - 2 * inner, 0)
    return total


def _features(params: Params, x_bhwc: jax.Array, num_slices: int = 5) -> Iterator[jax.Array]:
    """Yield what each slice sees, of unit length at every pixel."""
    if min(x_bhwc.shape[1:3]) < _MIN_SIZE:
        raise UserError(f"ST-LPIPS needs images of at least {_MIN_SIZE} pixels a side, not {x_bhwc.shape[1:3]}")
    network = network_of(params)
    assert network is not None
    x = (x_bhwc - _per_channel(params["shift"])) / _per_channel(params["scale"])
    for part in NETWORKS[network][:num_slices]:
        if part.pool:
            x = _blurred(
                jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, part.pool, part.pool, 1), (1,) * 4, "VALID")
            )
        for conv in part.convolutions:
            x = _convolve(x, params[f"conv{conv}.kernel"], part.padding) + _per_channel(params[f"conv{conv}.bias"])
            x = jax.nn.relu(_blurred(x) if part.blurred else x)
        yield _normalized(x)


def _normalized(x_bhwc: jax.Array) -> jax.Array:
    """Return features of unit length at every pixel. The gradient of the root is finite at zero."""
    return x_bhwc * jax.lax.rsqrt(jnp.sum(x_bhwc**2, axis=-1, keepdims=True) + 1e-10)


def _blurred(x_bhwc: jax.Array) -> jax.Array:
    """Return images blurred and halved."""
    x = jnp.pad(x_bhwc, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    # Nine shifted sums: XLA's depthwise convolution is several times as slow on CPUs.
    height, width = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    return sum(
        _BLUR[i, j] * x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)
    )


def _convolve(x_bhwc: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    pads = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(x_bhwc, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _per_channel(x_c: jax.Array) -> jax.Array:
    return jnp.asarray(x_c)[None, None, None]
