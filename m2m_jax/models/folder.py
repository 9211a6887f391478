"""Model folders as the torch libraries write them: `config.json` beside safetensors (in several files, too).

Here is what all such folders share; what the fields of a model's `config.json` mean stands in `diffusers_folder.py`
and `transformers_folder.py`. Parameter names are the torch library's but for the leaf (`kernel`, `scale`, `embedding`
here, `weight` there) and a few renamed paths; convolutions are HWIO here and OIHW there, linear layers are transposed.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.field_types import described, is_of
from m2m_jax.core.parameters import Params

# How safetensors names what numbers are stored as: those that are read, and what the names of counted ones end with.
FLOATS, COUNTED = ("F64", "F32", "F16", "BF16"), ("position_ids", "num_batches_tracked")


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
    """Return the fields of `config.json`. Raises UserError where there is none, or no JSON object in it."""
    return read_json(Path(folder) / "config.json", f"{folder} is not a {library} model folder")


def read_json(path: Path, otherwise: str = "a part of the model is missing") -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError where there is none; otherwise: what that means."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin a file with a mark
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
    """Return a config dataclass from the fields of a `config.json`.

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
    """Return `config_from` of what `read_config` read, with the folder's name in its errors."""
    try:
        return config_from(cls, values, renamed, **overrides)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error


def require_fixed(folder: str | Path, values: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    """Raise UserError where a field of `config.json` has none of the values that mean what is implemented.

    Args:
      fixed: {field: its values}, the first of which the error names.
    """
    for name, known in fixed.items():
        if name in values and values[name] not in known:
            raise UserError(f"{folder}/config.json has {name}={values[name]!r:.60}; only {known[0]!r} is implemented")


def one_for_all(folder: str | Path, values: Mapping[str, Any], names: Iterable[str], length: int) -> dict[str, Any]:
    """Return the fields of a `config.json` with one value in the place of a list of equal ones (by level, by axis).

    Raises UserError for a list with different values, or of another length.
    """
    values = dict(values)
    for name in names:
        value = values.get(name)
        if not isinstance(value, list):
            continue
        if len(value) != length or any(item != value[0] for item in value):
            raise UserError(f"{folder}/config.json has {name}={value!r:.60}; {length} equal values are implemented")
        values[name] = value[0]
    return values


def load_params(folder: str | Path, form: Format) -> Params:
    """Return all parameters of a folder under this project's names, as float32 NumPy arrays.

    The weights of the library's default name are read, in one file or in several under an index; where there are none,
    the only variant that is there (fp16, say).

    Raises:
      UserError: there are no safetensors, or damaged ones, or numbers that are not plain floats. Pickled weights are
        never opened.
    """
    params: Params = {}
    for file in _weight_files(Path(folder), form):
        try:
            with safe_open(file, framework="np") as tensors:
                for torch_name in tensors.keys():  # noqa: SIM118 (no mapping)
                    stored = tensors.get_slice(torch_name).get_dtype()
                    if stored not in FLOATS and not torch_name.endswith(COUNTED):
                        raise UserError(
                            f"{file} holds {torch_name} as {stored}: it is quantized, and only "
                            f"{', '.join(FLOATS)} are read; name the folder of the model before that"
                        )
                    name, value = from_torch(torch_name, tensors.get_tensor(torch_name), form)
                    params[name] = value
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    return params


def _weight_files(folder: Path, form: Format) -> list[Path]:
    """Return the safetensors of a folder. Raises UserError where there are none, or several to choose from."""
    weights, index = folder / form.weights, folder / f"{form.weights}.index.json"
    if index.exists():
        return _indexed(index)
    if weights.is_file():
        return [weights]
    stem, suffix = re.escape(weights.stem), re.escape(weights.suffix)
    names = sorted(path.name for path in folder.glob("*"))
    parts = [name for name in names if re.fullmatch(rf"{stem}.*-\d+-of-\d+.*{suffix}", name)]
    variants = [name for name in names if re.fullmatch(rf"{stem}\..+{suffix}", name) and name not in parts]
    variants += [name for name in names if re.fullmatch(rf"{stem}{suffix}\.index\..+\.json", name)]
    if len(variants) == 1:
        (variant,) = variants
        return _indexed(folder / variant) if variant.endswith(".json") else [folder / variant]
    remedy = ""
    pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if variants:
        remedy = f"; there are several variants, {' and '.join(variants)}: leave one of them in the folder"
    elif parts:
        remedy = f"; there is {parts[0]}, a part: copy {index.name}, which names all parts, from where that came from"
    elif pickled:
        remedy = (
            f"; {pickled[0]} is pickled and is not opened, for it could run code: load it with {form.library} "
            "where that does no harm, and save it again, which writes safetensors"
        )
    raise UserError(f"no weights at {weights}{remedy}")


def _indexed(index: Path) -> list[Path]:
    """Return the files of an index. Raises UserError where it is damaged, or names what is not there or elsewhere."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of file names")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or file.name == "..":
            raise UserError(f"{index} names {file}, which lies outside its folder")
        if not file.is_file():
            raise UserError(f"no weights at {file}, which {index.name} names: copy it from where that came from")
    return files


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return, in words, every parameter of `found` that is missing, unexpected or of another shape, of each in turn.

    A prefix that wrappers (torch.compile, DistributedDataParallel) put before all names is named first.
    """
    prefixes = {name.partition(".")[0] + "." if "." in name else "" for name in found}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if prefix and not any(name.startswith(prefix) for name in expected):
        bare = {name.removeprefix(prefix): x for name, x in found.items()}
        return [f"all names there begin with {prefix!r}: save them without it", *differences(expected, bare)]
    return in_turn(
        [f"missing {name}" for name in sorted(expected.keys() - found.keys())],
        [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())],
        [
            f"{name} is {found[name].shape}, should be {expected[name].shape}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape
        ],
    )


def in_turn(*kinds: Sequence[str]) -> list[str]:
    """Return the first of each kind, then the second of each, and so on: the first few show every kind."""
    return [text for group in itertools.zip_longest(*kinds) for text in group if text is not None]


def require_same(folder: str | Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise UserError with the first of the `differences`."""
    problems = differences(expected, found)
    if problems:
        raise UserError(f"{folder} does not hold this model: {first_of(problems)}")


def first_of(problems: list[str]) -> str:
    """Return some of them, and how many more there are."""
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


def save_folder(folder: str | Path, values: dict[str, Any], params: Params, dtype, form: Format) -> None:
    """Write `config.json` and one safetensors file. `dtype`: what the weights are stored in."""
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


def from_torch(name: str, value: np.ndarray, form: Format) -> tuple[str, Any]:
    """Return a parameter of a torch model under this project's name, in its layout, float32; still in NumPy."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight" and value.ndim == 2 and stem.endswith(("_embedding", "_embeddings")):
        name = f"{stem}.embedding"
    elif leaf == "weight":
        name = f"{stem}.scale" if value.ndim == 1 else f"{stem}.kernel"
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    for ours, theirs in form.renamed + form.formerly:
        name = name.replace(theirs, ours)
    return name, np.ascontiguousarray(value, np.float32)
