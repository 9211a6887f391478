"""Read state dicts that torch saved before version 1.6 (no zip), without torch and without running what they name.

The layout: three pickles (magic number, protocol, system), one of the dict, whose tensors name their storages, one with
the list of the storages' keys, and then of each its number of elements and its raw values. The pickles are not
unpickled: `pickletools` says what stands in them, and a small interpreter here follows those operations that a dict of
tensors is made of. It imports nothing, calls nothing and takes no memory that the file does not fill.
"""

import math
import pickletools
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m2m_jax.core.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}
# The names that a state dict is made of; any other is refused.
_ORDERED_DICT, _REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_NAMES = (_ORDERED_DICT, _REBUILD, *(f"torch {storage}" for storage in _DTYPES))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Tensor(tuple):
    """(storage key, offset, shape, strides) of a tensor, in elements."""


class _Name(str):
    """What a pickle calls by module and name."""


class _Mark:
    """Where a list of arguments begins on the stack."""


class _Reader:
    """Read one pickle after another. storages: key -> dtype and number of elements, of those that were named."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.storages: dict[str, tuple[str, int]] = {}

    def read(self) -> Any:
        """Read the value of the next pickle. Raises ValueError and others where it is none of a state dict's."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            at = max(i for i, one in enumerate(stack) if isinstance(one, _Mark))
            items = stack[at + 1 :]
            del stack[at:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(self._file):
            name = opcode.name
            if name in ("PROTO", "STOP"):
                continue
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _TUPLES:
                count = _TUPLES[name]
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            elif name == "MARK":
                stack.append(_Mark())
            elif name == "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "SETITEMS" or name == "SETITEM":
                items = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
                _require(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            elif name == "APPENDS" or name == "APPEND":
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                _require(stack[-1], list).extend(items)
            elif name == "BUILD":
                stack.pop()  # what torch writes beside the dict: versions of modules
            elif name == "GLOBAL":
                if argument not in _NAMES:
                    raise ValueError(f"it asks for {argument}")
                stack.append(_Name(argument))
            elif name == "REDUCE":
                arguments, function = _require(stack.pop(), tuple), _require(stack.pop(), _Name)
                stack.append(_made(function, arguments))
            elif name == "BINPERSID":
                stack.append(self._storage(_require(stack.pop(), tuple)))
            else:
                raise ValueError(f"it has the operation {name}")
        (value,) = stack
        return value

    def _storage(self, named: tuple) -> str:
        kind, storage, key, _, count = named[:5]
        dtype = _DTYPES[_require(storage, _Name).removeprefix("torch ")]
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage of unknown kind")
        self.storages[key] = (dtype, count)
        return key


def _require(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value


def _made(function: str, arguments: tuple) -> Any:
    """Return what the two calls of a state dict give."""
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _REBUILD:
        storage, offset, shape, strides = arguments[:4]
        return _Tensor((storage, offset, tuple(shape), tuple(strides)))
    raise ValueError(f"a call of {function}")


def read_legacy_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Read a state dict: name -> array, of its own dtype.

    Raises UserError where the file is missing, damaged, of another format, or holds anything but whole tensors.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            reader = _Reader(file)
            if reader.read() != _MAGIC:
                raise ValueError("no magic number")
            reader.read(), reader.read()  # protocol, system
            tensors, keys = reader.read(), reader.read()
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
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is no state dict in torch's old format, or is damaged ({error!r:.120})") from error


def _tensor(name: str, tensor: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{name} is no tensor")
    key, offset, shape, strides = tensor
    # Axes may lie in any order (a kernel transposed from TensorFlow's), but without gaps.
    if len(strides) != len(shape):
        raise ValueError(f"{name} has {len(shape)} axes and {len(strides)} strides")
    order = sorted(range(len(shape)), key=lambda axis: (strides[axis], shape[axis] == 1), reverse=True)
    stored = [shape[axis] for axis in order]
    dense = [math.prod(stored[at + 1 :]) for at in range(len(order))]
    if any(strides[axis] != step for axis, step in zip(order, dense, strict=True) if shape[axis] != 1):
        raise ValueError(f"{name} has gaps or overlaps")
    flat = values[key][offset : offset + math.prod(shape)]
    return np.ascontiguousarray(flat.reshape(stored).transpose(np.argsort(order)))
