"""A bundle: a sampler as files that need no model code, no Flax and no Orbax to run.

BUNDLE/ holds
    manifest.json          format, sizes, settings, schedule, and the size and hash of every other file
    params.safetensors     the EMA and the frozen models, float32: "unet/conv_in.kernel", ...
    NAME.exported          each program of `sampling/programs.py`, as `jax.export` writes StableHLO

`m2m_jax.export` writes it. Reading needs jax, flatbuffers and numpy alone. The hashes find damage, and a forger
makes them right. So every program is walked before anything is compiled, and refused where it holds more than
arithmetic (`program_check.py`): none calls back into Python, none calls a function of a library. A forged program still
computes what its author likes, for as long and in as much memory as XLA allows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError, one_line
from m2m_jax.sampling.program_check import ForbiddenProgram, require_arithmetic
from m2m_jax.sampling.set_sampler import PROGRAMS, SetSampler

FORMAT = 2
PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST, PARAMS = "manifest.json", "params.safetensors"
# Attributes of a `SetSampler` that the manifest holds.
NUMBERS, TRUTHS = ("image_size", "num_steps", "cache_size"), ("slide", "encodes_generated", "reads_context")
SEPARATOR = "/"  # between a model and the name of its parameter


def program_file(name: str) -> str:
    return f"{name}.exported"


class Bundle(SetSampler):
    """The sampler of a bundle, on JAX's first device. Its settings were chosen when it was exported."""

    def __init__(self, folder: str | Path):
        """Read and check all of it.

        Raises:
          UserError: no bundle, one of a newer format or for other platforms, or a file that is not the one exported.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        platform = jax.default_backend()
        platform = {"gpu": "cuda"}.get(platform, platform)
        if platform not in manifest["platforms"]:
            raise UserError(
                f"{folder} was exported for {', '.join(manifest['platforms'])}; this machine has {platform}"
            )
        for name in (PARAMS, *map(program_file, PROGRAMS)):
            _check_file(folder, name, manifest["files"])
        self._fingerprint = disk.sha256(folder / MANIFEST)  # which holds the hashes of all other files
        self._about = {"bundle": str(folder), **manifest["about"]}
        for name in (*NUMBERS, *TRUTHS):
            setattr(self, name, manifest[name])
        self.global_widths = manifest.get("global_widths", {})
        self._conditioned_on = str(manifest.get("conditioned_on", ""))
        params = jax.device_put(_read_params(folder / PARAMS))
        self._programs = {name: functools.partial(_load(folder, name, manifest), params) for name in PROGRAMS}

    @property
    def programs(self) -> Mapping[str, Callable]:
        return self._programs

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def conditioned_on(self) -> str:
        return self._conditioned_on

    @property
    def about(self) -> dict[str, Any]:
        return self._about


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write manifest.json for what stands in `folder`."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": disk.sha256(file)} for file in sorted(folder.iterdir())
    }
    manifest = {"format": FORMAT, "jax": jax.__version__, **fields, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:
            _check_manifest(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no bundle: {MANIFEST} is missing; write one with m2m_jax.export") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): export the bundle again") from error
    if version != FORMAT:
        raise UserError(
            f"{folder} is of bundle format {version!r:.40}, and this program reads format {FORMAT}: get its match"
        )
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for what `m2m_jax.export` does not write."""
    for name in NUMBERS:
        if type(manifest[name]) is not int or not 1 <= manifest[name] < 2**31:
            raise ValueError(f"{name} is {manifest[name]!r:.40}")
    for name in TRUTHS:
        if type(manifest[name]) is not bool:
            raise ValueError(f"{name} is {manifest[name]!r:.40}")
    widths = manifest.get("global_widths", {})  # of models that have such
    if not isinstance(widths, dict) or any(type(x) is not int or not 1 <= x < 2**31 for x in widths.values()):
        raise ValueError(f"global_widths is {widths!r:.80}")
    if not isinstance(manifest["about"], dict) or not isinstance(manifest["jax"], str):
        raise ValueError("about, jax")
    if not isinstance(manifest["platforms"], list) or not all(isinstance(one, str) for one in manifest["platforms"]):
        raise ValueError("platforms")
    for name in (PARAMS, *map(program_file, PROGRAMS)):
        if type(manifest["files"][name]["bytes"]) is not int or not isinstance(manifest["files"][name]["sha256"], str):
            raise ValueError(name)


def _check_file(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    path, expected = folder / name, files[name]
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the bundle again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{path} has {size} bytes, not {expected['bytes']}: copy the bundle again")
    if disk.sha256(path) != expected["sha256"]:
        raise UserError(f"{path} is not the file that was exported (its SHA-256 differs): copy the bundle again")


def _load(folder: Path, name: str, manifest: Mapping[str, Any]) -> Callable:
    path = folder / program_file(name)
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        require_arithmetic(exported)
    except ForbiddenProgram as error:
        raise UserError(
            f"{path} is no program of a sampler: {error}; it may be forged: get the bundle from who exported it"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} was exported by jax {manifest['jax']} and this is {jax.__version__}, which can't read it "
            f"({one_line(error)}): install jax {manifest['jax']}, or export the checkpoint again"
        ) from error
    except Exception as error:  # FlatBuffers' reader trusts what it reads
        raise UserError(f"{path} is damaged ({one_line(error)}): export the bundle again") from error
    # The cache is large and handed on: its memory is used again.
    program = jax.jit(exported.call, donate_argnums=1 if name == "append" else ())

    @functools.wraps(program)
    def call(*arguments):
        try:
            return program(*arguments)
        except (ValueError, TypeError, KeyError, AssertionError, jax.errors.JaxRuntimeError) as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise UserError(f"{path} does not run ({one_line(error)}): export the bundle again") from error

    return call


def _read_params(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return {model: {name: float32 array}}, mapped into memory.

    The format is 8 bytes of header length, a JSON header with dtype, shape and place of each tensor, and the data (its
    own library is one more thing to install).
    """
    params: dict[str, dict[str, np.ndarray]] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for key, tensor in header.items():
            if key == "__metadata__":
                continue
            model, name = key.split(SEPARATOR, 1)
            start, end = tensor["data_offsets"]
            if tensor["dtype"] != "F32" or not 0 <= start <= end <= len(data):
                raise ValueError(f"{key} is not float32, or outside of the file")
            params.setdefault(model, {})[name] = data[start:end].view(np.float32).reshape(tensor["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): export the bundle again") from error
    return params
