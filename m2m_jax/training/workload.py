"""What is trained, as shapes alone: the task of a config without its folders and data, and the FLOPs of one set."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.interpreters.partial_eval import dce_jaxpr

from m2m_jax.attention.backends import resolve
from m2m_jax.configuration import Config, build, reads_latents
from m2m_jax.data import transform
from m2m_jax.data.augmentation import SetAugmentation
from m2m_jax.models import diffusers_folder
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.dinov2 import SIZES
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.models.image_encoders import IMAGE_ENCODERS
from m2m_jax.models.remat import REMAT
from m2m_jax.models.trained import PARAMETERS
from m2m_jax.tasks.latent_diffusion import LatentDiffusion
from m2m_jax.tasks.protocol import Task
from m2m_jax.tasks.registry import TASKS
from m2m_jax.training.attention_flops import AttentionFlops, attention_flops
from m2m_jax.training.products import sum_of_flops, sum_of_products
from m2m_jax.training.sharding import abstract_mesh

NOT_READ = "(not read)"
PLATFORM = "tpu"


@dataclasses.dataclass(frozen=True)
class Workload:
    """FLOPs of one set.

    Attributes:
      model_flops: of the loss and its gradient, as XLA counts before it optimises anything: nothing is computed twice,
        and in no kernel. Frozen encoders are in it where a step runs them. They do not depend on how
        it is trained, so that plans can be compared by them.
      attention: of the products of attention, by the config's backend and mesh.
      backend: that one; empty where there is no U-Net.
      again: how many times `model_flops` a step computes, with what `model.remat` computes a second time; counted for
        GPUs alone, as a compiled program says it itself.
    """

    model_flops: float
    attention: AttentionFlops
    backend: str = ""
    again: float = 1.0


def make_task(config: Config, platform: str = PLATFORM) -> tuple[Task, list[str]]:
    """Return the task of a run, with shapes for parameters, and notes on what was assumed of missing folders.

    Args:
      platform: that a step is compiled for, "tpu" or "gpu": "auto" is a kernel of it.

    Raises:
      UserError: of text-to-image a folder is missing, as in a run.
    """
    kind = TASKS.choose(config.task)
    notes: list[str] = []
    task: Any  # a kind of LatentDiffusion has the rest of a Task, too
    if not issubclass(kind, LatentDiffusion) or config.text_encoder.path:
        task = kind(config)
    else:
        models, notes = frozen_models(config)
        task = kind(config, platform=platform, models=models)
    if task.compute_dtype == "float32":
        notes.append("the step computes in float32; times and MFU are by the chip's peak in bfloat16")
    return task, notes


def frozen_models(config: Config) -> tuple[FrozenModels, list[str]]:
    """Return what the config's folders hold, by their config.json or, without one, by what is published; and notes."""
    notes: list[str] = []
    folder = config.autoencoder.path
    if (Path(folder) / "config.json").is_file():
        autoencoder = diffusers_folder.load_autoencoder_config(folder)
    else:
        autoencoder = AutoencoderConfig()
        notes.append(f"there is no {folder}: Stable Diffusion's autoencoder is assumed")
    folder = config.image_encoder.path
    if not folder:
        return FrozenModels(autoencoder), notes
    options: dict[str, Any] = {"layer": config.image_encoder.layer, "dtype": config.model.dtype}
    if (Path(folder) / "config.json").is_file():
        encoder = IMAGE_ENCODERS.of_folder(folder).load_config(folder, **options)
    else:
        size = next((size for size in SIZES if size in re.split(r"[^a-z]", Path(folder).name.lower())), "large")
        encoder = dataclasses.replace(SIZES[size], **options)
        notes.append(f"there is no {folder}: DINOv2 of size {size} is assumed")
    return FrozenModels(autoencoder, encoder, config.image_encoder.image_size), notes


def batch_shapes(config: Config, task: Any, batch_size: int) -> dict:
    """Return a batch as it reaches the devices, as shapes; see `data.loader.make_dataset` and `inputs`."""
    sets, size = (batch_size, config.data.images_per_set), config.data.image_size
    shapes = {}
    if reads_latents(config.data):
        shapes["latents_bnhwc"] = jax.ShapeDtypeStruct((*sets, *task.models.latent_shape(size)), jnp.float32)
    if task.needs_images or not shapes:
        augment = config.data.augment
        if config.data.resident or (augment.enabled and augment.on_device):
            length = build(SetAugmentation, augment).num_parameters(size)
            shapes[transform.RGBA] = jax.ShapeDtypeStruct((*sets, size, size, 4), jnp.uint8)
            shapes[transform.PARAMETERS] = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        else:
            shapes[transform.IMAGES] = jax.ShapeDtypeStruct((*sets, size, size, 3), jnp.uint8)
    if task.tokenizer:
        shapes["token_ids_bns"] = jax.ShapeDtypeStruct((*sets, task.empty_ids_1s.shape[-1]), jnp.int32)
    for name, width in task.attributes.items():
        shapes[f"attribute_{name}_bnc"] = jax.ShapeDtypeStruct((*sets, width), jnp.float32)
    return shapes


def not_read(config: Config, frozen: FrozenParams) -> FrozenParams:
    """Return the frozen models that a step does not run, and a preview does: of latents, the autoencoder."""
    return {AUTOENCODER: frozen[AUTOENCODER]} if reads_latents(config.data) else {}


