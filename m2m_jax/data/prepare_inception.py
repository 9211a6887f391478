"""Make the Inception-v3 that FID is defined by of weights of one's own: python -m m2m_jax.data.prepare_inception

Reads --weights, the file of pytorch-fid or torch-fidelity (pt_inception-2015-12-05-6726825d.pth), which no package
carries, and writes --output (data/inception_v3) for scores. Needs no torch.
"""

from m2m_jax.building.options import InceptionCopy
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(InceptionCopy)


def main(argv):
    from m2m_jax.building.inception import prepare_inception

    options = OPTIONS()
    size = prepare_inception(options.weights, options.output)
    print(f"{options.output}: Inception-v3 of {options.weights}, {size:,} parameters")


if __name__ == "__main__":
    run_program(main)
