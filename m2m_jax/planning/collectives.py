"""The collectives of a compiled program, and what they send. No JAX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from m2m_jax.planning.hlo import Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

_COLLECTIVE = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start)?")
# Between slices, devices send to their host, whose runtime does the rest.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# The devices of a mesh: [dims]T(order), and what they are arranged in, which no group asks for, may stand before it.
_TRANSPOSED = re.compile(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?)\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"['\"]?([\w.\-]+)['\"]?(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective between the same devices, of a step.

    Attributes:
      count: how often it runs in a step.
      ici_bytes, dcn_bytes: that one device sends in a step, over links within a slice and between slices.
    """

    kind: str
    group_size: int
    slices: int
    count: int
    ici_bytes: float
    dcn_bytes: float


class _Transfer(NamedTuple):
    kind: str
    bytes: float  # of the result
    groups: tuple[tuple[int, ...], ...]  # of a transfer between slices: none
    channel: int | None


def collectives(program: Program, slice_of_device: Sequence[int]) -> list[Collective]:
    """Return all collectives of a compiled program, the same ones added up, those of most bytes first.

    An asynchronous collective that stands in several fusions, which all bear its channel, counts once. What is in a
    loop counts as often as the loop runs, where its condition says how often, and else once.

    Args:
      slice_of_device: the slice of each device, in the order of the mesh.
    """
    found: dict[tuple[str, int, int], list[float]] = {}
    seen: set[tuple] = set()
    num_slices = len(set(slice_of_device))
    for transfer, times in _transfers(program, len(slice_of_device), num_slices):
        # Numbers of channels are not unique among kinds, and transfers between slices have numbers of their own.
        key = transfer.kind, bool(transfer.groups), transfer.channel
        if transfer.channel is not None and key in seen:
            continue
        seen.add(key)
        groups = transfer.groups
        size = max(map(len, groups)) if groups else num_slices
        spanned = max(len({slice_of_device[i] for i in group}) for group in groups) if groups else num_slices
        ici, dcn = _sent(transfer.kind, transfer.bytes, size, spanned)
        total = found.setdefault((transfer.kind, size, spanned), [0, 0.0, 0.0])
        for i, value in enumerate((1, ici, dcn)):
            total[i] += times * value
    rows = [Collective(kind, size, spanned, int(n), ici, dcn) for (kind, size, spanned), (n, ici, dcn) in found.items()]
    return sorted(rows, key=lambda row: -(row.ici_bytes + row.dcn_bytes))


def wire_bytes(kind: str, result: float, size: int) -> float:
    """Return the bytes that each of `size` devices sends at least, for a collective with `result` bytes a device.

    Of ring algorithms, which send no byte more than must be sent.
    """
    if size == 1:
        return 0.0
    return result * {
        "all-gather": (size - 1) / size,
        "reduce-scatter": size - 1,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
    }.get(kind, 1.0)


def _sent(kind: str, result: float, size: int, slices: int) -> tuple[float, float]:
    """Return (bytes within a slice, bytes between slices) that one device sends.

    Between slices: each device of a slice carries its share, as XLA's hierarchical collectives do.
    """
    if slices == 1:
        return wire_bytes(kind, result, size), 0.0
    if slices == size:
        return 0.0, wire_bytes(kind, result, size)
    if kind in ("collective-permute", "collective-broadcast"):
        return 0.0, result
    within = size // slices
    share = result if kind == "reduce-scatter" else result / within
    return wire_bytes(kind, result, within), wire_bytes(kind, share, slices)


