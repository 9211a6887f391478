"""How many bytes a compiled program reads from HBM and writes to it. No JAX.

XLA's own count ("bytes accessed") is of arrays wherever they lie. A TPU's compiler fetches weights and small
activations into the memory of the core ahead of use, and XLA counts each such fetch several times, and the use again:
half as much again as goes through HBM, and the bound on MFU that followed was none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from m2m_jax.planning.hlo import Array, Computation, Instruction, Program

# What moves nothing: names for what is there, and ends of what was counted where it began.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "add-dependency", "send", "send-done", "recv", "recv-done"),
}
_PARTS = ("slice", "dynamic-slice", "gather")  # read of their first operand what they result in


def hbm_bytes(program: Program) -> float:
    """Return the bytes of one run: of what lies in HBM, each time that an instruction reads or writes it.

    Of an operand that is sliced, the slice; of what is updated in place, the update. A loop counts as often as it runs,
    a conditional by the branch that moves more. A kernel reads its operands once, which is a lower bound.
    """

    @functools.cache
    def of_computation(name: str) -> float:
        computation = program.computations.get(name, Computation())
        return sum(of_instruction(one, computation) for one in computation.instructions)

    def of_instruction(one: Instruction, computation: Computation) -> float:
        called = one.called
        if one.opcode == "while":
            return program.trips(one) * (of_computation(called["body"]) + of_computation(called["condition"]))
        if one.opcode == "conditional":
            return max(map(of_computation, one.branches), default=0.0)
        if one.opcode == "call":
            return of_computation(called["to_apply"])
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
        if one.opcode.endswith("-start"):
            return _of_start(one, operands)
        inner = program.computations.get(called.get("calls", "")) if one.opcode == "fusion" else None
        if inner is not None:
            return _of_fusion(one, operands, inner)
        if one.opcode in _PARTS:
            return _in_hbm(operands[0].arrays, one.bytes) + _in_hbm(one.arrays)
        if one.opcode == "dynamic-update-slice":
            return _in_hbm(operands[1].arrays) + _in_hbm(one.arrays, operands[1].bytes)
        return _read(operands) + _in_hbm(one.arrays)

    return of_computation(program.entry)


def _in_hbm(arrays: Iterable[Array], most: float = float("inf")) -> float:
    """Return the bytes of the arrays that lie in HBM, counting of each at most a limit."""
    return sum(min(array.bytes, most) for array in arrays if array.in_hbm)


def _read(operands: list[Instruction]) -> float:
    return sum(_in_hbm(value.arrays) for value in operands)


def _of_start(one: Instruction, operands: list[Instruction]) -> float:
    """Return the bytes of an asynchronous copy or slice: (to, from, and what it is waited for by); or a collective."""
    if one.opcode.startswith(("copy", "slice", "dynamic-slice")):
        ends = sorted(one.arrays, key=lambda array: -array.bytes)[:2]
        return _in_hbm(ends, ends[-1].bytes)
    # The shape has the results, and of most kinds the operands.
    read = _read(operands) if one.opcode.startswith("all-reduce") else 0.0
    return read + _in_hbm(one.arrays)


def _of_fusion(one: Instruction, operands: list[Instruction], inner: Computation) -> float:
    users: dict[str, list[Instruction]] = {}
    for user in inner.instructions:
        for name in user.operands:
            users.setdefault(name, []).append(user)

    def reads(value: Instruction) -> float:
        """Return the bytes that the fusion needs of one of its parameters."""
        total = 0.0
        for user in users.get(value.name, ()):
            if user.opcode == "bitcast":
                total += reads(user)
            elif user.opcode in _PARTS and user.operands[0] == value.name:
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
                return value.bytes
        return min(total, value.bytes)

    parameters = [value for value in inner.instructions if value.opcode == "parameter"]
    number = {int(value.rest.partition(")")[0]): value for value in parameters}
    read = sum(_in_hbm(value.arrays, reads(number[i])) for i, value in enumerate(operands) if i in number)
    return read + sum(
        _in_hbm([array], _written(value, inner)) for array, value in zip(one.arrays, _results(inner), strict=False)
    )


def _results(inner: Computation) -> list[Instruction]:
    root = next(value for value in inner.instructions if value.is_root)
    return [inner.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(value: Instruction, inner: Computation) -> float:
    """Return the bytes of a result that a fusion writes: where it updates an array in place, those of the update."""
    while value.opcode == "bitcast" and value.operands[0] in inner.by_name:
        value = inner.by_name[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
        return inner.by_name[value.operands[1]].bytes
    return float("inf")
