"""Make ConSE, which compares images with captions where there is no CLIP: python -m m2m_jax.data.prepare_conse

Writes --output (data/conse): --classifier (of `prepare_efficientnet`), --text_encoder (of `prepare_minilm`) and the
names of ImageNet's classes, for scores. Needs `pip install --no-deps -r requirements-scores.txt`.
"""

from m2m_jax.building.options import ConseCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(ConseCopy)


def main(argv):
    from m2m_jax.building.conse import prepare_conse

    options = OPTIONS()
    print(f"{options.output}: ConSE over {prepare_conse(options):,} classes; licences and origins in LICENSE.md")


if __name__ == "__main__":
    run_program(main)
