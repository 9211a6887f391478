"""From the start of the process to the first image: `m2m_jax.sample`, and the sampler binary with a bundle.

    make demo && make sampler && python -m benchmarks.start_up --checkpoint=runs/demo

Each with an empty compilation cache (cold) and with what the first call left there (warm). One image without context.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run.", required=True)
BINARY = flags.DEFINE_string("binary", "dist/m2m-sample.pyz", "What `make sampler` wrote.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Calls of each kind; the fastest counts.")


def until_first_image(command: list[str], cache: Path) -> float:
    """Seconds until the program says that it has one."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if ": image 1 of" in line:
                taken = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return taken


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        export = [sys.executable, "-m", "m2m_jax.export", f"--checkpoint={CHECKPOINT.value}"]
        subprocess.run([*export, f"--output={root / 'bundle'}"], check=True, stdout=subprocess.DEVNULL)
        one = ["--num_images=1", f"--output={root / 'out'}"]
        programs = {
            "`python -m m2m_jax.sample`": [sys.executable, "-m", "m2m_jax.sample", f"--checkpoint={CHECKPOINT.value}"],
            "`m2m-sample.pyz`": [sys.executable, BINARY.value, f"--bundle={root / 'bundle'}"],
        }
        times = {name: {"cold": [], "warm": []} for name in programs}
        for number in range(ROUNDS.value):
            for i, (name, command) in enumerate(programs.items()):
                cache = root / f"cache{number}{i}"
                for kind in ("cold", "warm"):
                    times[name][kind].append(until_first_image([*command, *one], cache))
    print("| program | cold cache, s | warm cache, s |\n|---|---|---|")
    for name, kinds in times.items():
        print(f"| {name} | {min(kinds['cold']):.1f} | {min(kinds['warm']):.1f} |")


if __name__ == "__main__":
    app.run(main)
