"""Exports a bundle: `python -m m2m_jax.export --checkpoint runs/demo --output bundle`.

A bundle (`sampling/bundle.py`) holds the sampler as StableHLO for every platform, and its parameters. It runs with
`dist/m2m-sample.pyz` (`make sampler`), which needs jax, numpy, pillow and flatbuffers and no model code. The settings
of sampling are compiled into it; how many sets, context images and new images there are is not.
"""

import shutil
import tempfile
from pathlib import Path

from absl import flags
from safetensors import SafetensorError

from m2m_jax.errors import UserError
from m2m_jax.program import run_program
from m2m_jax.sampling.bundle import PLATFORMS
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.flags import given_settings
from m2m_jax.sampling.sampler import Sampler

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or WORKDIR/checkpoints/STEP.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)


def main(argv):
    settings, output = given_settings(), Path(OUTPUT.value)
    if output.exists():
        raise UserError(f"--output={output} exists; name a new folder")
    sampler = Sampler.from_checkpoint(CHECKPOINT.value, **settings)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            write_bundle(sampler, aside)
            aside.chmod(0o755)  # a temporary folder is its owner's alone
            aside.rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output={output} cannot be written: {reason}") from error
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: step {sampler.step}, {size / 1e6:.1f} MB, for {', '.join(PLATFORMS)}")


if __name__ == "__main__":
    run_program(main)
