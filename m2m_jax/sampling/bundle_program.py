"""The sampler binary, dist/m2m-sample.pyz: samples from a bundle with jax, numpy, pillow and flatbuffers installed."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from m2m_jax.core.errors import UserError, refuse
from m2m_jax.core.options import fields, split_list
from m2m_jax.core.printing import safe_streams
from m2m_jax.sampling.job import Job


def main() -> None:
    """Sample as the command line says."""
    parser = argparse.ArgumentParser("m2m-sample", description="Samples image sets from a bundle of m2m_jax.export.")
    parser.add_argument("--bundle", required=True, help="Folder that m2m_jax.export wrote.")
    for field, kind in fields(Job):
        required = field.default is dataclasses.MISSING
        if kind.type is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": split_list if kind.several else str if kind.type is Path else kind.type}
        default = None if required else field.default
        help = field.metadata["about"].help
        parser.add_argument(f"--{field.name}", default=default, required=required, help=help, **how)
    with safe_streams():
        options = vars(parser.parse_args())
        try:
            _sample(options.pop("bundle"), Job(**options))
        except UserError as error:
            refuse(error)


def _sample(folder: str, job: Job) -> None:
    from m2m_jax.core import runtime  # here, and not above: --help need not wait for JAX
    from m2m_jax.core.paths import expand_home
    from m2m_jax.sampling.bundle import Bundle
    from m2m_jax.sampling.run_job import run

    runtime.start()
    if written := run(job, lambda num_sets: Bundle(expand_home(folder)), {}):
        print(written)
