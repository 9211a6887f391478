"""Samples: `python -m m2m_jax.sample --checkpoint runs/demo --context=a.png,b.png --num_images=4 --output=out`.

What is read and written stands in `sampling/job.py`.
"""

import dataclasses

import jax
from absl import flags

from m2m_jax.core import runtime
from m2m_jax.core.program import run_program
from m2m_jax.sampling import flags as sampling_flags
from m2m_jax.sampling.job import Job, run
from m2m_jax.sampling.sampler import Sampler

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STEP.", required=True)
_DEFINE = {"str": flags.DEFINE_string, "int": flags.DEFINE_integer, "bool": flags.DEFINE_bool}
JOB = {
    field.name: _DEFINE.get(field.type.split(" | ")[0], flags.DEFINE_list)(
        field.name, field.default, field.metadata["help"], required=field.name == "output"
    )
    for field in dataclasses.fields(Job)
}
flags.adopt_module_key_flags(sampling_flags)  # in --help


def main(argv):
    job = Job(**{name: flag.value for name, flag in JOB.items()})
    settings = sampling_flags.given_settings()
    runtime.start()

    def load(num_sets: int) -> Sampler:
        devices = tuple(jax.local_devices()[:num_sets])
        return Sampler.from_checkpoint(CHECKPOINT.value, devices=devices, **settings)

    if written := run(job, load, {"checkpoint": CHECKPOINT.value}):
        print(written)


if __name__ == "__main__":
    run_program(main)
