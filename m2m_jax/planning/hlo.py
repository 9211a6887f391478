"""The text of a compiled program, read: its computations, what calls what, and how often loops run. No JAX.

HLO's text is printed one instruction a line, computations from a line that ends in "{" to a line that begins with "}".
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

KERNEL = 'custom_call_target="tpu_custom_call"'

_SIZES = {"pred": 1, "bf16": 2} | {f"{kind}{bits}": bits / 8 for kind in "sufc" for bits in (2, 4, 8, 16, 32, 64, 128)}
_ARRAY = re.compile(r"([a-z]\w*?)\[([\d,]*)\](?:\{([^}]*)\})?")
# Of an array that lies elsewhere than in HBM: S(1) is the memory of a TPU's core, S(2) its flags.
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# In the shape, which stands before the name of the operation, neither names (%) nor strings occur.
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ([^%"]*?) ([a-z][\w\-]*)\((.*)')
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLED_SEVERAL = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}')
_CONSTANT = re.compile(r"(\d+)\)")
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


class Array(NamedTuple):
    """An array. bytes: without the padding of layouts. in_hbm: whether it lies there."""

    bytes: float
    in_hbm: bool


class Instruction(NamedTuple):
    """One line. shape: of an array or a tuple, as text; rest: the line from the operands on."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """Return the arrays of the result."""
        return [
            Array(_SIZES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n), not _ELSEWHERE.search(layout))
            for dtype, dims, layout in _ARRAY.findall(self.shape)
        ]

    @property
    def bytes(self) -> float:
        """Return the bytes of the result, wherever it lies."""
        return sum(array.bytes for array in self.arrays)

    @property
    def operands(self) -> list[str]:
        """Return the names of the operands."""
        return _OPERAND.findall(self.rest.partition(")")[0])

    @property
    def called(self) -> dict[str, str]:
        """Return {"calls" | "to_apply" | "body" | "condition": a computation}."""
        return dict(_CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        """Return the computations of which the instruction runs one, or that it runs side by side."""
        lists = _CALLED_SEVERAL.findall(self.rest)
        return [name.strip().lstrip("%") for names in lists for name in names.split(",")]


@dataclasses.dataclass
class Computation:
    """Instructions in their order."""

    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @property
    def trips(self) -> int:
        """Return how often a loop with this condition runs: jax.lax.scan counts from 0 to a constant. Else 1."""
        found = [one for one in self.instructions if one.opcode == "constant" and one.shape.startswith("s32[]")]
        compares = any(one.opcode == "compare" and "direction=LT" in one.rest for one in self.instructions)
        value = _CONSTANT.match(found[0].rest) if compares and len(found) == 1 else None
        return int(value[1]) if value else 1


class Program(NamedTuple):
    """All computations by name. entry: the name of the one that runs first."""

    entry: str
    computations: dict[str, Computation]

    def trips(self, loop: Instruction) -> int:
        """Return how often the body of a `while` runs, by XLA's own note or by its condition."""
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        condition = self.computations.get(loop.called.get("condition", ""))
        return condition.trips if condition else 1


def parse(text: str) -> Program:
    """Return the program that a text is of."""
    entry, computations, current = "", {}, Computation()
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            current.instructions.append(Instruction(name, shape, opcode, rest, bool(root)))
    return Program(entry, computations)


def kernel_calls(text: str) -> dict[str, int]:
    """Return {kind: calls in the program} of splash attention's kernels, of whose FLOPs XLA counts none.

    Kinds: "fwd", and of the backward pass "dq" (of queries) and "dkv" (of keys and values).
    Raises ValueError where there is another kernel.
    """
    calls = {"fwd": 0, "dq": 0, "dkv": 0}
    for line in text.splitlines():
        if KERNEL in line:
            kind = _SPLASH.search(line)
            if not kind:
                raise ValueError(f"what this kernel computes is not known: {line.strip():.200}")
            calls[kind[1]] += 1
    return calls


def kinds_of_kernels(text: str) -> dict[str, int]:
    """Return {what a device launches: how many stand in the program}, of a program for a GPU.

    "fusions" are kernels of XLA's own, "reductions" those of them that sum; "convolutions", "attentions" and "products"
    are calls of cuDNN and cuBLAS; "others" any other call.
    """
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    kinds = {"convolutions": "conv", "attentions": "fmha", "products": "cublas"}
    found = {kind: sum(word in call for call in calls) for kind, word in kinds.items()}
    fusions = re.findall(r"^ +(?:ROOT )?%?\S+ = .*? fusion\(.*$", text, re.MULTILINE)
    reductions = sum("reduce" in line.split(" = ")[0] or "/reduce_sum" in line for line in fusions)
    others = len(calls) - sum(found.values())
    return {"fusions": len(fusions), "reductions": reductions, **found, "others": others}
