"""Fuzzes the targets of `fuzz_targets.py`: `make fuzz`. Prints what ran as a table in Markdown.

Each target runs in a process of its own, so that a crash of native code is a finding and not the end.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
LIMIT = 3600  # seconds of a target


@dataclasses.dataclass
class Counts:
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0


def explore(name: str, examples: int, seed: int) -> Counts:
    """Runs a target on so many mutations. Raises what it raises, with the smallest mutation that does."""
    import hypothesis
    from fuzz_targets import TARGETS
    from hypothesis import HealthCheck, Phase, Verbosity

    from m2m_jax.core.errors import UserError

    target, counts = TARGETS[name], Counts()
    with tempfile.TemporaryDirectory() as root:
        prepared_in = pathlib.Path(root) / "prepared"
        prepared_in.mkdir()
        prepared = target.prepare(prepared_in)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # to shrink a finding takes longer than to understand it
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @hypothesis.given(target.strategy)
        def fuzz(example):
            # Not the clock's: on a busy machine that says nothing.
            folder, start = pathlib.Path(tempfile.mkdtemp(dir=root)), time.process_time()
            try:
                target.run(prepared, folder, example)
                counts.accepted += 1
            except UserError as error:
                # Names may hold anything; `refuse` makes one line of it.
                assert str(error).strip()
                counts.refused += 1
            finally:
                shutil.rmtree(folder)
            seconds = time.process_time() - start
            assert seconds < target.slow, f"{seconds:.1f} s"
            counts.slowest = max(counts.slowest, seconds)

        fuzz()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="Only this one, in this process.")
    parser.add_argument("--examples", type=int, help="Mutations of each target, in place of its own number.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import conftest  # noqa: F401 (JAX as the tests have it)

    if options.target:
        with contextlib.redirect_stdout(io.StringIO()):
            counts = explore(options.target, options.examples, options.seed)
        print(json.dumps(dataclasses.asdict(counts)))
        return 0

    from fuzz_targets import TARGETS

    print("| target | mutations | accepted | refused | slowest, s of CPU | failures |\n|---|--:|--:|--:|--:|---|")
    total, failed = Counts(), []
    for name, target in TARGETS.items():
        command = [sys.executable, __file__, f"--target={name}", f"--seed={options.seed}"]
        command.append(f"--examples={options.examples or target.many}")
        try:
            # Python reports where a crash was, to stderr.
            child = subprocess.run(
                command,
                env=os.environ | {"PYTHONFAULTHANDLER": "1", "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
            failure = "" if child.returncode == 0 else f"exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"still running after {LIMIT} s"
        if failure:
            failed.append((name, child.stderr[-6000:] if "code" in failure else ""))
            print(f"| {name} | | | | | {failure} |", flush=True)
            continue
        counts = Counts(**json.loads(child.stdout.splitlines()[-1]))
        ran = counts.accepted + counts.refused
        print(f"| {name} | {ran} | {counts.accepted} | {counts.refused} | {counts.slowest:.1f} | none |", flush=True)
        total.accepted += counts.accepted
        total.refused += counts.refused
    print(f"| together | {total.accepted + total.refused} | {total.accepted} | {total.refused} | | {len(failed)} |")
    for name, errors in failed:
        print(f"\n{name}\n{errors}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
