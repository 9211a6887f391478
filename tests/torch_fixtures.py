"""Files in torch's format of before version 1.6, written without torch."""

import collections
import pickle
import struct
import sys
import types
from unittest import mock

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 2


def write_legacy(path, arrays):
    """Writes float32 arrays as torch.save wrote a state dict, and returns the path."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2():
        pass

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Storage:
        def __init__(self, key, count):
            self.key, self.count = key, count

    class Tensor:
        def __init__(self, storage, array):
            strides = tuple(stride // 4 for stride in array.strides)
            self.arguments = storage, 0, array.shape, strides, False, collections.OrderedDict()

        def __reduce__(self):
            return _rebuild_tensor_v2, self.arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            if isinstance(one, Storage):
                return "storage", torch.FloatStorage, one.key, "cpu", one.count, None
            return None

    tensors = {name: Tensor(Storage(str(i), x.size), x) for i, (name, x) in enumerate(arrays.items())}
    with open(path, "wb") as file, mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        for header in (MAGIC, 1001, {"little_endian": True}):
            pickle.dump(header, file, PROTOCOL)
        Pickler(file, PROTOCOL).dump(collections.OrderedDict(tensors))
        pickle.dump([str(i) for i in range(len(arrays))], file, PROTOCOL)
        for x in arrays.values():
            file.write(struct.pack("<q", x.size) + x.ravel("K").astype("<f4").tobytes())
    return path
