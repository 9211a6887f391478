"""The programs of sampling, compiled for TPUs that are not there: what they would need and do."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2m_jax.attention.cached import CACHED_BACKENDS
from m2m_jax.configuration import Config
from m2m_jax.core.errors import UserError
from m2m_jax.planning import hlo
from m2m_jax.planning.compile import Machine, peak_bytes
from m2m_jax.planning.hbm import hbm_bytes
from m2m_jax.planning.memory import bytes_per_device, gib, parse_out_of_memory
from m2m_jax.planning.roofline import Roofline, roofline
from m2m_jax.sampling.programs import UNET, Programs, compiled
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.training.attention_flops import attentions
from m2m_jax.training.workload import make_task


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the sampler, on one device.

    Attributes:
      scratch: bytes that it needs beside its inputs.
      seconds: at least, by the roofline: one step of denoising, one image of the others.
      limiter: of them.
    """

    scratch: float
    seconds: float
    limiter: str


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """Sampling with full caches; bytes of a device.

    Attributes:
      steps: evaluations of the network, an image.
      image_seconds: of an image of each set, at least: as its context is encoded, kept, denoised and decoded.
    """

    devices: int
    sets_per_device: int
    context_images: int
    steps: int
    parameters: int
    cache: int
    limit: float
    programs: dict[str, Program]
    image_seconds: float
    images_per_second: float
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def needed(self) -> float:
        return self.parameters + self.cache + max(program.scratch for program in self.programs.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit

    @property
    def advice(self) -> list[str]:
        """Return what to change so that sampling fits: cache and scratch are about proportional to sets."""
        a_set = (self.needed - self.parameters) / self.sets_per_device
        sets = min(int((self.limit - self.parameters) / a_set), self.sets_per_device - 1)
        if sets > 0:
            return [f"--sets_per_device={sets}: takes about {gib((self.sets_per_device - sets) * a_set)} less"]
        an_image = gib(self.cache / self.sets_per_device / self.context_images)
        return [f"fewer --config.data.images_per_set: each takes {an_image} of the cache"]


def plan_sampling(config: Config, machine: Machine, sets_per_device: int) -> SamplingPlan:
    """Return the plan of the sampler of `config`, its sets shared evenly by all devices.

    The cache holds a whole set but its last image, as the model was trained. Takes minutes at full size.

    Raises UserError where a config trains no sampler, or XLA does not compile one of its programs.
    """
    if config.task != "set_diffusion":
        raise UserError(f"--job=sample plans sampling, and task={config.task} trains no sampler")
    task, notes = make_task(config, machine.platform)
    assert isinstance(task, SetDiffusion)  # as its name says
    context_images = max(config.data.images_per_set - 1, 1)
    static = task.sampler({}, step=0).static
    static = dataclasses.replace(static, settings=dataclasses.replace(static.settings, cache_size=context_images))
    mesh = Mesh(np.array(machine.devices), ("data",))
    arguments = _arguments(static, {UNET: task.shapes, **task.frozen}, mesh, sets_per_device * len(machine.devices))
    params, cache = arguments["empty_cache"][0], arguments["append"][1]

    started = time.monotonic()
    programs = {name: _compile(name, static, mesh, rest, machine) for name, rest in arguments.items()}
    # XLA counts a loop once: of a full cache, one image.
    tokens = task.models.context_tokens
    others = (context_images - 1) * _kept_image(static, machine, tokens, sets_per_device)
    programs["denoise"] = _slower(programs["denoise"], others)
    if not static.unet_config.attends_to_encoded and static.unet_config.clean_sees == "preceding":
        programs["append"] = _slower(programs["append"], others)
    steps = len(static.table.timestep)
    once = sum(programs[name].seconds for name in ("encode", "append", "begin", "decode"))
    image_seconds = once + steps * programs["denoise"].seconds
    return SamplingPlan(
        devices=len(machine.devices),
        sets_per_device=sets_per_device,
        context_images=context_images,
        steps=steps,
        parameters=bytes_per_device(params),
        cache=bytes_per_device(cache),
        limit=machine.chip.hbm,
        programs=programs,
        image_seconds=image_seconds,
        images_per_second=sets_per_device * len(machine.devices) / image_seconds,
        compile_seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def sampling_as_text(plan: SamplingPlan, topology: str) -> str:
    """Return a plan to be read."""
    lines = [
        f"{topology}: {plan.devices} devices, {plan.sets_per_device} sets a device with {plan.context_images} context "
        f"images each, {plan.steps} steps an image; compiled in {plan.compile_seconds:.0f} s",
        *(f"  note: {note}" for note in plan.notes),
        "memory of a device",
        f"  {'parameters, all models':<24} {gib(plan.parameters):>12}",
        f"  {'context cache':<24} {gib(plan.cache):>12}",
    ]
    lines += [f"  {'for ' + name:<24} {gib(program.scratch):>12}" for name, program in plan.programs.items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'needed, at most':<24} {gib(plan.needed):>12} of {gib(plan.limit)}: {verdict}")
    if not plan.fits:
        lines += [f"too large by {gib(plan.needed - plan.limit)}; what would help:", *(f"  {x}" for x in plan.advice)]
    lines.append("roofline, seconds at least")
    lines += [
        f"  {name:<24} {program.seconds:12.5f} by {program.limiter}{', a step' if name == 'denoise' else ''}"
        for name, program in plan.programs.items()
    ]
    lines.append(f"  {'an image of each set':<24} {plan.image_seconds:12.5f}")
    lines.append(f"  {'images a second':<24} {plan.images_per_second:12.1f} at most")
    return "\n".join(lines)


def _arguments(static: Programs, params: Any, mesh: Mesh, num_sets: int) -> dict[str, tuple]:
    """Return what each program is called with, as the sampler places it."""

    def placed(tree: Any, *axes: str) -> Any:
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    params, size = placed(params), static.image_size
    seed_b, everyone = (placed(jax.ShapeDtypeStruct((num_sets,), dtype), "data") for dtype in (jnp.uint32, jnp.bool_))
    images = placed(jax.ShapeDtypeStruct((num_sets, size, size, 3), jnp.uint8), "data")
    cache = placed(jax.eval_shape(static.empty_cache, params, seed_b), "data")
    image = placed(jax.eval_shape(static.encode, params, images), "data")
    carry = placed(jax.eval_shape(static.begin, params, cache, seed_b), "data")
    number = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = static.global_shapes(num_sets)
    told = (placed(shapes, "data"),) if shapes else ()
    return {
        "empty_cache": (params, seed_b),
        "encode": (params, images),
        "append": (params, cache, seed_b, image, everyone, *told),
        "begin": (params, cache, seed_b),
        "denoise": (params, cache, seed_b, carry, number, number, *told),
        "decode": (params, carry["x"]),
    }


def _compile(name: str, static: Programs, mesh: Mesh, arguments: tuple, machine: Machine) -> Program:
    try:
        executable = compiled(static, mesh)[name].lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = parse_out_of_memory(str(error))
        if sizes is None:
            raise UserError(f"XLA does not compile {name} for {machine.topology}: {str(error)[:2000]}") from error
        return Program(sizes[0] - bytes_per_device(arguments), float("nan"), "memory")
    memory: Any = executable.memory_analysis()
    scratch = max(peak_bytes(memory, machine.platform) - memory.argument_size_in_bytes, 0)
    times = _times(executable, machine)
    return Program(scratch, times.step_seconds, times.limiter)


def _slower(program: Program, seconds: float) -> Program:
    return dataclasses.replace(program, seconds=program.seconds + seconds)


def _times(executable: Any, machine: Machine) -> Roofline:
    # Of GPUs XLA counts none: what is left is by memory.
    flops = (executable.cost_analysis() or {}).get("flops", 0.0)
    return roofline(machine.chip, flops, hbm_bytes(hlo.parse(executable.as_text())), 0.0, 0.0)


def _kept_image(static: Programs, machine: Machine, tokens: int | None, num_sets: int) -> float:
    """Return the seconds that one more image in the cache adds to a pass through the network."""
    config, seconds = static.unet_config, 0.0
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(machine.devices[0]))
    for count, t, channels, heads in attentions(config, static.models.latent_shape(static.image_size)[0]):
        q_bgthd = placed((num_sets, 1, t, heads, channels // heads), jnp.dtype(config.dtype))
        dtype = static.settings.cache_dtype or config.dtype
        kept_bmshd = placed((num_sets, 1, tokens or t, heads, channels // heads), jnp.dtype(dtype))
        sees_bgm = placed((num_sets, 1, 1), jnp.bool_)
        attention = jax.jit(CACHED_BACKENDS["plain"])
        compiled = attention.lower(q_bgthd, kept_bmshd, kept_bmshd, sees_bgm).compile()
        seconds += count * _times(compiled, machine).step_seconds
    return seconds
