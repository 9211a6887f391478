"""The sampler binary, dist/m2m-sample.pyz: samples from a bundle with jax, numpy, pillow and flatbuffers installed."""

import argparse
import dataclasses

from m2m_jax.core import runtime
from m2m_jax.core.errors import UserError, refuse
from m2m_jax.sampling.bundle import Bundle
from m2m_jax.sampling.job import Job, run


def main() -> None:
    parser = argparse.ArgumentParser("m2m-sample", description="Samples image sets from a bundle of m2m_jax.export.")
    parser.add_argument("--bundle", required=True, help="Folder that m2m_jax.export wrote.")
    for field in dataclasses.fields(Job):
        kind = field.type.split(" | ")[0]
        read = {
            "str": {"type": str},
            "int": {"type": int},
            "bool": {"action": argparse.BooleanOptionalAction},
        }.get(kind, {"type": lambda text: tuple(text.split(","))})
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            required=field.name == "output",
            help=field.metadata["help"],
            **read,
        )
    options = vars(parser.parse_args())
    folder = options.pop("bundle")
    try:
        job = Job(**options)
        runtime.start()
        if written := run(job, lambda num_sets: Bundle(folder), {}):
            print(written)
    except UserError as error:
        refuse(error)
