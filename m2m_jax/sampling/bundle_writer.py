"""A sampler written as a bundle; what that is stands in `bundle.py`."""

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from m2m_jax.core.errors import UserError
from m2m_jax.models.context_cache import ContextCache
from m2m_jax.sampling.bundle import PARAMS, PLATFORMS, SEPARATOR, program_file, write_manifest
from m2m_jax.sampling.program_check import ForbiddenProgram, require_arithmetic
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.set_sampler import PROGRAMS


def write_bundle(sampler: Sampler, folder: Path) -> None:
    """Write all files of a bundle into a folder that is empty."""
    for name, exported in export_programs(sampler).items():
        try:
            require_arithmetic(exported)
        except ForbiddenProgram as error:
            raise UserError(f"no bundle may hold the program {name!r} of this sampler: {error}") from error
        (folder / program_file(name)).write_bytes(exported.serialize())
    flat = {
        f"{model}{SEPARATOR}{name}": np.ascontiguousarray(x, np.float32)
        for model, params in sampler.params.items()
        for name, x in params.items()
    }
    save_file(flat, folder / PARAMS)
    fields = {
        "platforms": PLATFORMS,
        "image_size": sampler.image_size,
        "num_steps": sampler.num_steps,
        "cache_size": sampler.cache_size,
        "slide": sampler.slide,
        "encodes_generated": sampler.encodes_generated,
        "reads_context": sampler.reads_context,
        "about": sampler.about,
        "conditioned_on": sampler.conditioned_on,
        "schedule": sampler.schedule.to_config(),
        **({"global_widths": widths} if (widths := sampler.global_widths) else {}),
    }
    write_manifest(folder, fields)


def export_programs(sampler: Sampler) -> dict[str, jax.export.Exported]:
    """Export `sampling/programs.py` for any number of sets, with a dict in the place of `ContextCache`."""
    static, params = sampler.static, jax.eval_shape(lambda: jax.tree.map(jnp.float32, sampler.params))
    (b,) = jax.export.symbolic_shape("b")
    seed_b, append_b = jax.ShapeDtypeStruct((b,), jnp.uint32), jax.ShapeDtypeStruct((b,), jnp.bool_)
    images = jax.ShapeDtypeStruct((b, sampler.image_size, sampler.image_size, 3), jnp.uint8)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = static.global_shapes(b)
    told = (shapes,) if shapes else ()

    def fields(cache: ContextCache) -> dict[str, Any]:
        """Return what a program without this project's classes can hold: dicts with string keys."""
        return {name: value for name, value in vars(cache).items() if name != "levels"}

    def cached(fields: dict[str, Any]) -> ContextCache:
        return ContextCache(**fields, levels=len(static.levels))

    def empty(params, seed_b):
        return fields(static.empty_cache(params, seed_b))

    def append(params, cache, seed_b, image, append_b, *told):
        return fields(static.append(params, cached(cache), seed_b, image, append_b, *told))

    def begin(params, cache, seed_b):
        return static.begin(params, cached(cache), seed_b)

    def denoise(params, cache, seed_b, carry, first, end, *told):
        return static.denoise(params, cached(cache), seed_b, carry, first, end, *told)

    cache = jax.eval_shape(empty, params, seed_b)
    carry = jax.eval_shape(begin, params, cache, seed_b)
    calls: dict[str, tuple[Any, ...]] = {
        "empty_cache": (empty, seed_b),
        "encode": (static.encode, images),
        "append": (append, cache, seed_b, jax.eval_shape(static.encode, params, images), append_b, *told),
        "begin": (begin, cache, seed_b),
        "denoise": (denoise, cache, seed_b, carry, scalar, scalar, *told),
        "decode": (static.decode, carry["x"]),
    }
    assert tuple(calls) == PROGRAMS
    return {
        name: jax.export.export(jax.jit(program), platforms=PLATFORMS)(params, *arguments)
        for name, (program, *arguments) in calls.items()
    }
