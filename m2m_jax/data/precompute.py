"""Encode a data set once: training then reads latents and needs no pass through the encoder.

    python -m m2m_jax.data.precompute --config configs/emoji.py --split=train --output=data/latents
    python -m m2m_jax.data.precompute --config configs/emoji.py --split=validation --output=data/latents
    python -m m2m_jax.train --config configs/emoji.py --workdir runs/emoji --config.data.name=precomputed \
        --config.data.path=data/latents --config.data.augment.enabled=False

Every set of the config's data set becomes one record (`records.py`) with the latents of all its images: on white, at
data.image_size, the posterior's mean times the scaling factor, which is what training computes on the fly. Nothing is
augmented, for one augmentation has to be drawn for each set and step: training with augmentation encodes on the fly,
and data.name=precomputed refuses data.augment.enabled. Which images of a set are used, and in which order, is still
drawn at training time. Latents are bound to the weights that made them; training with others is refused.

Shards appear whole: a run that was interrupted, or killed, goes on with the first shard that is missing. SIGTERM and
Ctrl-C end it after the shard being made. Several processes, also on several hosts with one file system, share the
shards of a split where each is told its --process_index and --process_count; processes that M2M_PROCESSES joins
(`runtime.py`) know theirs, and end when all shards are there. Layout of the folder: `precomputed.py`.
"""

from m2m_jax.building.options import Precomputation
from m2m_jax.config_flag import define_config_flag
from m2m_jax.core.program import command_line, define_flags, run_program
from m2m_jax.core.work_sharing import SHARE_FLAGS

CONFIG = define_config_flag()
OPTIONS = define_flags(Precomputation)


def main(argv) -> int:
    from m2m_jax.building.latents import precompute

    return precompute(CONFIG.value, OPTIONS(), command=command_line("m2m_jax.data.precompute", without=SHARE_FLAGS))


if __name__ == "__main__":
    run_program(main, CONFIG.take)
