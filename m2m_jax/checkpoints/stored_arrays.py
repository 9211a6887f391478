"""What Orbax has written of an item's arrays, read back from the store that it keeps them in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tensorstore


def lost(folder: Path, arrays: Mapping[str, Any]) -> str:
    """Return what is missing of an item that was just written, or written otherwise; an empty text: it is all there.

    Reads no numbers: where a part of an array is missing, TensorStore would read zeros in its place.

    Args:
        folder: of the item.
        arrays: {name: what has its shape and dtype}.
    """
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()
        names = {name.decode() for name in store.list().result()}
        found = {name: store.read(f"{name}/.zarray") for name in arrays}
        about = {name: future.result().value for name, future in found.items()}
    except (ValueError, OSError) as error:
        return f"nothing can be read ({' '.join(str(error).split())[:300]})"
    problems = [f"array {name} is missing" for name, text in about.items() if not text]
    for name, array in arrays.items():
        if not about[name]:
            continue
        described = json.loads(about[name])
        shape, chunks = tuple(described["shape"]), [max(chunk, 1) for chunk in described["chunks"]]
        if shape != tuple(array.shape) or jnp.dtype(described["dtype"]) != array.dtype:
            problems.append(f"array {name} is {described['dtype']}{list(shape)}, not {array.dtype}{list(array.shape)}")
            continue
        parts = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
        there = sum(f"{name}/{_part(i, shape, chunks)}" in names for i in range(parts))
        if there != parts:
            problems.append(f"{parts - there} of {parts} parts of array {name} are missing")
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _part(index: int, shape: tuple[int, ...], chunks: list[int]) -> str:
    """Return the key of the index-th chunk of an array, in row-major order: 0.3 of two axes, 0 of none."""
    numbers = []
    for size, chunk in reversed(list(zip(shape, chunks, strict=True))):
        index, number = divmod(index, -(-size // chunk))
        numbers.append(number)
    return ".".join(map(str, reversed(numbers))) or "0"
