"""A build of image sets that is killed with SIGKILL again and again, and started again with the same command, is the
build that nobody killed, byte for byte.

    PYTHONPATH=. python tests/soak_builds.py --kills=10                  # docs/mis.md has what it printed
    PYTHONPATH=. python tests/soak_builds.py --kills=10 --processes=2 --captions=1200    # both are killed at once

An unbroken build first. Then one that is killed at moments drawn from --seed: every fourth while it starts, the others
while it makes the shard that it has come to, after a number of new ones. At last it is left to finish.
"""

import itertools
import pathlib
import shutil
import statistics
import sys
import tempfile

from absl import app, flags
from build_fixtures import differences, write_captions
from killed_builds import Builds, draw_moments, table
from text_fixtures import make_stable_diffusion

from m2m_jax.data import mis

KILLS = flags.DEFINE_integer("kills", 10, "How often the build is killed.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
PROCESSES = flags.DEFINE_integer("processes", 1, "That share the shards.")
CAPTIONS = flags.DEFINE_integer("captions", 600, "Sets to build.")


def main(argv):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="killed_builds"))
    print(f"in {folder}, which stays where something is wrong", flush=True)
    captions = write_captions(folder / "captions.txt", CAPTIONS.value)
    builds = Builds(captions, make_stable_diffusion(folder / "generator"), folder / "cache")
    devices = (1,) * PROCESSES.value
    builds.finish(folder / "warm", devices)  # compiles
    seen = builds.finish(folder / "unbroken", devices)
    shard = statistics.mean(b - a for a, b in itertools.pairwise(seen))
    kills = []
    for moment in draw_moments(KILLS.value, len(seen), SEED.value):
        kill = builds.kill(folder / "killed", moment, seen[0], shard, devices)
        if kill is None:
            sys.exit("the build ended before it was killed: it needs more --captions")
        kills.append(kill)
    left = builds.finish(folder / "killed", devices)
    wrong = differences(folder / "unbroken", folder / "killed")
    wrong += [f"two unbroken builds differ: {name}" for name in differences(folder / "warm", folder / "unbroken")]
    manifest = mis.read_manifest(folder / "killed")
    writing = sum(bool(kill.unfinished) for kill in kills)
    verdict = f"NOT the build that nobody killed: {'; '.join(wrong)}" if wrong else "the unbroken build, byte for byte"
    print(
        f"{manifest.sets} sets, {manifest.images} images, {len(seen)} shards, the first after {seen[0]:.1f} s, then "
        f"one in {1e3 * shard:.0f} ms; {PROCESSES.value} process(es), seed {SEED.value}.\n"
        f"{len(kills)} kills, {writing} of them while a file was written; the last start made {len(left)} shards.\n\n"
        f"{table(kills)}\n\n**{verdict}**\n"
    )
    if wrong:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
