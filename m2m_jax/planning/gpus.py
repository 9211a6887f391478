"""GPUs that are not there: what XLA compiles for where `jax[cuda13]` is installed, on any machine.

XLA needs no GPU to compile for one, only a description of it (`targets/`, a file a chip). cuDNN's convolutions and
attention are in the program; nothing is autotuned, which only a GPU can be asked for.
"""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental import topologies

from m2m_jax.core.errors import UserError
from m2m_jax.core.runtime import has_cuda_plugin

TARGETS = Path(__file__).parent / "targets"


def can_compile(chip: str) -> bool:
    """Whether XLA can compile for this chip here: it is described, and JAX has its plugin for CUDA."""
    return (TARGETS / f"{chip}.txtpb").is_file() and has_cuda_plugin()


def gpu_devices(chip: str, per_node: int, nodes: int = 1) -> list[jax.Device]:
    """Return the devices of some nodes of GPUs, to compile for.

    Args:
      chip: a file in `targets/`: "h100".

    Raises:
      UserError: `can_compile` is false, or XLA refuses the description.
    """
    if not can_compile(chip):
        described = ", ".join(sorted(file.stem for file in TARGETS.glob("*.txtpb")))
        raise UserError(
            f"compiling for {chip} needs a description of it ({described} are there) and pip install -r "
            "requirements-cuda.txt, in an environment of its own"
        )
    text = (TARGETS / f"{chip}.txtpb").read_text()
    try:
        # The parts are partitions (of NVLink), hosts in each, and devices of each.
        topology = topologies.get_topology_desc(
            topology_name="", platform="cuda", target_config=text, topology=f"{nodes}x1x{per_node}"
        )
    except Exception as error:  # jaxlib's own, of several kinds
        raise UserError(f"XLA does not take the description of {chip}: {str(error).splitlines()[0]}") from error
    return list(topology.devices)
