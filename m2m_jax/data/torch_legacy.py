"""Reads state dicts that torch saved before version 1.6 (no zip), without torch and without running what they name.

The layout: three pickles (magic number, protocol, system), one of the dict, whose tensors name their storages, one with
the list of the storages' keys, and then of each its number of elements and its raw values.
"""

import collections
import math
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m2m_jax.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}


class _Tensor(tuple):
    """(storage key, offset, shape, strides) of a tensor, in elements."""


class _Reader(pickle._Unpickler):
    """Knows the four names that a state dict is made of; any other is refused, so no code is run.

    Python's own reader and not the one in C, which takes memory for as many entries as a damaged file says.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, tuple[str, int]] = {}  # key -> dtype, number of elements

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, persistent_id: Any) -> str:
        kind, storage, key, _, count = persistent_id[:5]
        if kind != "storage" or storage not in _DTYPES or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of unknown kind")
        self.storages[key] = (_DTYPES[storage], count)
        return key


def _rebuild(storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor((storage, offset, tuple(shape), tuple(strides)))


def read_legacy_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict: name -> array, of its own dtype.

    Raises UserError where the file is missing, damaged, of another format, or holds anything but contiguous tensors.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            if _Reader(file).load() != _MAGIC:
                raise ValueError("no magic number")
            _Reader(file).load(), _Reader(file).load()
            reader = _Reader(file)
            tensors, keys = reader.load(), _Reader(file).load()
            values = {}
            for key in keys:
                dtype, expected = reader.storages[key]
                (count,) = struct.unpack("<q", file.read(8))
                if count != expected or not 0 <= count * np.dtype(dtype).itemsize <= size:
                    raise ValueError(f"storage {key} of {count} elements")
                values[key] = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)
        return {str(name): _tensor(name, tensor, values) for name, tensor in tensors.items()}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is no state dict in torch's old format, or is damaged ({error!r:.120})") from error


def _tensor(name: str, tensor: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{name} is no tensor")
    key, offset, shape, strides = tensor
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(a != b for a, b, n in zip(strides, contiguous, shape, strict=True) if n != 1):
        raise ValueError(f"{name} is not contiguous")
    flat = values[key][offset : offset + math.prod(shape)]
    return flat.reshape(shape).copy()
