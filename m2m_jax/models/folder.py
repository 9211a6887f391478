"""Model folders as the torch libraries write them: `config.json` beside safetensors (in several files, too).

Here is what all such folders share; what the fields of a model's `config.json` mean stands in `diffusers_folder.py`
and `transformers_folder.py`. Parameter names are the torch library's but for the leaf (`kernel`, `scale`, `embedding`
here, `weight` there) and a few renamed paths; convolutions are HWIO here and OIHW there, linear layers are transposed.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.field_types import described, is_of
from m2m_jax.core.parameters import Params


@dataclasses.dataclass(frozen=True)
class Format:
    """How a torch library names things.

    Attributes:
      library: for messages.
      weights: file name of the safetensors.
      renamed: (part of a name here, part of a name there), where more than the leaf differs.
      formerly: likewise, of names that older versions of the library wrote and it still reads.
    """

    library: str
    weights: str
    renamed: tuple[tuple[str, str], ...]
    formerly: tuple[tuple[str, str], ...] = ()


def read_config(folder: str | Path, library: str) -> dict[str, Any]:
    """The fields of `config.json`. Raises UserError where there is none, or no JSON object in it."""
    return read_json(Path(folder) / "config.json", f"{folder} is not a {library} model folder")


def read_json(path: Path, otherwise: str = "a part of the model is missing") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none; otherwise: what that means."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {otherwise}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: {otherwise}")
    return values


def config_from(cls, values: Mapping[str, Any], renamed: Mapping[str, str], **overrides):
    """A config dataclass from the fields of a `config.json`.

    Args:
      renamed: {field here: field there}, where they differ. Fields that `values` lacks keep their default.
      overrides: replace fields, whatever `values` says.

    Raises:
      UserError: a value is of another type than its field.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{cls.__name__} is described by a JSON object, not by {values!r:.60}")
    fields, types = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = renamed.get(field.name, field.name)
        if name in values and field.name not in overrides:
            value = values[name]
            value = tuple(value) if isinstance(value, list) else value
            if not is_of(value, types[field.name]):
                kind = described(types[field.name])
                raise UserError(f"{cls.__name__}: {name} is {values[name]!r:.60}; it takes {kind}")
            fields[field.name] = value
    return cls(**(fields | overrides))


def load_config(cls, folder: str | Path, values: Mapping[str, Any], renamed: Mapping[str, str], **overrides):
    """`config_from` what `read_config` read, with the folder's name in its errors."""
    try:
        return config_from(cls, values, renamed, **overrides)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error


def require_fixed(folder: str | Path, values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises UserError where a field of `config.json` has another value than the one that is implemented."""
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise UserError(f"{folder}/config.json has {name}={values[name]!r}; only {value!r} is implemented")


def load_params(folder: str | Path, form: Format) -> Params:
    """All parameters of a folder under this project's names, as float32 NumPy arrays.

    Raises:
      UserError: no safetensors there, or damaged ones. Pickled weights are never opened.
    """
    folder = Path(folder)
    index = folder / f"{form.weights}.index.json"
    files = [folder / form.weights]
    if index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: it has no weight_map of file names") from error
        for file in files:
            if file.parent != folder or file.name == "..":
                raise UserError(f"{index} names {file}, which lies outside its folder")
    params = {}
    for file in files:
        if not file.is_file():
            variants = sorted(p.name for p in folder.glob(f"{file.stem}.*{file.suffix}"))
            pickled = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
            remedy = ""
            if variants:
                remedy = f"; there is {variants[0]}, a variant: rename it to {file.name}"
            elif pickled:
                remedy = (
                    f"; {pickled[0]} is pickled and is not opened, for it could run code: load it with {form.library} "
                    "where that does no harm, and save it again, which writes safetensors"
                )
            raise UserError(f"no weights at {file}{remedy}")
        try:
            with safe_open(file, framework="np") as tensors:
                for torch_name in tensors.keys():  # noqa: SIM118 (no mapping)
                    name, value = from_torch(torch_name, tensors.get_tensor(torch_name), form)
                    params[name] = value
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}") from error
    return params


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Every parameter of `found` that is missing, unexpected or of another shape, in words."""
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name].shape}, should be {expected[name].shape}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    return sorted(problems)


def require_same(folder: str | Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises UserError with the first of the `differences`."""
    problems = differences(expected, found)
    if problems:
        raise UserError(f"{folder} does not hold this model: {first_of(problems)}")


def first_of(problems: list[str]) -> str:
    """Some of them, and how many more there are."""
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


def save_folder(folder: str | Path, values: dict[str, Any], params: Params, dtype, form: Format) -> None:
    """Writes `config.json` and one safetensors file. `dtype`: what the weights are stored in."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_to_torch(name, np.asarray(x).astype(dtype), form) for name, x in params.items())
    with disk.new_file(folder / form.weights) as aside:
        aside.touch()
        mode = aside.stat().st_mode
        save_file(tensors, aside, metadata={"format": "pt"})
        aside.chmod(mode)  # safetensors lets nobody else read it
    disk.write(folder / "config.json", f"{json.dumps(values, indent=2)}\n".encode())


def _to_torch(name: str, value: np.ndarray, form: Format) -> tuple[str, np.ndarray]:
    for ours, theirs in form.renamed:
        name = name.replace(ours, theirs)
    stem, _, leaf = name.rpartition(".")
    if leaf == "kernel":
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    if leaf in ("kernel", "scale", "embedding"):
        name = f"{stem}.weight"
    return name, np.ascontiguousarray(value)


def from_torch(name: str, value: np.ndarray, form: Format) -> tuple[str, np.ndarray]:
    """A parameter of a torch model under this project's name, in its layout, float32."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight" and stem.endswith(("_embedding", "_embeddings")):
        name = f"{stem}.embedding"
    elif leaf == "weight":
        name = f"{stem}.scale" if value.ndim == 1 else f"{stem}.kernel"
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    for ours, theirs in form.renamed + form.formerly:
        name = name.replace(theirs, ours)
    return name, np.ascontiguousarray(value, np.float32)
