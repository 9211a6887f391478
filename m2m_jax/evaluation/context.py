"""Is the context used? Runs side by side, on the same sets, noise and timesteps, whatever they were trained on.

Example:
    report = evaluate_context(config, ContextEvaluation(checkpoints=("runs/a", "runs/b"), split="validation"))
    print(report.text())
    report.runs["runs/a"]["loss_own_context"]  # [mean, standard error]
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from m2m_jax.config_rules import validate
from m2m_jax.configuration import Config, reads_latents, to_json
from m2m_jax.core import disk, runtime
from m2m_jax.core.compilation import saying_so
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import fingerprint, merge
from m2m_jax.data.pipeline import SetExamples, batches, held_out_inputs, make_dataset, open_examples
from m2m_jax.evaluation.options import ContextEvaluation
from m2m_jax.models.frozen import AUTOENCODER
from m2m_jax.models.unet import unet_structure
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.tasks.evaluation import context_errors, mean_and_error, warn_of_one_set
from m2m_jax.tasks.objective import global_values
from m2m_jax.training import sharding

_NAMED = 3  # sets, in the text of a report


@dataclasses.dataclass(frozen=True)
class ContextReport:
    """What an evaluation found.

    Attributes:
      config: what the sets are of.
      options: what was asked.
      sets: the names of the sets that were used, each once.
      runs: {run: {"step", "parameters", and losses of `context_errors` as [mean, standard error or None]}}.
    """

    config: Config
    options: ContextEvaluation
    sets: list[str]
    runs: dict[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return everything as `json` can write it."""
        about = {"split": self.options.split, "batches": self.options.batches, "sets": self.sets}
        return {"config": to_json(self.config), **about, "runs": self.runs}

    def text(self) -> str:
        """Return a line on the sets, and one for each run."""
        count, num_images = self.options.batches * self.config.eval.batch_size, self.config.data.images_per_set
        names = ", ".join(self.sets[:_NAMED]) + (", ..." if len(self.sets) > _NAMED else "")
        again = ", again and again" if len(self.sets) < count else ""
        line = (
            f"{count} sets of {num_images} images, {self.options.split} split of data.name={self.config.data.name}: "
            f"{len(self.sets)} different ones{again} ({names}); loss of the last image"
        )
        return "\n".join([line, *(run_line(path, row, num_images) for path, row in self._aligned())])

    def _aligned(self):
        width = max(map(len, self.runs))
        return ((f"{path:{width}}", row) for path, row in self.runs.items())


def run_line(path: str, row: dict[str, Any], num_images: int) -> str:
    """Return a line on one run: losses with their standard errors, and by how much another set's context is worse.

    Args:
      row: see `ContextReport.runs`.
      num_images: of a set.
    """

    def said(mean: float, error: float | None) -> str:
        return f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")

    own, other = (row[f"loss_{whose}_context"] for whose in ("own", "other"))
    sizes = [row[f"loss_by_context_size/{k}"][0] for k in range(num_images)]
    return (
        f"{path}  step {row['step']}: own context {said(*own)}, another's {said(*other)} "
        f"({other[0] / own[0]:.2f} times); with 0, 1, ... own images " + ", ".join(f"{size:.4f}" for size in sizes)
    )


def evaluate_context(config: Config, options: ContextEvaluation) -> ContextReport | None:
    """Measure the loss of the last image of held-out sets under different contexts, for each of several runs.

    All devices of `config.mesh` share each batch; processes that JAX joined must all call, and make the same table.

    Args:
      config: what the sets are: data source, images a set, augmentation, seed, the size of a batch. Of a run all but
        the parameters and what its checkpoint says of them is ignored.

    Returns:
      What was found, written to `options.output`, too; None of all processes but the first.

    Raises:
      UserError: the data cannot be used so, a run cannot be read, or the losses of two runs are not of one kind: they
        have different autoencoders or noise schedules.
    """
    validate(config)
    if reads_latents(config.data):
        raise UserError("config.data names latents, which are of one autoencoder; name the images")
    if config.data.images_per_set < 2:
        raise UserError("config.data.images_per_set is 1: there is no context to evaluate")
    runtime.start()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")
    examples = open_examples(config.data, split=options.split, seed=config.seed, augment=config.eval.augment)
    rows = sharding.local_rows(mesh, config.eval.batch_size)
    dataset = make_dataset(examples, batch_size=config.eval.batch_size, rows=rows, threads=config.data.threads)
    samplers = {str(path): _load(str(path)) for path in options.checkpoints}
    _require_comparable(samplers, config.data.image_size)
    for sampler in samplers.values():
        examples.require_attributes(sampler.global_widths)
    warn_of_one_set(examples.num_sets, options.split)

    runs: dict[str, dict[str, Any]] = {}
    for path, sampler in samplers.items():
        runs[path] = {"step": sampler.step, "parameters": sum(x.size for x in sampler.unet_params.values())}
        runs[path] |= _losses(sampler, dataset, options.batches, config, mesh)
    if jax.process_index():
        return None
    report = ContextReport(config, options, _used(examples, options.batches * config.eval.batch_size), runs)
    if options.output:
        with disk.errors(f"--output={options.output}"):
            disk.write(options.output, f"{json.dumps(report.as_json(), indent=2)}\n".encode())
    return report


