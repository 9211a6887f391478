"""Compiled programs in files, so that what was compiled here is loaded there: `--compile_only`, `--executables`.

JAX unpickles an executable when it loads one, and what is unpickled can run anything: **only files that you made
yourself are to be loaded**. Beside each, NAME.json says how the program is called, for which chip and versions it was
compiled, and its sha256: a file that was damaged or exchanged on the way is refused before it is opened. The digest is
no signature: whoever can write both files can write a matching pair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from benchmarks.accelerator.program import Description, Program
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that can be called. made: how it came to be, for the report."""

    description: Description
    call: Callable[..., list[jax.Array]]
    made: dict[str, Any]


def versions() -> dict[str, str]:
    """Return what an executable depends on beside the chip."""
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def compile_program(program: Program) -> tuple[Compiled, jax.stages.Compiled]:
    """Return a program compiled for where its shapes lie, and JAX's own object."""
    started = time.monotonic()
    lowered = program.traced.lower()
    lowering = time.monotonic() - started
    began, cpu = time.monotonic(), time.process_time()
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    made = {
        "trace_seconds": round(program.trace_seconds + lowering, 2),
        "compile_seconds": round(time.monotonic() - began, 2),
        "compile_cpu_seconds": round(time.process_time() - cpu, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
    }
    return Compiled(program.description, compiled, made), compiled


def save(folder: Path, one: Compiled, compiled: jax.stages.Compiled, chip: str) -> int:
    """Write a compiled program and its description; return the bytes of the program. chip: for the description."""
    payload, _, _ = serialize_executable.serialize(compiled)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "description": dataclasses.asdict(one.description),
        "made": one.made,
        "chip": chip,
        "versions": versions(),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    disk.write(folder / f"{one.description.name}.executable", payload)
    disk.write(folder / f"{one.description.name}.json", json.dumps(about).encode())
    return len(payload)


def load(folder: Path, name: str) -> Compiled:
    """Return a program of `save`, on this machine's first device.

    Raises:
      UserError: it is not there, was not made with these versions of JAX, or is not what was written.
    """
    file, beside = folder / f"{name}.executable", folder / f"{name}.json"
    if not (file.is_file() and beside.is_file()):
        raise UserError(f"--executables={folder} has no {name}")
    about = json.loads(beside.read_text())
    if about["versions"] != versions():
        made, here = (", ".join(f"{k} {v}" for k, v in of.items()) for of in (about["versions"], versions()))
        raise UserError(f"{file} was compiled with {made}, and here is {here}")
    payload = file.read_bytes()
    if hashlib.sha256(payload).hexdigest() != about["sha256"]:
        raise UserError(f"{file} is not what {beside.name} says it was")
    description = Description.from_json(about["description"])
    started = time.monotonic()
    # A list of arrays in, a list of arrays out.
    inputs = jax.tree.structure((tuple(description.arguments), {}))
    outputs = jax.tree.structure([0] * description.results)
    call = serialize_executable.deserialize_and_load(
        payload, inputs, outputs, execution_devices=jax.local_devices()[:1]
    )
    return Compiled(description, call, about["made"] | {"load_seconds": round(time.monotonic() - started, 2)})
