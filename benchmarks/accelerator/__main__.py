"""Measures what an accelerator makes of this project: no data, no weights, no network; 8 minutes on one GPU.

    python -m benchmarks.accelerator --output=results.jsonl            # compiles there
    python -m benchmarks.accelerator --preset=tiny                     # all parts on a CPU, in a minute

Each figure is a line of JSON on stdout (and in --output) as soon as it is known: a run that is cut short has said what
it knew. Each part is a process of its own with a time limit; where one fails or takes too long, the next one starts.
Parts, in the order of what they are worth: cold_start (by phase), text_step (Stable Diffusion's network and objective,
as MLPerf trains them, with and without EMA), set_step (M2M-Self), warm_start, sampling (0 to 24 context images, guided
and not), autoencoder, input (no device), diffusers (under torch.compile, where torch is there). Of each kind of program
the first is traced, and its 20 longest kernels named. The state is random, and so is the data.

Programs can be compiled before, on a machine without the chip, in an environment with `requirements-cuda.txt`:

    nice python -m benchmarks.accelerator --compile_only=DIR --chip=h100   # here: minutes of a core each
    python -m benchmarks.accelerator --executables=DIR                     # there: all is measuring

Both need the same JAX; where versions differ it says so, and compiles there. **Loading an executable unpickles it,
which can run anything: load only files that you made yourself.** Each has its sha256 beside it (`executable.py`), which
tells damage, not malice. Nothing is autotuned in what was compiled without the chip.

`python -m benchmarks.accelerator.document results.jsonl` writes docs/accelerators.md.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from m2m_jax.core.options import Options, option
from m2m_jax.core.program import command_line, define_flags, run_program

PRESETS = ("full", "tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measuring(Options):
    """What is measured, and where its programs come from."""

    preset: str = option("Sizes: of Stable Diffusion 2.1, or of a test.", "full", choices=PRESETS)
    only: tuple[str, ...] = option("Parts, or with --compile_only programs; all if not given.", ())
    seconds: float = option("Of all parts together.", 480.0, low=1)
    output: Path | None = option("File that gets the lines, too.", None)
    compile_only: Path | None = option("Compile all programs into this folder, and measure nothing.", None)
    chip: str = option("Of --compile_only: a100, b200, h100, h200; or here: this machine's.", "h100")
    executables: Path | None = option("Folder that --compile_only made: **your own**, for it is unpickled.", None)
    part: str = option("Of this program's own processes: the part that this one runs.", "")


OPTIONS = define_flags(Measuring)


class Lines:
    """Print lines of JSON, with seconds since the start, and write them to a file."""

    def __init__(self, output: Path | None):
        self.started = time.monotonic()
        self._file = output.open("a", encoding="utf-8") if output else None

    def say(self, **figures) -> None:
        line = json.dumps({"t": round(time.monotonic() - self.started, 1)} | figures)
        print(line, flush=True)
        if self._file:
            print(line, file=self._file, flush=True)


def run_in_process(name: str, limit: float, options: Measuring, environment: dict[str, str], lines: Lines) -> None:
    """Run a part, pass on what it says, and end it after `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={name}", f"--preset={options.preset}"]
    command += [f"--executables={options.executables}"] if options.executables else []
    environment = environment | {"M2M_BEGAN": repr(time.time())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def end() -> None:
            ended.set()
            process.kill()

        watch = threading.Timer(limit, end)
        watch.start()
        for line in process.stdout:
            if line.startswith("{"):
                lines.say(**json.loads(line))
            else:
                print(line, end="", file=sys.stderr)
        process.wait()
        watch.cancel()
    if ended.is_set():
        lines.say(part=name, ended=f"after {limit:.0f} s, its limit")
    elif process.returncode:
        lines.say(part=name, ended=f"with exit code {process.returncode}")


def measure_all(options: Measuring) -> int:
    """Run the parts one after another."""
    from benchmarks.accelerator.parts import PARTS
    from benchmarks.accelerator.sizes import SIZES

    for name in options.only:
        PARTS.choose(name)
    patience = SIZES[options.preset].patience
    lines = Lines(options.output)
    lines.say(command=command_line("benchmarks.accelerator"), began=time.strftime("%Y-%m-%d"))
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        for name, part in PARTS.items():
            left = options.seconds * patience - (time.monotonic() - lines.started)
            if options.only and name not in options.only:
                continue
            if left < 5:
                lines.say(part=name, skipped="no time left")
                continue
            run_in_process(name, min(part.limit * patience, left), options, environment, lines)
    lines.say(done=True)
    return 0


def main(argv) -> int:
    del argv
    options = OPTIONS()
    if options.compile_only:
        from benchmarks.accelerator.ahead import compile_all

        lines = Lines(options.output)
        return compile_all(options.preset, options.compile_only, options.chip, options.only, lines.say)
    if options.part:
        from benchmarks.accelerator.parts import run_part
        from benchmarks.accelerator.sizes import SIZES

        began = float(os.environ.get("M2M_BEGAN", time.time()))
        run_part(options.part, SIZES[options.preset], options.executables, began)
        return 0
    return measure_all(options)


if __name__ == "__main__":
    run_program(main)