def _used(examples: SetExamples, count: int) -> list[str]:
    """Return the names of the sets that the first so many examples are of, each once."""
    return examples.set_ids(dict.fromkeys(examples.choose(index)[0] for index in range(count)))


def _load(path: str) -> Sampler:
    """Read a run, its parameters into this machine's memory: on the devices there is one model at a time."""
    sampler = Sampler.from_checkpoint(path)
    return dataclasses.replace(
        sampler,
        unet_params=jax.tree.map(np.array, sampler.unet_params),
        frozen=jax.tree.map(np.array, sampler.frozen),
    )


def _require_comparable(samplers: dict[str, Sampler], image_size: int) -> None:
    """Raise UserError unless the losses of these mean the same, on images of so many pixels a side."""
    (first, of_first), *others = samplers.items()
    for path, sampler in samplers.items():
        if sampler.image_size != image_size:
            raise UserError(
                f"{path} was trained at {sampler.image_size} px, and config.data.image_size is {image_size}"
            )
    for path, sampler in others:
        if changed := of_first.schedule.differences(sampler.schedule):
            raise UserError(
                f"{path} and {first} have different noise schedules: their losses are not of one kind "
                f"({'; '.join(changed)})"
            )
        same = sampler.models.autoencoder == of_first.models.autoencoder
        if not same or fingerprint(sampler.frozen[AUTOENCODER]) != fingerprint(of_first.frozen[AUTOENCODER]):
            raise UserError(f"{path} and {first} have different autoencoders: their losses are not of one kind")


def _losses(
    sampler: Sampler, dataset: grain.MapDataset, num_batches: int, config: Config, mesh: Mesh
) -> dict[str, list[float | None]]:
    """Return {name: [mean, standard error over the records that were evaluated, or None where that is one]}."""
    unet_config, models, schedule = sampler.static.unet_config, sampler.models, sampler.schedule
    graphdef = unet_structure(unet_config)[0]

    @jax.jit(out_shardings=sharding.replicated(mesh))
    def of_batch(unet_params, frozen, batch, batch_index):
        images_bnhwc = batch["images_bnhwc"]
        context = models.context(frozen, images_bnhwc[:, :-1])
        error = context_errors(
            merge(graphdef, unet_params),
            schedule,
            models.encode(frozen, images_bnhwc),
            context,
            record_b=batch["record_index_b"],
            seed=config.seed,
            batch_index=batch_index,
            clean_timestep=sampler.clean_timestep,
            globals_bnc=global_values(unet_config.global_embeddings, batch),
        )
        return error, batch["record_index_b"]

    about = (unet_config, config.eval.batch_size, config.data.images_per_set, sampler.image_size, mesh.size)
    run = saying_so("the evaluation of a batch", about, of_batch)
    params = sharding.replicate((sampler.unet_params, sampler.frozen), mesh)
    stream = batches(dataset, 0, config.data.prefetch)
    found = []
    for i in range(num_batches):
        batch = sharding.make_global_batch(mesh, held_out_inputs(next(stream)), config.eval.batch_size)
        found.append(jax.device_get(run(*params, batch, np.uint32(i))))
    error, record_k = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return {name: list(mean_and_error(error_k, record_k)) for name, error_k in error.items()}
