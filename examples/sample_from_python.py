"""Sampling from Python, after `make demo` and `. .venv/bin/activate`:

    PYTHONPATH=. python examples/sample_from_python.py runs/demo runs/demo/test_sets/000 out

After `pip install --no-deps -e .` it needs no PYTHONPATH.

Takes the first two images of a folder as context, makes two more of the same set, and then a third one in the context
of all four.
"""

import sys
from pathlib import Path

import numpy as np

import m2m_jax
from m2m_jax.core.images import write_png


def main(checkpoint: str, context_folder: str, output: str) -> None:
    sampler = m2m_jax.Sampler.from_checkpoint(checkpoint, guidance_scale=1.5)
    context = sorted(Path(context_folder).iterdir())[:2]

    images = sampler(context, num_images=2, seed=0)  # uint8 [2, size, size, 3]
    # Generated images are context like any other.
    one_more = sampler([*context, *images], num_images=1, seed=1)

    Path(output).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(np.concatenate([images, one_more])):
        write_png(Path(output) / f"{i:03d}.png", image)
    print(f"{output}: {len(images) + len(one_more)} images from {len(context)} in {context_folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
