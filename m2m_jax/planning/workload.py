"""What is trained, as shapes alone: the task of a config without its folders and data, and the FLOPs of one set."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m2m_jax.attention.backends import BACKENDS, resolve
from m2m_jax.attention.layout import SetLayout
from m2m_jax.models import diffusers_folder, transformers_folder
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.dinov2 import SIZES
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.initialization import TRAINED
from m2m_jax.models.unet import UNetConfig
from m2m_jax.training.autoencoding import Autoencoding
from m2m_jax.training.set_diffusion import SetDiffusion

NOT_READ = "(not read)"
PLATFORM = "tpu"


@dataclasses.dataclass(frozen=True)
class Workload:
    """FLOPs of one set. They do not depend on how it is trained, so that plans can be compared by them.

    Attributes:
      model_flops: of the loss and its gradient: XLA's count before it optimises anything, nothing computed twice and no
        kernels, which it cannot see into. Frozen encoders are in it where a step runs them.
      attention_allowed: of Image-Set Attention's products, forward, of the pairs of images that the mask allows.
      attention_executed: of those that the config's backend computes; None where a kernel does.
    """

    model_flops: float
    attention_allowed: float
    attention_executed: float | None


def make_task(config: ConfigDict) -> tuple[SetDiffusion | Autoencoding, list[str]]:
    """The task of a run, with shapes for parameters; and what had to be assumed of folders that are not there."""
    if config.task == "autoencoder":
        return Autoencoding(config), []
    models, notes = frozen_models(config)
    return SetDiffusion(config, platform=PLATFORM, models=models), notes


def frozen_models(config: ConfigDict) -> tuple[FrozenModels, list[str]]:
    """What the config's folders hold, by their config.json or, where there is none, by what is published."""
    notes = []
    folder = config.autoencoder.path
    if (Path(folder) / "config.json").is_file():
        autoencoder = diffusers_folder.load_autoencoder_config(folder)
    else:
        autoencoder = AutoencoderConfig()
        notes.append(f"there is no {folder}: Stable Diffusion's autoencoder is assumed")
    folder = config.image_encoder.path
    if not folder:
        return FrozenModels(autoencoder), notes
    options = {"layer": config.image_encoder.layer, "dtype": config.model.dtype}
    if (Path(folder) / "config.json").is_file():
        encoder = transformers_folder.load_dinov2_config(folder, **options)
    else:
        size = next((size for size in SIZES if size in re.split(r"[^a-z]", Path(folder).name.lower())), "large")
        encoder = dataclasses.replace(SIZES[size], **options)
        notes.append(f"there is no {folder}: DINOv2 of size {size} is assumed")
    return FrozenModels(autoencoder, encoder, config.image_encoder.image_size), notes


def batch_shapes(config: ConfigDict, task: SetDiffusion | Autoencoding, batch_size: int) -> dict:
    """A batch as it reaches the devices; see `data.pipeline.make_dataset` and `inputs`."""
    sets, size = (batch_size, config.data.images_per_set), config.data.image_size
    if config.data.name == "precomputed":
        return {"latents_bnhwc": jax.ShapeDtypeStruct((*sets, *task.models.latent_shape(size)), jnp.float32)}
    return {"images_bnhwc": jax.ShapeDtypeStruct((*sets, size, size, 3), jnp.uint8)}


def count_model_flops(config: ConfigDict) -> float:
    """`Workload.model_flops`. Traces the whole model: half a minute at the size of Stable Diffusion."""
    # An accelerator's client counts nothing; the CPU's is asked, whatever the model runs on.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _lowered_gradient(_plain_task(config), config).cost_analysis()["flops"]


def _lowered_gradient(task: SetDiffusion | Autoencoding, config: ConfigDict) -> jax.stages.Lowered:
    """The gradient of the loss of one set."""
    trains = TRAINED[config.train.parameters]

    def gradient(params: dict, frozen: dict, batch: dict, step: jax.Array) -> dict:
        trained = {name: x for name, x in params.items() if trains(name)}
        draws = task.draw(batch, step)
        return jax.grad(lambda trained: task.loss(params | trained, frozen, batch, draws)[0])(trained)

    step = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(gradient).lower(task.shapes, task.frozen, batch_shapes(config, task, 1), step)


def count_flops(config: ConfigDict) -> Workload:
    """Of one set of a run of `config`; see `count_model_flops`."""
    task, flops = _plain_task(config), count_model_flops(config)
    if config.task == "autoencoder" or config.model.attn2 != "image_set":
        return Workload(flops, 0.0, 0.0)
    backend = resolve(config.model.attention_backend, PLATFORM, config.model.dtype)
    unet_config = dataclasses.replace(task.unet_config, attention_backend=backend)
    side = task.models.latent_shape(config.data.image_size)[0]
    encoder = task.models.image_encoder
    tokens = (task.models.image_encoder_size // encoder.patch_size) ** 2 + 1 if encoder else None
    return Workload(flops, *set_attention_flops(unet_config, config.data.images_per_set, side, tokens))


def _plain_task(config: ConfigDict) -> SetDiffusion | Autoencoding:
    """Nothing is computed twice, and nothing by a kernel."""
    plain = ConfigDict(config.to_dict())
    plain.model.update({"remat": "none", "attention_backend": "prefix"})
    return make_task(plain)[0]


def set_attention_flops(
    config: UNetConfig, num_images: int, side: int, tokens: int | None = None
) -> tuple[float, float | None]:
    """(allowed, executed) as in `Workload`, forward, of a set of `num_images` with latents of `side` by `side`.

    tokens: of an image of an encoder; None: the network's own features are attended to.
    """
    layout = SetLayout.training(num_images, config.clean_sees, config.attends_to_encoded)
    pairs = int(layout.mask_qk().sum())
    allowed, executed = 0.0, 0.0
    last = len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        blocks = attends * (2 * config.layers_per_block + 1) + (level == last)  # down and up; the middle's is the last
        count = blocks * config.transformer_layers_per_block
        if not count:
            continue
        t = (side // 2**level) ** 2
        s, heads = tokens or t, config.num_attention_heads[level]
        allowed += count * pairs * 4 * t * s * channels
        shapes = [
            jax.ShapeDtypeStruct((1, images, n, heads, channels // heads), jnp.dtype(config.dtype))
            for images, n in ((layout.num_images, t), (len(layout.clean), s), (len(layout.clean), s))
        ]
        backend = BACKENDS[config.attention_backend]
        jaxpr = jax.make_jaxpr(lambda *qkv, backend=backend: backend(*qkv, layout))(*shapes)
        flops = sum_of_products(jaxpr.jaxpr)
        executed = None if flops is None or executed is None else executed + count * flops
    return allowed, executed


def sum_of_products(jaxpr: Any) -> float | None:
    """FLOPs of the matrix products of a program; None where it has a kernel, whose are not known."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            return None
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
        for inner in _inner(equation.params):
            flops = sum_of_products(inner)
            if flops is None:
                return None
            total += flops * equation.params.get("length", 1)
    return total


def _inner(params: dict) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr
