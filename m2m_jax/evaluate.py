"""Is the context used, on any image sets? Several runs side by side, on the same sets, noise and timesteps.

    python -m m2m_jax.evaluate --config configs/emoji.py:demo --checkpoints=runs/a,runs/b --output=table.json

The config says what the sets are: its data source, images a set, augmentation, seed and the size of a batch; of a run
all but the parameters and what its checkpoint says of them is ignored. For the last image of each set: the denoising
loss with the images before it as context, with those of another set in their place, and with fewer of its own
(`tasks/evaluation.py`). Losses of runs with different autoencoders or noise schedules are not of one kind, and
refused. All devices of `config.mesh` share each batch; a launch of several processes makes the same table.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.configuration import reads_latents, to_json
from m2m_jax.core import disk, runtime
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import fingerprint, merge
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import batches, held_out_inputs, make_dataset, open_examples
from m2m_jax.models.frozen import AUTOENCODER
from m2m_jax.models.unet import unet_structure
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.tasks.evaluation import as_text, context_errors, mean_and_error, warn_of_one_set
from m2m_jax.training import sharding

CONFIG = define_config_flag()
CHECKPOINTS = flags.DEFINE_list("checkpoints", None, "Workdirs of runs, or WORKDIR/checkpoints/STEP.", required=True)
SPLIT = flags.DEFINE_string("split", "test", "Which split of the data set.")
BATCHES = flags.DEFINE_integer("batches", 16, "So many batches of config.eval.batch_size sets.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write: all figures, and what they are of.")


def main(argv):
    config = CONFIG.value
    validate(config)
    if reads_latents(config.data):
        raise UserError("config.data names latents, which are of one autoencoder; name the images")
    if config.data.images_per_set < 2:
        raise UserError("config.data.images_per_set is 1: there is no context to evaluate")
    runtime.start()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.eval.batch_size, mesh, "eval.batch_size")
    examples = open_examples(config.data, split=SPLIT.value, seed=config.seed)
    rows = sharding.local_rows(mesh, config.eval.batch_size)
    dataset = make_dataset(examples, batch_size=config.eval.batch_size, rows=rows, threads=config.data.threads)
    samplers = {path: load(path) for path in CHECKPOINTS.value}
    require_comparable(samplers, config.data.image_size)
    warn_of_one_set(examples.num_sets, SPLIT.value)

    table = {}
    for path, sampler in samplers.items():
        table[path] = {"step": sampler.step, "parameters": sum(x.size for x in sampler.unet_params.values())}
        table[path] |= losses(sampler, dataset, config, mesh)
    if jax.process_index():
        return
    sets = BATCHES.value * config.eval.batch_size
    again = f" ({examples.num_sets} different ones, again and again)" if examples.num_sets < sets else ""
    print(f"{sets} sets of {config.data.images_per_set} images{again}, {SPLIT.value} split; loss of the last image")
    print(as_text(table, config.data.images_per_set))
    if OUTPUT.value:
        about = {"config": to_json(config), "split": SPLIT.value, "batches": BATCHES.value, "runs": table}
        with disk.errors(f"--output={OUTPUT.value}"):
            disk.write(Path(OUTPUT.value), f"{json.dumps(about, indent=2)}\n".encode())


def load(path: str) -> Sampler:
    """With parameters in this machine's memory: on the devices there is one model at a time."""
    sampler = Sampler.from_checkpoint(path)
    return dataclasses.replace(
        sampler,
        unet_params=jax.tree.map(np.array, sampler.unet_params),
        frozen=jax.tree.map(np.array, sampler.frozen),
    )


def require_comparable(samplers: dict[str, Sampler], image_size: int) -> None:
    """Raises UserError unless the losses of these mean the same, on images of so many pixels a side."""
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


def losses(sampler: Sampler, dataset, config, mesh: Mesh) -> dict[str, list[float | None]]:
    """{name: [mean, standard error over the records that were evaluated, or None where that is one]}."""
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
        )
        return error, batch["record_index_b"]

    params = sharding.replicate((sampler.unet_params, sampler.frozen), mesh)
    stream = batches(dataset, 0, config.data.prefetch)
    found = []
    for i in range(BATCHES.value):
        batch = sharding.make_global_batch(mesh, held_out_inputs(next(stream)), config.eval.batch_size)
        found.append(jax.device_get(of_batch(*params, batch, np.uint32(i))))
    error, record_k = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return {name: list(mean_and_error(error_k, record_k)) for name, error_k in error.items()}


if __name__ == "__main__":
    run_program(main, CONFIG.take)
