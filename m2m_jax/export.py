"""Exports a bundle: `python -m m2m_jax.export --checkpoint runs/demo --output bundle`.

A bundle (`sampling/bundle.py`) holds the sampler as StableHLO for every platform, and its parameters. It runs with
`dist/m2m-sample.pyz` (`make sampler`), which needs jax, numpy, pillow and flatbuffers and no model code. The settings
of sampling are compiled into it; how many sets, context images and new images there are is not.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import save_file

from m2m_jax.errors import UserError
from m2m_jax.models.context_cache import ContextCache
from m2m_jax.program import run_program
from m2m_jax.sampling.bundle import PARAMS, PLATFORMS, SEPARATOR, program_file, write_manifest
from m2m_jax.sampling.flags import given_settings
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.set_sampler import PROGRAMS

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STEP.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)


def main(argv):
    settings, output = given_settings(), Path(OUTPUT.value)
    if output.exists():
        raise UserError(f"--output={output} exists; name a new folder")
    sampler = Sampler.from_checkpoint(CHECKPOINT.value, **settings)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            write_bundle(sampler, aside)
            aside.chmod(0o755)  # a temporary folder is its owner's alone
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output={output} cannot be written: {reason}") from error
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: step {sampler.step}, {size / 1e6:.1f} MB, for {', '.join(PLATFORMS)}")


def write_bundle(sampler: Sampler, folder: Path) -> None:
    """All files of a bundle, into a folder that is empty."""
    for name, exported in export_programs(sampler).items():
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
        "about": sampler.about,
        "schedule": sampler.schedule.to_config(),
    }
    write_manifest(folder, fields)


def export_programs(sampler: Sampler) -> dict[str, jax.export.Exported]:
    """`sampling/programs.py`, for any number of sets, with a dict in the place of `ContextCache`."""
    static, params = sampler.static, jax.eval_shape(lambda: jax.tree.map(jnp.float32, sampler.params))
    (b,) = jax.export.symbolic_shape("b")
    seed_b, append_b = jax.ShapeDtypeStruct((b,), jnp.uint32), jax.ShapeDtypeStruct((b,), jnp.bool_)
    images = jax.ShapeDtypeStruct((b, sampler.image_size, sampler.image_size, 3), jnp.uint8)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def empty(params, seed_b):
        return _as_dict(static.empty_cache(params, seed_b))

    def append(params, cache, image, append_b):
        return _as_dict(static.append(params, _from_dict(cache), image, append_b))

    def begin(params, cache, seed_b):
        return static.begin(params, _from_dict(cache), seed_b)

    def denoise(params, cache, seed_b, carry, first, end):
        return static.denoise(params, _from_dict(cache), seed_b, carry, first, end)

    cache = jax.eval_shape(empty, params, seed_b)
    carry = jax.eval_shape(begin, params, cache, seed_b)
    calls = {
        "empty_cache": (empty, seed_b),
        "encode": (static.encode, images),
        "append": (append, cache, jax.eval_shape(static.encode, params, images), append_b),
        "begin": (begin, cache, seed_b),
        "denoise": (denoise, cache, seed_b, carry, scalar, scalar),
        "decode": (static.decode, carry["x"]),
    }
    assert tuple(calls) == PROGRAMS
    return {
        name: jax.export.export(jax.jit(program), platforms=PLATFORMS)(params, *arguments)
        for name, (program, *arguments) in calls.items()
    }


def _as_dict(cache: ContextCache) -> dict[str, Any]:
    """What a program without this project's classes can hold: dicts with string keys."""
    fields = vars(cache)
    return {k: {str(i): x for i, x in enumerate(v)} if isinstance(v, tuple) else v for k, v in fields.items()}


def _from_dict(fields: dict[str, Any]) -> ContextCache:
    names = [field.name for field in dataclasses.fields(ContextCache)]
    values = (fields[name] for name in names)
    return ContextCache(*(tuple(v[str(i)] for i in range(len(v))) if isinstance(v, dict) else v for v in values))


if __name__ == "__main__":
    run_program(main)
