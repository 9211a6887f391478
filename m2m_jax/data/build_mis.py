"""Make image sets from captions: each set is one caption, drawn again and again from other noise ("MIS").

    python -m m2m_jax.data.build_mis --captions=captions.tsv --generator=stable-diffusion-2-1-base --output=data \
        --guidance_scale=7.5
    python -m m2m_jax.train --config configs/mis_sd21_self.py --config.data.name=mis --config.data.path=data ...

Captions are read from the files that `captions.py` knows, and cleaned. The generator is a Stable Diffusion folder, or a
run of this project's text-to-image task; this project's own models run either. A run knows how it samples; for a folder
that is 50 steps of ddim with a guidance scale of 7.5 (FOLDER_SETTINGS of `sampling/text_to_image.py`), where flags do
not say otherwise.

Image j of the caption in row i is made from noise of (--seed, i, j) alone, so any shard can be made again by itself.
Builds with the same settings agree byte for byte, whatever the number of devices and processes, where they run the same
kernels: one kind of CPU does. For GPUs XLA takes the kernels that it finds fastest, which may differ in the last bit.

Shards appear whole: a build that was interrupted, or killed, goes on with the first shard that is missing. SIGTERM and
Ctrl-C end it after the images being made; the shard that was begun is left out. Several processes, also on several
hosts with one file system, share the shards where each is told its --process_index and --process_count; processes that
M2M_PROCESSES joins (`runtime.py`) know theirs. Whichever ends last writes the manifest; of joined ones the first does.
A folder that holds another build is refused. Layout of the folder: `mis.py`.

Captions and sets are cleaned by rules, a flag each (`building/caption_rules.py`, `building/cleaning.py`). How many
each rule dropped stands in the manifest.
"""

from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.building.cleaning import SetRules
from m2m_jax.building.options import SetBuild
from m2m_jax.core.program import command_line, define_flags, run_program
from m2m_jax.core.work_sharing import SHARE_FLAGS

OPTIONS = define_flags(SetBuild)
# One rule has the same name for captions and for images.
CAPTION_RULES = define_flags(CaptionRules, {"drop_duplicates": "drop_duplicate_captions"})
SET_RULES = define_flags(SetRules, {"drop_duplicates": "drop_duplicate_images"})


def main(argv) -> int:
    options, caption_rules, set_rules = OPTIONS(), CAPTION_RULES(), SET_RULES()
    from m2m_jax.building.build_sets import build_sets

    command = command_line("m2m_jax.data.build_mis", without=SHARE_FLAGS)
    return build_sets(options, caption_rules, set_rules, command=command)


if __name__ == "__main__":
    run_program(main)
