"""Exports a bundle: `python -m m2m_jax.export --checkpoint runs/demo --output bundle`.

A bundle (`sampling/bundle.py`) holds the sampler as StableHLO for every platform, and its parameters. It runs with
`dist/m2m-sample.pyz` (`make sampler`), which needs jax, numpy, pillow and flatbuffers and no model code. The settings
of sampling are compiled into it; how many sets, context images and new images there are is not.
"""

from pathlib import Path

from absl import flags

from m2m_jax.core import disk
from m2m_jax.core.program import run_program
from m2m_jax.sampling import flags as sampling_flags
from m2m_jax.sampling.bundle import PLATFORMS
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.sampler import Sampler

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STEP.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
flags.adopt_module_key_flags(sampling_flags)  # in --help


def main(argv):
    settings, output = sampling_flags.given_settings(), Path(OUTPUT.value)
    disk.require_new(output)
    sampler = Sampler.from_checkpoint(CHECKPOINT.value, **settings)
    with disk.new_folder(output) as aside:
        write_bundle(sampler, aside)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: step {sampler.step}, {size / 1e6:.1f} MB, for {', '.join(PLATFORMS)}")


if __name__ == "__main__":
    run_program(main)
