"""Write checkpoints and resume from them. It and `saved_model.py`, which reads them, alone import Orbax.

WORKDIR/checkpoints/STEP/ holds
    train_state   what resuming needs: the state but for the average
    ema           what sampling needs: the averages of the parameters that train, float32; those that do not are in
                  train_state
    autoencoder   the frozen first stage, so that a checkpoint samples on its own (absent where there is none)
    image_encoder what encodes the context in M2M-DINO, likewise
    about         JSON: what the caller wants to be told later (its config), which of the above there are, the code's
                  version and the score of the evaluation
    SHA256SUMS    what every file of these was: m2m_jax/checkpoints/checksums.py
and WORKDIR/lock belongs to the process that writes there: m2m_jax/checkpoints/workdir_lock.py

Every item is one flat dict {dotted name: array}. So a checkpoint knows nothing of Optax's or Flax's classes, the
EMA is restored without either, and names can be compared.

A save is written into STEP.orbax-checkpoint-tmp; then what was written is looked for, array by array, for libraries may
lose some without a word; the checksums come last, and then the folder gets its name. So what was interrupted never has
the name, and what has the name is compared with its checksums before anything of it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from m2m_jax.checkpoints import checksums, save_errors, stored_arrays, workdir_lock
from m2m_jax.checkpoints.config_changes import code_version, config_changes, listing_changes
from m2m_jax.checkpoints.saved_model import (
    ABOUT,
    ARRAYS,
    EMA,
    FOLDER,
    FORMAT,
    STATE,
    choose,
    read_about,
    restore,
    saved_leaves,
)
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.models.folder import first_of, in_turn
from m2m_jax.models.frozen import FrozenParams

_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX

# Small arrays are written by one device: to cut one for two takes longer than to write it. Where an array lay is not
# written: whoever restores it says where it shall lie. Together half of the time that a save of many arrays takes.
_WRITERS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20, enable_write_sharding_file=False),
    )
)


class Checkpointer:
    """Save the train state in the background and restore it, in WORKDIR/checkpoints.

    All processes make one and call the same methods. `wait` or `close` before another program reads, or another
    Checkpointer of the same folder saves. As a context manager it is closed at the end: where that is an error, what is
    being saved is finished first.
    """

    def __init__(
        self, workdir: str | Path, *, keep: int, keep_every: int = 0, keep_best: int = 0, fallback: bool = False
    ):
        """Own the workdir, remove what an interrupted save left behind, and say so.

        Args:
            keep: the newest so many checkpoints stay on disk.
            keep_every: those whose step is a multiple of it stay, too; 0: none do.
            keep_best: so many of the lowest `score` stay, too.
            fallback: where the newest is damaged, the newest whole one is used. Otherwise that is an error.

        Raises:
            UserError: the folder cannot be made or written, its name is one that libraries misread, or another process
                owns the workdir.
        """
        self._folder, self._fallback = (Path(workdir) / FOLDER).resolve(), fallback
        self._scores: dict[int, float] = {}
        self._saving = 0  # the step that is being written
        self._written: dict[str, dict[str, Any]] = {}  # its arrays, or what they look like, by item and name
        disk.require_plain(self._folder.parent, "--workdir")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_owned(self._folder.parent))
            self._manager = self._open(keep, keep_every, keep_best)
            self._let_go = stack.pop_all()

    def _open(self, keep: int, keep_every: int, keep_best: int) -> ocp.CheckpointManager:
        """Open Orbax's manager of the folder, without what an interrupted save left there."""
        with disk.errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for leftover in sorted(self._folder.glob(f"*{_UNFINISHED}*")):
                    shutil.rmtree(leftover)
                    print(f"{leftover} was not saved to its end; it is removed", flush=True)
        stays = [LatestN(keep), _Best(keep_best, self._scores)]
        if keep_every:
            stays.append(EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(stays),
            # Folders are made at once: where that fails, all that waits for them would wait for minutes.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal, create_directories_asynchronously=False
            ),
            single_host_load_and_broadcast=True,  # or processes would disagree where one sees the folder later
            lightweight_initialize=True,  # the rest may be damaged
        )
        save_errors.say_once()
        handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=_WRITERS) for name in ARRAYS}
        handlers |= {ABOUT: ocp.JsonCheckpointHandler()}
        manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # It asks JAX whether it is preempted, of the step that is saved, from the background: JAX would take that for
        # the step that this process is at, and `Interruption` could miss the one that all stop after.
        manager.reached_preemption = lambda step: False
        for step in manager.all_steps():
            if not checksums.damage(self._folder / str(step), [ABOUT]):
                score = read_about(self._folder, step).get("score")
                self._scores |= {step: score} if score is not None else {}
        return manager

    def latest_step(self) -> int | None:
        """Return the newest step, whole or damaged; None where there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        *,
        frozen: FrozenParams,
        metadata: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Begin to save; returns once the arrays are copied, so the caller may donate them.

        Args:
            step: `state.step`, known to the caller without waiting for the device.
            state: the state after `step` updates.
            frozen: parameters of the frozen models, by their names.
            metadata: can be written as JSON.
            score: of the evaluation of this step, for `keep_best`: lower is better; None: there was none.

        Raises:
            UserError: this or the last save failed for want of space or permission.
        """
        self.wait()
        # A run that ends, or is resumed, on a checkpoint's step would write the same state again.
        if step in self._manager.all_steps():
            return
        score = score if score is not None and math.isfinite(score) else None
        arrays = {STATE: _flatten(_resumed(state)), EMA: state.ema_params, **frozen}
        about = {
            "format": FORMAT,
            "metadata": dict(metadata),
            "items": list(arrays),
            "code": code_version(),
            "score": score,
        }
        items = {name: ocp.args.PyTreeSave(dict(tree)) for name, tree in arrays.items()}
        self._saving = step
        self._written = {item: jax.tree.map(_shape, dict(tree)) for item, tree in arrays.items()}
        self._scores.pop(step, None)  # of one that was set aside
        self._scores |= {step: score} if score is not None else {}
        with self._plain_errors():
            self._manager.save(step, args=ocp.args.Composite(**items, **{ABOUT: ocp.args.JsonSave(about)}))

    def restore_train_state(
        self, target: Any, step: int | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the saved state, placed as `target` says. Its files are compared with their checksums first.

        Args:
            target: a TrainState of ShapeDtypeStructs with shardings; they need not be those it was saved with.
            step: which checkpoint; the latest if None.
            metadata: what the next `save` will be given. What of its config (`to_json`) differs from the checkpoint's
                is printed, and of the listings of its data ("listings"); the frozen models ("sha256") must be the same.

        Raises:
            UserError: no such checkpoint, it is damaged, or it is of other frozen models, or its leaves are not those
                of `target` (names, shapes and dtypes).
        """
        step = self._whole(step, (STATE, EMA, ABOUT))
        folder, about = self._folder / str(step), read_about(self._folder, step)
        metadata = metadata or {}
        config, was = metadata.get("config"), about["metadata"]
        changes = config_changes(was.get("config", {}), config) if config else []
        wanted = _flatten(_resumed(target))
        # Earlier code saved averages of parameters that do not train, too: they are these.
        _require_same_leaves(folder, {STATE: wanted, EMA: target.ema_params}, changes, spare=target.params)
        _require_same_frozen(folder, was.get("sha256", {}), metadata)
        if changes:
            _say("\n  ".join([f"the config is not that of {folder}:", *changes]))
        if moved := listing_changes(was.get("listings", {}), metadata.get("listings", {})):
            _say("\n  ".join([f"the data are not those of {folder}:", *moved]))
        if config and (code := about.get("code", "of an older version")) != code_version():
            _say(f"{folder} was saved by m2m_jax {code}; this is {code_version()}")
        restored = restore(folder, STATE, wanted)
        leaves = [restored[name] for name in wanted]
        resumed = jax.tree.unflatten(jax.tree.structure(_resumed(target)), leaves)
        return dataclasses.replace(target, **resumed, ema_params=restore(folder, EMA, target.ema_params))

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Return what `save` was given under that name. Raises UserError where there is no such checkpoint."""
        return read_about(self._folder, self._whole(step, (ABOUT,)))["metadata"]

    def wait(self) -> None:
        """Wait until everything is on disk. A failure to save is raised here, or by the next save."""
        with self._plain_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait`, and let go of the folder."""
        with self._let_go:
            self.wait()
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*([UserError] if kind else [])):  # the first error is the one to be told
            self.close()

    def _seal(self) -> None:
        """Seal a save, the last thing before it gets its name; in the background, in the first process."""
        folder = self._folder / f"{self._saving}{_UNFINISHED}"
        for item, arrays in self._written.items():
            if lost := stored_arrays.lost(folder / item, arrays):
                raise UserError(
                    f"the checkpoint {self._folder / str(self._saving)} was not written whole: of item {item} {lost}; "
                    "what was saved before is whole. See that nothing else writes there, or name another --workdir"
                )
        checksums.write(folder)

    def _whole(self, step: int | None, items: Sequence[str]) -> int:
        """Return `step`, or the newest, where its items are whole; with `fallback`, the newest where they are."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        chosen = choose(self._folder, steps, step)
        damaged: dict[int, str] = {}
        for candidate in steps if step is None and self._fallback else [chosen]:
            # Every process reads its share of the files, and all hear of what one of them found.
            share = (jax.process_index(), jax.process_count())
            found = _of_all_processes(checksums.damage(self._folder / str(candidate), items, share))
            if not found:
                self._set_aside(damaged, candidate)
                return candidate
            damaged[candidate] = found
        remedy = "--config.checkpoint.fallback=True sets it aside and goes on from the newest whole one"
        if len(damaged) == len(steps):
            remedy = "no other is whole; train into another --workdir"
        raise UserError(f"the checkpoint {self._folder / str(chosen)} is damaged: {damaged[chosen]}; {remedy}")

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Rename damaged steps, not to be found again; their owner may want to look at them. `step` is used instead."""
        if not damaged:
            return
        problem = ""
        for number, what in damaged.items() if jax.process_index() == 0 else ():
            folder = self._folder / str(number)
            aside = next(
                path for i in itertools.count() if not (path := self._folder / f"{number}.damaged{i or ''}").exists()
            )
            try:
                folder.rename(aside)
            except OSError as error:
                problem = f"the damaged checkpoint {folder} cannot be renamed: {error.strerror}"
                break
            _say(f"the checkpoint {folder} is damaged: {what}; it is {aside.name} now, and step {step} is used instead")
        if problem := _of_all_processes(problem):
            raise UserError(problem)
        self._manager.reload()

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise UserError where the disk is full or cannot be written, and remove what was written of the save."""
        try:
            with disk.run_errors(f"the checkpoint {self._folder / str(self._saving)}"):
                yield
        except UserError:
            if jax.process_index() == 0:
                shutil.rmtree(self._folder / f"{self._saving}{_UNFINISHED}", ignore_errors=True)
            raise


@dataclasses.dataclass
class _Best:
    """Keep the n checkpoints with the lowest scores. Orbax's own would read every checkpoint's files to know them."""

    n: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((step for step in steps if step in self.scores), key=lambda s: (self.scores[s], -s))[: self.n]
        return [step in best for step in steps]


def _resumed(state: Any) -> dict[str, Any]:
    """Return all but the average, which is an item of its own."""
    fields = (field.name for field in dataclasses.fields(state))
    return {name: getattr(state, name) for name in fields if name != "ema_params"}


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@contextlib.contextmanager
def _owned(workdir: Path) -> Iterator[None]:
    """Hold the workdir's lock by the first process, for all; all raise UserError where another launch holds it."""
    with contextlib.ExitStack() as stack:
        refused = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(workdir_lock.hold(workdir))
            except UserError as error:
                refused = str(error)
        if refused := _of_all_processes(refused):
            raise UserError(refused)
        yield


def _flatten(tree: Any) -> dict[str, Any]:
    """Return {dotted path: leaf} in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _require_same_leaves(
    folder: Path, targets: Mapping[str, Mapping[str, Any]], changes: Sequence[str], spare: Container[str] = ()
) -> None:
    """Raise UserError where an item's leaves are not those of `targets`: {item: {name: with shape and dtype}}.

    spare: names that may be in the checkpoint alone.
    """
    for item, target in targets.items():
        saved = saved_leaves(folder, item)
        shapes = {
            name: [f"{x.dtype}{list(x.shape)}" for x in (saved[name], target[name])] for name in target if name in saved
        }
        differences = in_turn(
            [f"{name} (not in the checkpoint)" for name in target if name not in saved],
            [f"{name} (only in the checkpoint)" for name in saved if name not in target and name not in spare],
            [f"{name} ({was} in the checkpoint, {now} now)" for name, (was, now) in shapes.items() if was != now],
        )
        if differences:
            why = f"; since then {'; '.join(changes)}" if changes else ""
            raise UserError(
                f"the checkpoint {folder} is of another model or optimizer; {item} differs in "
                f"{first_of(differences)}{why}; use the config it was trained with, or another --workdir"
            )


def _require_same_frozen(folder: Path, was: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Raise UserError where a frozen model is not the one of the checkpoint: its latents, or tokens, mean something
    else. was: {name: sha256}."""
    for name, digest in metadata.get("sha256", {}).items():
        if was.get(name, digest) != digest:
            path = metadata["config"][name]["path"]
            raise UserError(
                f"config.{name}.path={path} holds other weights than those that the checkpoint {folder} was trained "
                "with: put them back, or train into another --workdir"
            )


def _of_all_processes(text: str) -> str:
    """Return the first text, by process, that is not empty; all processes must call, and all get the same."""
    if jax.process_count() == 1:
        return text
    encoded = np.zeros(1024, np.uint8)
    written = text.encode()[: encoded.size]
    encoded[: len(written)] = list(written)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(encoded))
    return next(filter(None, texts), "")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
