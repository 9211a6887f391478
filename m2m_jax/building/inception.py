"""Inception-v3 in its FID form as a model folder, of the weights that pytorch-fid or torch-fidelity published."""

from pathlib import Path

from flax import nnx

from m2m_jax.building.torch_legacy import read_legacy_torch
from m2m_jax.core import disk
from m2m_jax.core.parameters import abstract, count
from m2m_jax.models.folder import COUNTED, from_torch, require_same
from m2m_jax.models.inception import FORMAT, PUBLISHED, Inception, InceptionConfig, save_inception


def prepare_inception(weights: Path, output: Path, config: InceptionConfig = PUBLISHED) -> int:
    """Write the folder, and return the number of parameters.

    Args:
      weights: a state dict in torch's old format, as `pt_inception-2015-12-05-6726825d.pth` is; nothing in it is run.

    Raises:
      UserError: the folder exists, or the file holds another network.
    """
    disk.require_new(output)
    state = {name: x for name, x in read_legacy_torch(weights).items() if not name.endswith(COUNTED)}
    params = dict(from_torch(name, x, FORMAT) for name, x in state.items())
    require_same(weights, abstract(lambda: Inception(config, rngs=nnx.Rngs(0)))[1], params)
    with disk.new_folder(output) as aside:
        save_inception(aside, params)
    return count(params)
