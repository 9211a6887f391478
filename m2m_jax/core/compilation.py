"""Say what is being compiled, and how long such a program took before: minutes without a word look like a fault."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax

from m2m_jax.core import disk
from m2m_jax.core.printing import duration

FILE = "compile_times.json"  # beside the compiled programs: {name and digest: seconds}
PATIENCE = 5.0  # seconds; of what takes less, nothing is said
P = ParamSpec("P")
R = TypeVar("R")

_announced: set[str] = set()  # programs of this process


@contextlib.contextmanager
def compiling(name: str, about: object) -> Iterator[None]:
    """Say to stderr that a program is being compiled, once that takes more than a few seconds, and note its time.

    The longest time counts: a program that is in JAX's compilation cache is merely read, in a fraction of it.

    Args:
      name: of the program, for people: "the training step".
      about: all that the program depends on beside devices and JAX, by its `repr`.

    Example:
        with compiling("the training step", to_json(config)):
            step = step.lower(state, frozen, batch).compile()
    """
    key = _key(name, about)
    before = _times().get(key)
    took_before = f"took {duration(before)} before" if before else "not compiled here before"
    line = f"compiling {name} ({took_before}) ..."
    timer = threading.Timer(PATIENCE, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    began = time.monotonic()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.monotonic() - began
    if seconds > max(PATIENCE, before or 0.0):
        _note(key, seconds)


def saying_so(name: str, about: object, function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, whose first call compiles it: the first of this process is made within `compiling`."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        key = _key(name, about)
        if key in _announced:
            return function(*arguments, **options)
        _announced.add(key)
        with compiling(name, about):
            return function(*arguments, **options)

    return call


def _key(name: str, about: object) -> str:
    devices = jax.devices()
    everything = (jax.__version__, devices[0].device_kind, len(devices), about)
    return f"{name}, {hashlib.sha256(repr(everything).encode()).hexdigest()[:16]}"


def _file() -> Path | None:
    """Return where times are kept; None where no compiled programs are kept either."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX defines it as it runs
    return Path(folder) / FILE if folder and "://" not in folder else None


def _times() -> dict[str, float]:
    file = _file()
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: float(x) for key, x in found.items() if isinstance(x, int | float) and 0 < x < 1e6}


def _note(key: str, seconds: float) -> None:
    """Keep a time. Where it cannot be kept, or another process writes at once, one is lost, which is no harm."""
    file = _file()
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, json.dumps(_times() | {key: round(seconds, 1)}, indent=1, sort_keys=True).encode())
