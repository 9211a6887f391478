"""Export a bundle: `python -m m2m_jax.export --checkpoint runs/demo --output bundle`.

A bundle (`sampling/bundle.py`) holds the sampler as StableHLO for every platform, and its parameters. It runs with
`dist/m2m-sample.pyz` (`make sampler`), which needs jax, numpy, pillow and flatbuffers and no model code. The settings
of sampling are compiled into it; how many sets, context images and new images there are is not.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.sampling.options import BundleExport, ChosenSettings

EXPORT = define_flags(BundleExport)
SETTINGS = define_flags(ChosenSettings)


def main(argv):
    from m2m_jax.sampling.from_checkpoint import export_bundle

    print(export_bundle(**vars(EXPORT()), **SETTINGS().explicit()))


if __name__ == "__main__":
    run_program(main)