def _transfers(program: Program, num_devices: int, num_slices: int) -> Iterator[tuple[_Transfer, int]]:
    """Yield the transfers that run, and how often each does."""
    stack = [(program.entry, 1)]
    while stack:
        name, times = stack.pop()
        if name not in program.computations:
            continue
        # A TPU's reduce-scatter is a fusion of this name, of an all-reduce and a slice of it.
        scatters = name.startswith("all-reduce-scatter")
        for one in program.computations[name].instructions:
            if match := _COLLECTIVE.fullmatch(one.opcode):
                found = _transfer(one, match[1], bool(match[2]), num_devices)
                if scatters and found.kind == "all-reduce":
                    found = found._replace(kind="reduce-scatter", bytes=found.bytes / max(map(len, found.groups)))
                yield found, times
            elif one.opcode == "send" and (match := _BETWEEN_SLICES.search(one.rest)):
                yield _between_slices(one, match[1], num_slices), times
            called = one.called
            repeats = program.trips(one) if called.pop("condition", None) else 1
            stack += [(name, times * repeats) for name in [*called.values(), *one.branches]]


def _transfer(one: Instruction, kind: str, started: bool, num_devices: int) -> _Transfer:
    groups, size = _groups(one.rest, num_devices), one.bytes
    if started and kind == "all-gather":  # the shape is (operands, results)
        members = max(map(len, groups), default=1)
        size *= members / (members + 1)
    elif started and kind == "collective-permute":  # and two numbers of synchronisation, which are next to nothing
        size /= 2
    return _Transfer(kind, size, groups, _channel(one.rest))


def _between_slices(one: Instruction, kind: str, slices: int) -> _Transfer:
    kind = kind.lower().replace("_", "-")
    # What is sent is the operand, the first of the shape; `wire_bytes` is of the result.
    result = one.arrays[0].bytes * {"all-gather": slices, "reduce-scatter": 1 / slices}.get(kind, 1)
    return _Transfer(kind, result, (), _channel(one.rest))


def _channel(line: str) -> int | None:
    match = _CHANNEL.search(line)
    return int(match[1]) if match else None


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return which devices take part together, by number in the mesh. Raises ValueError for an unknown notation."""
    if match := _MESH.search(line):  # before the others: its devices may be in the notation of one of them
        return _mesh_groups(*match.groups())
    if match := re.search(rf"replica_groups={_IOTA.pattern}", line):
        numbers, members = _iota(match[2], match[3]), int(match[1].rpartition(",")[2])
        return tuple(tuple(numbers[i : i + members]) for i in range(0, len(numbers), members))
    if match := _GROUPS.search(line):
        listed = re.findall(r"\{([\d,]+)\}", match[1] or "")
        return tuple(map(_numbers, listed)) or (tuple(range(num_devices)),)
    raise ValueError(
        f"m2m_jax/planning/collectives.py does not know the groups of this collective: {line.strip()[:300]}"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _iota(dims: str, order: str | None) -> list[int]:
    """Return the numbers of [dims]T(order): from 0 on, in an array of `dims`, transposed, flat."""
    sizes = _numbers(dims)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    numbers = [0]
    for axis in _numbers(order) if order else range(len(sizes)):
        numbers = [n + i * strides[axis] for n in numbers for i in range(sizes[axis])]
    return numbers


def _mesh_groups(axes: str, devices: str | None, grouped: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups of mesh['a'=2,'b'=8] {'b':(2)4}: axes that vary in a group, or parts: (size before it)size."""
    named = [axis.split("=") for axis in axes.split(",")]
    names, sizes = [name.strip(" '\"") for name, _ in named], [int(size) for _, size in named]
    numbers = list(range(math.prod(sizes)))
    if devices and (iota := _TRANSPOSED.match(devices + ")")):
        numbers = _iota(*iota.groups())
    elif devices:
        numbers = list(_numbers(devices))
    groups: dict[int, list[int]] = {}
    for position, number in enumerate(numbers):
        key = position
        for name, before, size in _MESH_AXIS.findall(grouped):
            axis = names.index(name)
            size = int(size or sizes[axis])
            stride = math.prod(sizes[axis:]) // (int(before or 1) * size)
            key -= position // stride % size * stride
        groups.setdefault(key, []).append(number)
    return tuple(map(tuple, groups.values()))
