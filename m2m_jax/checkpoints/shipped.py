"""M2M models that ship: a U-Net's folder in diffusers' layout that says all that sampling needs to know.

    FOLDER/config.json, diffusion_pytorch_model.safetensors, scheduler_config.json    the U-Net and its schedule
    FOLDER/m2m.json                                                                   the run's config; frozen models

Frozen models are not in it: m2m.json names their folders, relative to FOLDER, and the fingerprints of their parameters.
So models share one first stage, and a run with `config.init.path=FOLDER` starts from it like from any U-Net.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2m_jax.configuration import from_json
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, fingerprint
from m2m_jax.models import diffusers_folder
from m2m_jax.models.folder import config_from, read_json, require_same
from m2m_jax.models.frozen import FrozenModels, FrozenParams
from m2m_jax.models.unet import unet_structure
from m2m_jax.models.unet_config import UNetConfig, with_todays_names

FILE = "m2m.json"
FORMAT = 1


def is_shipped(folder: Path) -> bool:
    """Tell whether a folder holds such a model."""
    return (folder / FILE).is_file()


def describe(folder: Path, metadata: Mapping[str, Any], step: int) -> None:
    """Write m2m.json beside a U-Net.

    Args:
      metadata: of the checkpoint that the U-Net is from.
      step: of that checkpoint.
    """
    config = copy.deepcopy(metadata["config"])
    for name in metadata["sha256"]:
        config[name]["path"] = os.path.relpath(config[name]["path"], folder)
    values = {"format": FORMAT, "step": step, "sha256": metadata["sha256"], "unet": metadata["unet"], "config": config}
    disk.write(folder / FILE, f"{json.dumps(values, indent=1)}\n".encode())


def load_shipped(folder: Path) -> tuple[dict[str, Any], Params, FrozenParams, int]:
    """Return (metadata, parameters, frozen parameters, step), as a checkpoint has them; in NumPy.

    Raises:
      UserError: m2m.json is damaged or of other code, or a frozen model is not there, or is another than in training.
    """
    values = read_json(folder / FILE)
    if values.get("format") != FORMAT:
        raise UserError(f"{folder / FILE} has format {values.get('format')!r:.40}; this code reads format {FORMAT}")
    try:
        config, step, digests = from_json(values["config"]), range(2**31)[values["step"]], dict(values["sha256"])
        for name in digests:
            group = getattr(config, name)
            group.path = os.path.normpath(folder / group.path)
        unet = config_from(UNetConfig, with_todays_names(values["unet"]), {})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / FILE} is damaged ({error!r:.200}): get the folder again") from error
    models, frozen = FrozenModels.load(config)
    for name, of_model in frozen.items():
        if fingerprint(of_model) != digests.get(name):
            path = getattr(config, name).path
            raise UserError(f"{folder} was trained on another {name} than that in {path}: name its own there")
    params = diffusers_folder.load_params(folder)
    require_same(folder, unet_structure(unet)[1], params)
    metadata = {"config": values["config"], "unet": values["unet"], "frozen": models.metadata, "sha256": digests}
    return metadata, params, frozen, step
