"""Sample: `python -m m2m_jax.sample --checkpoint runs/demo --context=a.png,b.png --num_images=4 --output=out`.

What is read and written stands in `sampling/run_job.py`.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.sampling.job import Job
from m2m_jax.sampling.options import ChosenSettings, FromCheckpoint

CHECKPOINT = define_flags(FromCheckpoint)
JOB = define_flags(Job)
SETTINGS = define_flags(ChosenSettings)


def main(argv):
    from m2m_jax.sampling.from_checkpoint import sample

    if written := sample(CHECKPOINT().checkpoint, JOB(), **SETTINGS().explicit()):
        print(written)


if __name__ == "__main__":
    run_program(main)
