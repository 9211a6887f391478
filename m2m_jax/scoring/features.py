"""Features of sets, computed once: kept on disk by what encoded them and what was encoded.

DIR/ENCODER-FINGERPRINT-CONTENT.safetensors    "features" [sets, images, c], "logits" [sets, images, l]; float32
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.scoring.encoders import SetEncoder
from m2m_jax.scoring.sets import Sets

_IMAGES_AT_ONCE = 256
_SHOWN = 12  # characters of a hash in the name of a file


def features_of(
    sets: Sets, encoder: SetEncoder, cache: Path | None = None, report: Callable[[str], object] = lambda line: None
) -> dict[str, np.ndarray]:
    """Return what an encoder gives of all images: {name in `encoder.outputs_of`: float32 [sets, images, c]}.

    Args:
      cache: folder in which it is looked for, and kept; None: it is neither.
      report: given a line when something is computed.

    Raises:
      UserError: an image is damaged, the file in the cache is another's, or the cache cannot be written.
    """
    about = {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "content": sets.content}
    path = cache and cache / f"{encoder.name}-{encoder.fingerprint[:_SHOWN] or 'none'}-{about['content'][:_SHOWN]}"
    path = path and path.with_name(f"{path.name}.safetensors")
    if path and path.exists():
        return _read(path, about, encoder, (len(sets), sets.num_images))
    report(f"{encoder.name}: encoding {len(sets) * sets.num_images} images of {sets.name}")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoder.outputs_of}
    at_once = max(_IMAGES_AT_ONCE // sets.num_images, 1)
    for first in range(0, len(sets), at_once):
        batch = np.concatenate([sets.images(i) for i in range(first, min(first + at_once, len(sets)))])
        for name, values in encoder.outputs(batch).items():
            parts[name].append(values)
    found = {name: np.concatenate(values).reshape(len(sets), sets.num_images, -1) for name, values in parts.items()}
    if path:
        with disk.errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write(path, save(found, about))
    return found


def _read(path: Path, about: dict[str, str], encoder: SetEncoder, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            said = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): remove it") from error
    if said != about:
        shown = json.dumps({name: str(value)[:_SHOWN] for name, value in said.items()})
        raise UserError(f"{path} holds features of another encoder or of other images ({shown:.200}): remove it")
    if set(found) != set(encoder.outputs_of) or any(x.shape[:2] != shape for x in found.values()):
        shapes = {name: list(x.shape) for name, x in found.items()}
        raise UserError(f"{path} holds {shapes}, not features of {shape[0]} sets of {shape[1]} images: remove it")
    if not all(np.isfinite(x).all() for x in found.values()):
        raise UserError(f"{path} holds features that are not finite: remove it")
    return found