def count_model_flops(config: Config, remat: str = "none") -> float:
    """Return `Workload.model_flops`. Traces the whole model: five seconds at the size of Stable Diffusion.

    Args:
      remat: a value of config.model.remat: what it computes a second time counts, too.
    """
    task = _plain_task(config, remat)

    def gradient(params: dict, frozen: dict, batch: dict, step: jax.Array) -> dict:
        loss, trained = _loss_of_trained(task, config, params, frozen, batch, step)
        return jax.grad(loss)(trained)

    return sum_of_flops(_traced(gradient, task, batch_shapes(config, task, 1)))


def count_products(task: Task, batch: dict) -> float:
    """Return the FLOPs of the products and convolutions of a step on a batch: of forward, and twice those of backward.

    Traces the loss once, a second where `Workload.model_flops` takes ten, and is about as much: it has no norms and
    activations, but what of the backward pass nobody needs. Nothing that `model.remat` computes again is in it.
    """

    def loss(params: dict, frozen: dict, batch: dict, step: jax.Array) -> jax.Array:
        return task.loss(params, frozen, batch, task.draw(batch, step))[0]

    return 3 * sum_of_products(_traced(loss, task, batch))


def _traced(function: Callable, task: Task, batch: dict) -> Any:
    """Return the jaxpr of a function of parameters, those of frozen models, a batch and a step."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = jax.make_jaxpr(function)(task.shapes, task.frozen, batch, step).jaxpr
    # As when it is compiled: without what nobody reads.
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _loss_of_trained(
    task: Task, config: Config, params: dict, frozen: dict, batch: dict, step: jax.Array
) -> tuple[Callable[[dict], jax.Array], dict]:
    """Return the loss of a batch, as a function of the parameters that train, and these."""
    trained, draws = PARAMETERS.choose(config.train.parameters), task.draw(batch, step)
    params = trained.start(config.seed, params)

    def loss(values: dict) -> jax.Array:
        return task.loss(trained.effective(params, values), frozen, batch, draws)[0]

    return loss, trained.of(params)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a loss keeps for its gradient beside its inputs, in bytes, before XLA fuses anything.

    Attributes:
      fixed: whatever the batch: parameters, cast.
      a_set: of each set.
    """

    fixed: int
    a_set: int

    def of(self, sets: int) -> int:
        """Return the bytes of so many sets."""
        return self.fixed + sets * self.a_set


def kept_bytes(config: Config, task: Task) -> Kept:
    """Return what the loss keeps for its gradient. Traces it once."""

    def kept(params, frozen, batch, step):
        return jax.vjp(*_loss_of_trained(task, config, params, frozen, batch, step))[1]

    batch = batch_shapes(config, task, 1)
    jaxpr = _traced(kept, task, batch)
    inputs = {*jaxpr.invars, *jaxpr.constvars}
    # What is drawn depends on the step, and is as large as the batch.
    of_batch = set(jaxpr.invars[-len(jax.tree.leaves(batch)) - 1 :])
    for equation in jaxpr.eqns:
        if any(isinstance(x, Var) and x in of_batch for x in equation.invars):
            of_batch.update(equation.outvars)
    arrays: set[Any] = {x for x in jaxpr.outvars if isinstance(x, Var)} - inputs
    size = {x: x.aval.size * x.aval.dtype.itemsize for x in arrays}
    a_set = sum(size[x] for x in arrays & of_batch)
    return Kept(sum(size.values()) - a_set, a_set)


def kept_by_remat(config: Config, own: Kept | None = None) -> dict[str, int]:
    """Return {config.model.remat: `kept_bytes` of a set}, of the config's own and of those that compute more again.

    own: that of the config, where it is known already.
    """
    levels = list(REMAT)
    found = {}
    for remat in levels[levels.index(config.model.remat) :]:
        other = copy.deepcopy(config)
        other.model.remat = remat
        kept = own if own and remat == config.model.remat else kept_bytes(other, make_task(other)[0])
        found[remat] = kept.of(1)
    return found


def count_flops(config: Config, devices: int, platform: str = PLATFORM) -> Workload:
    """Return the FLOPs of one set of a run on some devices of "tpu" or "gpu"; see `count_model_flops`.

    Raises:
      UserError: `config.mesh` does not go with so many devices.
    """
    mesh = abstract_mesh(config.mesh, devices)
    task, flops = _plain_task(config, "none"), count_model_flops(config)
    if not isinstance(task, LatentDiffusion):
        return Workload(flops, AttentionFlops())
    backend = resolve(config.model.attention_backend, platform, config.model.dtype)
    unet_config = dataclasses.replace(task.unet_config, attention_backend=backend)
    side = task.models.latent_shape(config.data.image_size)[0]
    attention = attention_flops(unet_config, config.data.images_per_set, side, task.models.context_tokens, mesh)
    remat = config.model.remat
    again = count_model_flops(config, remat) / flops if platform == "gpu" and remat != "none" else 1.0
    return Workload(flops, attention, backend, again)


def _plain_task(config: Config, remat: str) -> Task:
    """Return a task of which nothing is computed by a kernel, and a second time what `remat` says."""
    plain = copy.deepcopy(config)
    plain.model.update({"remat": remat, "attention_backend": "prefix"})
    return make_task(plain)[0]
