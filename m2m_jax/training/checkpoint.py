"""Checkpoints: the only module that imports Orbax.

WORKDIR/checkpoints/STEP/ holds
    train_state   what resuming needs: step, parameters, optimizer state
    ema           what sampling needs: the averaged parameters, float32
    autoencoder   the frozen first stage, so that a checkpoint samples on its own (absent where there is none)
    image_encoder what encodes the context in M2M-DINO, likewise
    about         JSON: what the caller wants to be told later (its config), and which of the above there are

Every item is one flat dict {dotted name: array}. So a checkpoint knows nothing of Optax's or Flax's classes, the
EMA is restored without either, and names can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from m2m_jax.errors import UserError
from m2m_jax.models.frozen import AUTOENCODER, IMAGE_ENCODER, FrozenParams
from m2m_jax.models.parameters import Params
from m2m_jax.training.state import TrainState

FOLDER = "checkpoints"
_FROZEN = (AUTOENCODER, IMAGE_ENCODER)
_ARRAYS = ("train_state", "ema", *_FROZEN)
_ABOUT = "about"


class SavedModel(NamedTuple):
    """What sampling needs of a checkpoint."""

    metadata: dict[str, Any]
    ema_params: Params
    frozen: FrozenParams
    step: int


class Checkpointer:
    """Saves in the background and restores the train state, in WORKDIR/checkpoints.

    `wait` or `close` before another program reads, or another Checkpointer of the same folder saves.
    """

    def __init__(self, workdir: str | Path, keep: int):
        """keep: the newest so many checkpoints stay on disk."""
        self._folder = (Path(workdir) / FOLDER).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, frozen: FrozenParams, metadata: Mapping[str, Any]) -> None:
        """Begins to save; returns once the arrays are copied, so the caller may donate them.

        Args:
            step: `state.step`, known to the caller without waiting for the device.
            state: the state after `step` updates.
            frozen: parameters of the frozen models, by their names.
            metadata: can be written as JSON.
        """
        # A run that ends, or is resumed, on a checkpoint's step would write the same state again.
        if step in self._manager.all_steps():
            return
        arrays = {"train_state": _flatten(_resumed(state)), "ema": state.ema_params, **frozen}
        about = {"metadata": dict(metadata), "items": list(arrays)}
        items = {name: ocp.args.StandardSave(dict(tree)) for name, tree in arrays.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, **{_ABOUT: ocp.args.JsonSave(about)}))

    def restore_train_state(self, target: TrainState, step: int | None = None) -> TrainState:
        """The saved state, placed as `target` says.

        Args:
            target: a TrainState of ShapeDtypeStructs with shardings; they need not be those it was saved with.
            step: which checkpoint; the latest if None.

        Raises:
            UserError: no such checkpoint, or its leaves are not those of `target` (names, shapes and dtypes).
        """
        step = _choose_step(self._manager, self._folder, step)
        flat = _restore(self._manager, self._folder, step, "train_state", _flatten(_resumed(target)))
        leaves = [flat[name] for name in _flatten(_resumed(target))]
        resumed = jax.tree.unflatten(jax.tree.structure(_resumed(target)), leaves)
        ema_params = _restore(self._manager, self._folder, step, "ema", target.ema_params)
        return TrainState(**resumed, ema_params=ema_params)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given under that name. Raises UserError where there is no such checkpoint."""
        step = _choose_step(self._manager, self._folder, step)
        return _about(self._manager, self._folder, step)["metadata"]

    def wait(self) -> None:
        """Returns when everything is on disk. A failure to save is raised here, or by the next save."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_for_sampling(path: str | Path, step: int | None = None) -> SavedModel:
    """The averaged parameters and the frozen models, on the first local device; nothing else is read.

    Args:
        path: WORKDIR or WORKDIR/checkpoints.
        step: which checkpoint; the latest if None.

    Raises:
        UserError: the folder is missing, or has no whole checkpoint (of that step).
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {path}; give the --workdir of a training run")
    if (folder / FOLDER).is_dir():
        folder /= FOLDER
    # Not read_only: that warns three times, and without create nothing is written either.
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options, item_handlers=_handlers()) as manager:
        step = _choose_step(manager, folder, step)
        about = _about(manager, folder, step)
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restored: dict[str, Params] = {}
        for name in about["items"]:
            if name != "train_state":
                saved = _saved_leaves(manager, folder, step, name)
                target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in saved.items()}
                restored[name] = _restore(manager, folder, step, name, target)
    return SavedModel(about["metadata"], restored.pop("ema"), restored, step)


def _handlers() -> dict[str, Any]:
    return {name: ocp.StandardCheckpointHandler() for name in _ARRAYS} | {_ABOUT: ocp.JsonCheckpointHandler()}


def _resumed(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "ema_params"}


def _flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf} in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _choose_step(manager: ocp.CheckpointManager, folder: Path, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{folder} holds no checkpoint; train until one is saved, or give another folder")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{folder} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return step


def _about(manager: ocp.CheckpointManager, folder: Path, step: int) -> dict[str, Any]:
    if not (folder / str(step) / _ABOUT).is_dir():
        raise _broken(folder, step, f"{_ABOUT} is missing")
    try:
        about = manager.restore(step, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))[_ABOUT]
    except (ValueError, KeyError, OSError) as error:
        raise _broken(folder, step, f"{_ABOUT}: {error}") from error
    missing = [name for name in about["items"] if not (folder / str(step) / name).is_dir()]
    if missing:
        raise _broken(folder, step, f"{', '.join(missing)} missing")
    return about


def _saved_leaves(manager: ocp.CheckpointManager, folder: Path, step: int, item: str) -> dict[str, Any]:
    """{name: metadata with shape and dtype} of one item."""
    try:
        leaves = manager.item_metadata(step)[item]
    except (ValueError, KeyError, OSError) as error:
        raise _broken(folder, step, f"{item}: {error}") from error
    if leaves is None:
        raise _broken(folder, step, f"{item} is missing or unreadable")
    return dict(leaves.items())


def _restore(
    manager: ocp.CheckpointManager, folder: Path, step: int, item: str, target: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """One item, placed as `target` says, after its leaves were found to be those of `target`."""
    saved = _saved_leaves(manager, folder, step, item)
    differences = [f"{name} (not in the checkpoint)" for name in target if name not in saved]
    differences += [f"{name} (only in the checkpoint)" for name in saved if name not in target]
    for name in target:
        if name in saved:
            was, now = (f"{x.dtype}{list(x.shape)}" for x in (saved[name], target[name]))
            if was != now:
                differences.append(f"{name} ({was} in the checkpoint, {now} now)")
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        shown = ", ".join(differences[:8]) + more
        raise UserError(
            f"the checkpoint {folder / str(step)} is of another model or optimizer; {item} differs in {shown}; "
            "use the config it was trained with, or another --workdir"
        )
    try:
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(dict(target))})
        return dict(manager.restore(step, args=args)[item])
    except (ValueError, KeyError, OSError) as error:
        raise _broken(folder, step, f"{item}: {error}") from error


def _broken(folder: Path, step: int, what: str) -> UserError:
    line = " ".join(what.split())[:300]
    return UserError(
        f"the checkpoint {folder / str(step)} is not whole ({line}); delete that folder to use an older checkpoint"
    )
