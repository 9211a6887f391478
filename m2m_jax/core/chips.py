"""What a TPU chip can do at most, as Google publishes it, and GPUs as NVIDIA does.

Sources, read in November 2026: Cloud TPU documentation, "System architecture" of each chip (cloud.google.com/tpu/docs
/v5e, /v6e and /tpu7x; the last has a table of v5p, v6e and tpu7x, which is followed where pages round differently).
v4: "TPU v4: An Optically Reconfigurable Supercomputer" (arXiv 2304.01433), table 4, which says nothing of the
data-centre network.

Memory is what the compiler of libtpu 0.0.42.1 says is available to a program ("exceeds available HBM (15.75G)"), not
the 32, 16, 95, 32 and 192 GiB of the documentation, of which some is reserved (and v5p has more).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from m2m_jax.core.errors import UserError

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's limits, a second and whole chip each.

    Attributes:
      flops: peak, in bfloat16.
      hbm: bytes of memory that a program can have.
      hbm_bandwidth: bytes.
      ici_bandwidth: bytes that it sends over all of its links to neighbouring chips together. Documentation counts
        both directions: this is half.
      dcn_bandwidth: bytes that it sends over the data-centre network; None: not published.
      options: of `get_topology_desc`.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    options: tuple[tuple[str, str], ...] = ()

    def share(self, parts: int) -> Chip:
        """Return what each of `parts` devices on one chip has of it."""
        fields: dict[str, Any] = {
            name: value / parts for name, value in dataclasses.asdict(self).items() if isinstance(value, int | float)
        }
        return dataclasses.replace(self, **fields)


CHIPS: dict[str, Chip] = {
    # megacore: both cores as one device, which is how v4 is used.
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 6 * 50e9, None, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 400e9 / 2, 6.4e12 / 8 / 256),  # the network of a pod of 256, shared
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 1200e9 / 2, 50e9 / 8),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 800e9 / 2, 100e9 / 8),
    "tpu7x": Chip(2307e12, 2 * 94.75 * GIB, 7380e9, 1200e9 / 2, 100e9 / 8),
}

# What JAX calls their devices.
KINDS: dict[str, str] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# What a program can have of a GPU's memory is 0.92 of it, as core/runtime.py sets it. Links: NVLink, of the L4
# PCIe. The network: one adapter a GPU, as in NVIDIA's own machines.
GPUS: dict[str, Chip] = {
    "a100": Chip(312e12, 0.92 * 80 * GIB, 2039e9, 600e9 / 2, 200e9 / 8),  # SXM, 80 GB
    "h100": Chip(989e12, 0.92 * 79.6 * GIB, 3350e9, 900e9 / 2, 400e9 / 8),  # SXM; the PCIe card and the NVL are slower
    "h200": Chip(989e12, 0.92 * 140.4 * GIB, 4800e9, 900e9 / 2, 400e9 / 8),
    "b200": Chip(2250e12, 0.92 * 178.3 * GIB, 8000e9, 1800e9 / 2, 400e9 / 8),
    "l4": Chip(121e12, 0.92 * 22.5 * GIB, 300e9, 64e9 / 2, None),
}
# Beginning of what JAX calls them.
GPU_KINDS: dict[str, str] = {
    "NVIDIA A100": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Return FLOPs a second of one of these devices, which are alike, in bfloat16; None: they are not in the tables."""
    kind = devices[0].device_kind
    if kind in KINDS:
        chips = {tuple(device.coords) for device in devices}
        return CHIPS[KINDS[kind]].flops * len(chips) / len(devices)
    # Not a part of one (MIG), and "NVIDIA L4" is no L40.
    whole = [name for name in GPU_KINDS if f"{kind} ".replace("-", " ").startswith(f"{name} ") and "MIG" not in kind]
    return GPUS[GPU_KINDS[whole[0]]].flops if whole else None


def gpus_of(topology: str) -> tuple[Chip, int] | None:
    """Return the GPU of a topology's name and how many a node has ("h100:8"); None: it is no GPU's."""
    name, _, count = topology.partition(":")
    if name not in GPUS:
        return None
    if not count.isdecimal() or not int(count):
        raise UserError(f"--topology={topology}: say how many a node has, for example {name}:8")
    return GPUS[name], int(count)


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology's name ("v5p:4x4x4"). Raises UserError where there is none of it in the table."""
    name, _, shape = topology.partition(":")
    if name in CHIPS and shape:
        return CHIPS[name]
    known = f"the chips are {', '.join([*CHIPS, *GPUS])}, for example --topology=v5p:4x4x4, or h100:8"
    if name in CHIPS:
        raise UserError(f"--topology={topology} says nothing of how many chips; {known}")
    near = difflib.get_close_matches(name.lower(), [*CHIPS, *GPUS], 1)
    raise UserError(f"--topology={topology} is unknown{f'; did you mean {near[0]}?' if near else ''}; {known}")
