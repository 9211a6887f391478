"""Compile the programs of all parts for a chip that need not be there, and say what the compiler made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.accelerator import networks
from benchmarks.accelerator.executable import compile_program, save, versions
from benchmarks.accelerator.sizes import SIZES
from m2m_jax.core.errors import UserError
from m2m_jax.planning import hlo
from m2m_jax.planning.compile import prepare
from m2m_jax.planning.gpus import gpu_devices
from m2m_jax.planning.hbm import hbm_bytes

HERE = "here"


def compile_all(preset: str, folder: Path, chip: str, only: tuple[str, ...], say: Callable[..., None]) -> int:
    """Compile programs into a folder; return the exit code: 1 where one did not compile.

    Args:
      chip: a file of `planning/targets`, or "here" for this machine's first device.
      only: names of programs or parts; empty: all.

    Raises:
      UserError: there is no such chip or program.
    """
    size = SIZES[preset]
    by_part = networks.names(size)
    known = {name for part, names in by_part.items() for name in (part, *names)}
    if unknown := sorted(set(only) - known):
        raise UserError(f"--only={','.join(unknown)}: with --compile_only there are {', '.join(sorted(known))}")
    if chip == HERE:
        devices, platform = jax.local_devices()[:1], jax.default_backend()
    else:
        prepare()
        devices, platform = gpu_devices(chip, 1), "gpu"
    say(compiled_for=chip, preset=preset, **versions())
    failed = 0
    for name in (
        name for part, names in by_part.items() for name in names if not {part, name}.isdisjoint(only or {name})
    ):
        try:
            with _compiled_anew():
                compiled, executable = compile_program(networks.make(size, name, devices, platform))
            text = executable.as_text()
            size_mb = save(folder, compiled, executable, chip) / 1e6
            figures = {"file_mb": round(size_mb, 2), "moved_gb": round(hbm_bytes(hlo.parse(text)) / 1e9, 3)}
            say(program=name, **compiled.made, **figures, **hlo.kinds_of_kernels(text))
        except Exception as error:  # whatever it is, the others may compile
            failed += 1
            say(program=name, failed=f"{type(error).__name__}: {error}"[:500])
    return 1 if failed else 0


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Leave the compilation cache out: on CPUs, what came out of it lacks functions when it is written again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
