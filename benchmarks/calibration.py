"""What is known of others' runs, beside the roofline of the same step: how far below its bound a good program stays.

    python -m benchmarks.calibration                     # a minute; the table of docs/planning.md

The step is that of MLPerf Training v4.1's Stable Diffusion, closed division: the U-Net of Stable Diffusion 2 at 512 px,
latents computed before, one copy of the state a chip. FLOPs are those of our own network's products and convolutions;
bytes of memory are those of the state alone, read and written; bytes between chips are the gradients', in bfloat16,
as if all chips had the links that those of one slice or node have.
"""

import math

import jax
from absl import flags

from benchmarks.accelerator.networks import task_of_text
from benchmarks.accelerator.sizes import SIZES
from m2m_jax.core.chips import CHIPS, GPUS
from m2m_jax.core.program import run_program
from m2m_jax.planning.collectives import wire_bytes
from m2m_jax.planning.roofline import roofline
from m2m_jax.training.workload import count_products

PRESET = flags.DEFINE_enum("preset", "full", list(SIZES), "Sizes: of Stable Diffusion 2.1, or of a test.")

# (whose, chip, chips, images a chip, images/s a chip): mlcommons/training_results_v4.1, result_0.txt of each.
MEASURED = (
    ("Google MaxDiffusion", "v5p", 8, 32, 86.6),
    ("Google MaxDiffusion", "v5p", 64, 32, 79.4),
    ("NVIDIA NeMo", "h100", 8, 32, 135.7),
    ("NVIDIA NeMo", "h100", 64, 16, 124.0),
    ("NVIDIA NeMo", "h100", 512, 4, 76.7),
)


def rows(preset: str) -> list[str]:
    """Return a line of Markdown for each measured run."""
    size = SIZES[preset]
    config, task = task_of_text(size, 1, "cpu")
    latents = (1, 1, *task.models.latent_shape(config.data.image_size))
    text = (1, size.text_encoder.max_position_embeddings, size.text_encoder.hidden_size)
    batch = {
        name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in (("latents_bnhwc", latents), ("text_bsc", text))
    }
    flops = count_products(task, batch)
    scalars = sum(math.prod(x.shape) for x in task.shapes.values())
    lines = [
        f"{flops / 1e12:.2f} TFLOP an image, {scalars / 1e6:.0f} M parameters.\n",
        "| whose | chips | images a chip | at most | measured | share | the bound is of |",
        "|---|---|---|---|---|---|---|",
    ]
    for whose, name, chips, images, measured in MEASURED:
        chip = (CHIPS | GPUS)[name]
        memory = 2 * 3 * 4 * scalars  # parameters and two moments, in float32
        sent = wire_bytes("all-reduce", 2 * scalars, chips)
        times = roofline(chip, images * flops, memory, sent, 0.0)
        most = images / times.step_seconds
        lines.append(
            f"| {whose} | {chips} {name} | {images} | {most:.0f} images/s | {measured} | {measured / most:.0%} | "
            f"{times.limiter} |"
        )
    return lines


def main(argv) -> None:
    del argv
    print("\n".join(rows(PRESET.value)))


if __name__ == "__main__":
    run_program(main)
