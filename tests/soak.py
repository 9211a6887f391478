"""A run killed with SIGKILL again and again, and started again with the same command, is the run that nobody killed.

    python tests/soak.py --kills=20                  # or: make soak; docs/resilience.md has what it printed
    python tests/soak.py --kills=20 --processes=2    # both processes are killed at once

An unbroken run of `configs/emoji.py:tiny` first, twice, and the two compared: what they do not share no resumed run
could. Then one that is killed at moments drawn from --seed, evenly over the life of the unbroken run: while it starts,
compiles, trains, evaluates, samples and ends; every fourth while a checkpoint is written. At last it is left to finish,
and compared with the unbroken one bit for bit: see `compare_runs.differences`.
"""

import pathlib
import shutil
import sys
import tempfile

from absl import app, flags, logging
from compare_runs import differences, summary
from killed_runs import ROOT, Launch, draw_moments, killed_run, table, unbroken_run

STEPS, CHECKPOINT_EVERY = 60, 5
DEVICES = 2
CONFIG = (
    f"--config={ROOT / 'configs' / 'emoji.py'}:tiny",
    "--config.data.log_examples=True",
    f"--config.train.steps={STEPS}",
    f"--config.checkpoint.every={CHECKPOINT_EVERY}",
    "--config.eval.every=8",  # not with the checkpoints, so that some evaluations come twice
)

KILLS = flags.DEFINE_integer("kills", 20, "How often the run is killed.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Of the run; more than one by launch/local.sh.")
DATA = flags.DEFINE_string("data", str(ROOT / "data"), "Where the emoji data set was prepared.")


def main(argv):
    logging.set_verbosity(logging.ERROR)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak"))
    print(f"in {folder}, which stays where something is wrong", flush=True)
    arguments = [*CONFIG, f"--config.data.directory={DATA.value}"]
    launch = Launch(arguments, PROCESSES.value, DEVICES // PROCESSES.value, folder / "cache")
    unbroken_run(launch, folder / "unbroken")
    again = unbroken_run(launch, folder / "control")
    wrong = differences(folder / "unbroken", folder / "control", STEPS)
    if wrong:
        sys.exit("\n".join(["two unbroken runs are not the same:", *wrong]))
    kills = killed_run(launch, folder / "killed", again, draw_moments(again, KILLS.value, SEED.value))
    wrong = differences(folder / "unbroken", folder / "killed", STEPS)
    during, early = sum(bool(kill.unfinished) for kill in kills), sum(not kill.step for kill in kills)
    verdict = f"NOT the run that nobody killed: {'; '.join(wrong)}" if wrong else "bit-identical to the unbroken run"
    print(
        f"{STEPS} steps, unbroken in {again.seconds:.0f} s, a checkpoint every {CHECKPOINT_EVERY}; "
        f"{PROCESSES.value} process(es), {DEVICES} devices, seed {SEED.value}. {len(kills)} kills, {during} of them "
        f"during a checkpoint's write, {early} before the first step of that start.\n\n{table(kills)}\n\n"
        f"Compared: {summary(folder / 'unbroken', STEPS)}.\n\n**{verdict}**\n"
    )
    if wrong:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
