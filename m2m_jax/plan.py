"""Plans training, and sampling: `python -m m2m_jax.plan --config configs/mis_sd21_self.py --topology v5p:4x4x4`.

Compiles the training step of a config for TPUs or GPUs, on a machine that has none, and says whether it fits into their
memory, what takes it, how fast a step can be at most and what limits it. Needs `pip install -r requirements-tpu.txt`,
or for GPUs requirements-cuda.txt, and minutes where the model is large; neither data nor weights. GPUs are planned by
formula, within seconds, where that is not installed. Folders of frozen models that are not there are taken for
Stable Diffusion's autoencoder and DINOv2. The evaluation, which keeps no gradients, is not compiled.

Exit code 0: it fits; 1: it does not, and what to change is said; 2: bad input.

    --job sample             what sampling takes, sets shared evenly by the devices: --sets_per_device
    --job build_mis          what it takes to build image sets from --captions with the config's U-Net, at --mfu of the
                             peak, by formula: chip-hours and storage
    --topology v5p:4x4x4     chips of v4, v5e, v5p, v6e or tpu7x, and how they are connected
                             a100, b200, h100, h200, l4 and how many a node has: h100:8
    --formula                of GPUs: compile nothing, and answer within seconds
    --slices 2               as many such slices or nodes, connected by the data-centre network
    --search                 tries meshes and batch sizes, and says which promises most images a second
    --hlo FILE               where to write the compiled step, as XLA prints it
    --json                   for machines
"""

from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import define_flags, run_program
from m2m_jax.planning.options import Planning

CONFIG = define_config_flag()
OPTIONS = define_flags(Planning)


def main(argv) -> int:
    options = OPTIONS()
    from m2m_jax.planning.jobs import plan

    planned = plan(CONFIG.value, options)
    print(planned.json_text() if options.json else planned.text)
    return 0 if planned.fits else 1


if __name__ == "__main__":
    run_program(main, CONFIG.take)
