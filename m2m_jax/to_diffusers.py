"""Save the EMA of a run as a model folder in diffusers' layout.

    python -m m2m_jax.to_diffusers --checkpoint runs/emoji_vae --output pretrained/vae

An autoencoder's scaling factor is measured over 50 batches of its training data, so that its
latents have unit standard deviation. Beside a U-Net the schedule that it was trained under is saved. The folder of an
M2M model can be sampled from, like a checkpoint; it names the folders of its frozen models, which stay where they are.
"""

from m2m_jax.building.options import ModelExport
from m2m_jax.core.program import define_flags, run_program

OPTIONS = define_flags(ModelExport)


def main(argv):
    from m2m_jax.building.model_folder import save_model_folder

    print(save_model_folder(OPTIONS()))


if __name__ == "__main__":
    run_program(main)
