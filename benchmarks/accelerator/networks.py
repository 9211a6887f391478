"""The programs that are measured, each by a name: made when it is asked for, which traces the network.

make(SIZES["full"], "text_32_no_ema", devices, "gpu")      # a training step of the text network, 32 images
make(SIZES["full"], "sets_4_auto_none", devices, "gpu")    # of M2M-Self, 4 sets, by the platform's attention
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accelerator.program import Program, flat
from benchmarks.accelerator.sizes import Size
from m2m_jax.attention.layout import SetLayout
from m2m_jax.configuration import Config
from m2m_jax.models.frozen import AUTOENCODER, FrozenModels, FrozenParams
from m2m_jax.sampling.programs import UNET, Programs
from m2m_jax.tasks.latent_diffusion import LatentDiffusion
from m2m_jax.tasks.objective import SetDraws, Told
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.setup import set_up
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import make_train_step
from m2m_jax.training.workload import count_products

DENOISING_STEPS = 4  # of a call


class PrecomputedText(LatentDiffusion):
    """Stable Diffusion's own training, on latents and on states of captions that were computed before: MLPerf's."""

    def errors(self, params: Any, frozen: FrozenParams, batch: dict, draws: SetDraws) -> jax.Array:
        told = Told(SetLayout.training(1), text_bsc=batch["text_bsc"])
        return self.squared_error(params, told, batch["latents_bnhwc"], draws.noise_bnhwc, draws.timestep_bn)


class WithoutAverage(TrainState):
    """A train state without EMA, as MLPerf's entries have none. What would be averaged is dead code to XLA."""

    def apply_gradients(self, gradients: Any, *how: Any) -> TrainState:
        averaged = self.replace(ema_params={name: self.params[name] for name in gradients})
        return TrainState.apply_gradients(averaged, gradients, *how).replace(ema_params={})


def names(size: Size) -> dict[str, tuple[str, ...]]:
    """Return {part: names of its programs}, what is worth most first."""
    sampled = [f"{sets}{'' if scale == 1 else '_guided'}" for sets in size.sampled_sets for scale in size.guidance]
    return {
        "text_step": tuple(f"text_{images}{'' if ema else '_no_ema'}" for images, ema in size.text_steps),
        "set_step": tuple("sets_" + "_".join(map(str, one)) for one in size.set_steps),
        "sampling": (*(f"denoise_{which}" for which in sampled), *(f"append_{sets}" for sets in size.sampled_sets)),
        "autoencoder": (f"encode_{size.decoded}", f"decode_{size.decoded}"),
    }


def make(size: Size, name: str, devices: Sequence[jax.Device], platform: str) -> Program:
    """Return the program of a name of `names`. devices: one, which need not be there; platform: "gpu", ..."""
    kind, _, rest = name.partition("_")
    makers: dict[str, Callable[..., Program]] = {
        "text": _text_step,
        "sets": _set_step,
        "denoise": _denoise,
        "append": _append,
        "encode": _encode,
        "decode": _decode,
    }
    return makers[kind](size, name, rest, list(devices)[:1], platform)


# Training


def task_of_text(size: Size, images: int, platform: str) -> tuple[Config, LatentDiffusion]:
    """Return a config and its task: the text network on so many images."""
    batch = {"data__images_per_set": 1, "data__batch_size": images, "eval__batch_size": images}
    config = size.config(model__attentions=("self", "text"), **batch)
    models = FrozenModels(size.autoencoder, text_encoder=size.text_encoder)
    return config, PrecomputedText(config, platform, models)


def _text_step(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    images, _, without = rest.partition("_")
    config, task = task_of_text(size, int(images), platform)
    text = (size.text_encoder.max_position_embeddings, size.text_encoder.hidden_size)
    return _step(name, config, task, devices, text=text, ema=not without)


def _set_step(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    sets, _, how = rest.partition("_")
    backend, _, remat = how.rpartition("_")
    batch = {"data__batch_size": int(sets), "eval__batch_size": int(sets)}
    config = size.config(model__attention_backend=backend, model__remat=remat, **batch)
    return _step(name, config, SetDiffusion(config, platform, FrozenModels(size.autoencoder)), devices)


def _step(
    name: str,
    config: Config,
    task: LatentDiffusion,
    devices: list,
    text: tuple[int, int] | None = None,
    ema: bool = True,
) -> Program:
    """Return the very step that `m2m_jax.train` compiles. text: tokens of a caption and their width."""
    mesh = sharding.make_mesh(config.mesh, devices)
    setup = set_up(task, config, mesh)
    state, step = setup.state, setup.step
    if not ema:
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        state = WithoutAverage(**{**fields, "ema_params": {}})
        optimizer, _ = make_optimizer(config.optimizer, config.train.steps)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = make_train_step(task, optimizer, shardings, mesh, config.train.ema_decay, setup.trained)
    sets, images = config.data.batch_size, config.data.images_per_set
    latents = task.models.latent_shape(config.data.image_size)
    shapes = {"latents_bnhwc": (sets, images, *latents)} | ({"text_bsc": (sets, *text)} if text else {})
    batch = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh, key))
        for key, shape in shapes.items()
    }
    return flat(
        name,
        lambda state, batch: step(state, {}, batch),
        (state, batch),
        items=sets if images > 1 else sets * images,
        unit="sets" if images > 1 else "images",
        flops=count_products(task, batch),
        carries=True,
    )


