"""Read checkpoints: what is in one, and all of it that sampling needs. `checkpointer.py` writes them, and says how.

Processes that JAX joined must restore together: Orbax has them wait for each other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from m2m_jax.checkpoints import checksums
from m2m_jax.checkpoints.shipped import is_shipped, load_shipped
from m2m_jax.core.errors import UserError, one_line
from m2m_jax.core.parameters import Params
from m2m_jax.models.frozen import AUTOENCODER, IMAGE_ENCODER, TEXT_ENCODER, FrozenParams
from m2m_jax.models.trained import PARAMETERS

FORMAT = 1  # of names and shapes in a checkpoint: one more where what an earlier code saved can no longer be read
FOLDER = "checkpoints"
STATE, EMA, ABOUT = "train_state", "ema", "about"
PARAMS = "params."  # begins the names of the parameters in the train state
ARRAYS = (STATE, EMA, AUTOENCODER, IMAGE_ENCODER, TEXT_ENCODER)


class SavedModel(NamedTuple):
    """What sampling needs of a checkpoint."""

    metadata: dict[str, Any]
    ema_params: Params
    frozen: FrozenParams
    step: int


def load_for_sampling(path: str | Path, step: int | None = None) -> SavedModel:
    """Return the averaged parameters and the frozen models, on the first local device.

    Parameters that do not train have no average: they are those of the train state. Nothing else is read.

    Args:
        path: WORKDIR, WORKDIR/checkpoints or WORKDIR/checkpoints/STEP, or a model that ships (`shipped.py`).
        step: which checkpoint; the latest if None.

    Raises:
        UserError: the folder is missing, or has no checkpoint (of that step), or it is damaged. An older one is not
            used in its place.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {path}; give the --workdir of a training run")
    if is_shipped(folder):
        found = SavedModel(*load_shipped(folder))
        return found._replace(step=choose(folder, [found.step], step))
    if (folder / FOLDER).is_dir():
        folder /= FOLDER
    elif folder.name.isdecimal() and folder.parent.name == FOLDER:
        folder, step = folder.parent, int(folder.name)
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir()]
    step = choose(folder, steps, step)
    if jax.process_count() > 1:  # a run may save while they look
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))

    def require(items: Sequence[str]) -> None:
        if found := checksums.damage(folder / str(step), items):
            others = (folder / str(other) for other in sorted(steps, reverse=True) if other != step)
            other = next((other for other in others if (other / checksums.FILE).exists()), None)
            remedy = f"another is {other}: name it as the checkpoint" if other else "there is no other"
            raise UserError(f"the checkpoint {folder / str(step)} is damaged: {found}; {remedy}")

    require((ABOUT,))
    about = read_about(folder, step)
    items = [name for name in ARRAYS if name in about["items"] and name != STATE]
    require(items)
    restored = {name: _restore_on_one_device(folder / str(step), name) for name in items}
    averages = restored.pop(EMA)
    config = about["metadata"].get("config", {})
    trained = PARAMETERS.choose(config.get("train", {}).get("parameters", "all"))
    fixed = {}
    if trained is not PARAMETERS["all"]:
        require((STATE,))
        params = _restore_on_one_device(folder / str(step), STATE, PARAMS, averages)
        fixed = {name.removeprefix(PARAMS): value for name, value in params.items()}
    return SavedModel(about["metadata"], trained.effective(fixed, averages), restored, step)


def _restore_on_one_device(folder: Path, item: str, prefix: str = "", but: Container[str] = ()) -> Params:
    """Return those arrays of an item whose names begin with a prefix, on the first local device.

    Args:
      but: names, without the prefix, that are left out.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in saved_leaves(folder, item).items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in but
    }
    return restore(folder, item, target) if target else {}  # all train, and have averages


def choose(folder: Path, steps: Sequence[int], step: int | None) -> int:
    if not steps:
        raise UserError(f"{folder} holds no checkpoint; train until one is saved, or give another folder")
    if step is None:
        return max(steps)
    if step not in steps:
        raise UserError(f"{folder} holds no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps)))}")
    return step


def read_about(folder: Path, step: int) -> dict[str, Any]:
    """Return the item "about" of a checkpoint. Raises UserError for one of another format."""
    about = json.loads((folder / str(step) / ABOUT / "metadata").read_text(encoding="utf-8"))
    found = about.get("format", 1)  # at first it was not said
    if found != FORMAT:
        by = about.get("code", "an early version")
        remedy = "check that code out to go on with it or to sample; a run of another --workdir can start from it"
        how = "`python -m m2m_jax.to_diffusers` there writes the folder that --config.init.path names here"
        raise UserError(
            f"the checkpoint {folder / str(step)} has format {found}, of m2m_jax {by}, and this code reads format "
            f"{FORMAT}: {remedy}: {how}"
        )
    return about


def saved_leaves(folder: Path, item: str) -> dict[str, Any]:
    """Return {name: metadata with shape and dtype} of one item."""
    with _unreadable(folder, item):
        return dict(ocp.StandardCheckpointHandler().metadata(folder / item).items())


def restore(folder: Path, item: str, target: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays of an item that `target` names, placed as it says."""
    arguments = ocp.args.PyTreeRestore(
        dict(target), restore_args=ocp.checkpoint_utils.construct_restore_args(dict(target)), partial_restore=True
    )
    with _unreadable(folder, item), ocp.PyTreeCheckpointer() as reader:
        return dict(reader.restore(folder / item, args=arguments))


@contextlib.contextmanager
def _unreadable(folder: Path, item: str) -> Iterator[None]:
    """Raise UserError where files that are whole cannot be read: the disk fails, or another run removes them."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read ({item}: {one_line(error)}); try again, or an older one"
        ) from error
