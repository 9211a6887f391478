"""Sets from sets, many of them, to be scored: of each set some images are given, and further ones are made.

    python -m m2m_jax.generate --checkpoint=runs/emoji --data=data:test --given=4 --num_images=4 --num_sets=500 \
        --output=made
    python -m m2m_jax.score --generated=made --real=data:test --given=4 --output=scores

The folder says what made its sets (`generated.json`: hashes of model and data, settings, seed). The same command goes
on where it was stopped or killed; another one is refused there. Several processes share the shards where each is told
its --process_index and --process_count, or where M2M_PROCESSES joins them. How to call it from Python, and what the
images depend on: `sampling/generation.py`. Layout of the folder: `data/generated.py`.
"""

from m2m_jax.core.program import define_flags, run_program
from m2m_jax.sampling.generation_options import SetGeneration
from m2m_jax.sampling.options import ChosenSettings

OPTIONS = define_flags(SetGeneration)
SETTINGS = define_flags(ChosenSettings)


def main(argv) -> int:
    options, settings = OPTIONS(), SETTINGS().explicit()
    from m2m_jax.sampling.generation import generate_sets

    return generate_sets(options, **settings)


if __name__ == "__main__":
    run_program(main)