# Sampling


def _programs(size: Size, rest: str, devices: list) -> tuple[Programs, dict, int, Callable[..., Any]]:
    sets, _, guided = rest.partition("_")
    config = size.config(
        data__images_per_set=max(size.context) + 1,
        sample__guidance_scale=max(size.guidance) if guided else 1.0,
    )
    task = SetDiffusion(config, None, FrozenModels(size.autoencoder))
    where = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    static = task.sampler({}, step=0).static
    static = dataclasses.replace(static, settings=dataclasses.replace(static.settings, cache_size=max(size.context)))
    return static, placed({UNET: task.shapes, **task.frozen}), int(sets), placed


def _denoise(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    """Return some steps of denoising, with a cache that holds 0, 1, ... images."""
    static, params, sets, placed = _programs(size, rest, devices)
    seed_b = placed(jax.ShapeDtypeStruct((sets,), jnp.uint32))
    cache = placed(jax.eval_shape(static.empty_cache, params, seed_b))
    carry = placed(jax.eval_shape(static.begin, params, cache, seed_b))
    number = placed(jax.ShapeDtypeStruct((), jnp.int32))

    def denoise(params, cache, seed_b, carry, first, end):
        return static.denoise(params, cache, seed_b, carry, first, end)

    return flat(
        name,
        denoise,
        ({UNET: params[UNET]}, cache, seed_b, carry, number, number),
        items=sets * DENOISING_STEPS,
        unit="image_steps",
        values={"5": DENOISING_STEPS},
        cases={f"{n} context images": {".count_b": n, ".position_b": n} for n in size.context},
    )


def _append(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    """Return what keeps a finished image: one clean pass through the network."""
    static, params, sets, placed = _programs(size, rest, devices)
    seed_b = placed(jax.ShapeDtypeStruct((sets,), jnp.uint32))
    cache = placed(jax.eval_shape(static.empty_cache, params, seed_b))
    image = placed(jax.ShapeDtypeStruct((sets, *static.models.latent_shape(static.image_size)), jnp.float32))
    everyone = placed(jax.ShapeDtypeStruct((sets,), jnp.bool_))

    def append(cache, params, seed_b, image, append_b):
        kept = static.append(params, cache, seed_b, image, append_b)
        return dataclasses.replace(kept, count_b=cache.count_b, position_b=cache.position_b)  # every call alike

    most = {".count_b": max(size.context) - 1, ".position_b": max(size.context) - 1}
    arguments = (cache, {UNET: params[UNET]}, seed_b, image, everyone)
    return flat(name, append, arguments, items=sets, unit="images", carries=True, values=most)


# The autoencoder


def _autoencoder(size: Size, rest: str, devices: list) -> tuple[FrozenModels, dict, Callable[..., Any]]:
    static, params, images, placed = _programs(size, "1", devices)
    del images
    return static.models, {AUTOENCODER: params[AUTOENCODER]}, placed


def _encode(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    models, params, placed = _autoencoder(size, rest, devices)
    side = size.config().data.image_size
    images = placed(jax.ShapeDtypeStruct((int(rest), side, side, 3), jnp.uint8))
    return flat(name, models.encode, (params, images), items=int(rest), unit="images")


def _decode(size: Size, name: str, rest: str, devices: list, platform: str) -> Program:
    models, params, placed = _autoencoder(size, rest, devices)
    shape = models.latent_shape(size.config().data.image_size)
    latents = placed(jax.ShapeDtypeStruct((int(rest), *shape), jnp.float32))
    return flat(name, models.decode, (params, latents), items=int(rest), unit="images")
