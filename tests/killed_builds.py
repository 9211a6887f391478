"""Builds of image sets that are started, watched from outside, and killed with SIGKILL: what tests/soak_builds.py and
the tests share."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

from build_fixtures import arguments
from killed_runs import xla_flags
from run_fixtures import ROOT

from m2m_jax.data import mis

_POLL_SECONDS = 0.001


@dataclasses.dataclass(frozen=True)
class Moment:
    """To die at: after `share` of the start-up where `shards` is None; else after so many new shards, and then after
    `share` of what one takes."""

    share: float
    shards: int | None = None


@dataclasses.dataclass(frozen=True)
class Kill:
    """What was seen of one: seconds after the start, shards that this start had made and that were there in all, and
    which files were being written."""

    seconds: float
    made: int
    there: int
    unfinished: tuple[str, ...]


class Builds:
    """The same command again and again."""

    def __init__(self, captions: pathlib.Path, generator: pathlib.Path, cache: pathlib.Path):
        """cache: where compiled programs are kept."""
        self._captions, self._generator, self._cache = captions, generator, cache

    def start(self, output: pathlib.Path, devices: Sequence[int] = (1,)) -> list[subprocess.Popen]:
        """As many processes as there are numbers of devices; they write what they print beside `output`."""
        command = [sys.executable, "-m", "m2m_jax.data.build_mis"]
        command += arguments(self._captions, self._generator, output)
        started = []
        for index, number in enumerate(devices):
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": xla_flags(number),
                "JAX_COMPILATION_CACHE_DIR": str(self._cache),
            }
            own = [] if len(devices) == 1 else [f"--process_index={index}", f"--process_count={len(devices)}"]
            with output.with_suffix(f".{index}.log").open("w") as log:
                process = subprocess.Popen([*command, *own], env=environment, stdout=log, stderr=log, cwd=ROOT)
            started.append(process)
        return started

    def finish(self, output: pathlib.Path, devices: Sequence[int] = (1,)) -> list[float]:
        """Until they end. Seconds after the start that each new shard was there. RuntimeError where one ends badly."""
        before, started, seen = shards(output), time.monotonic(), []
        processes = self.start(output, devices)
        while any(process.poll() is None for process in processes):
            seen += [time.monotonic() - started] * (len(shards(output)) - len(before) - len(seen))
            time.sleep(_POLL_SECONDS)
        for index, process in enumerate(processes):
            if process.returncode:
                printed = output.with_suffix(f".{index}.log").read_text()
                raise RuntimeError(f"exit code {process.returncode}:\n{printed[-4000:]}")
        return seen

    def kill(
        self, output: pathlib.Path, moment: Moment, start_up: float, shard: float, devices: Sequence[int] = (1,)
    ) -> Kill | None:
        """Starts and kills; None where it ended before.

        start_up, shard: seconds to the first shard, and from one to the next.
        """
        before, started = shards(output), time.monotonic()
        processes = self.start(output, devices)

        def made() -> int:
            return len(shards(output)) - len(before)

        def until(reached) -> bool:
            while not reached():
                if all(process.poll() is not None for process in processes):
                    return False
                time.sleep(_POLL_SECONDS)
            return True

        if moment.shards is None:
            alive = until(lambda: time.monotonic() - started >= moment.share * start_up)
        else:
            # The first new shard is found begun: until then it starts up.
            alive = until(lambda: made() >= moment.shards and (made() or unfinished(output)))
            begun = time.monotonic()
            alive = alive and until(lambda: time.monotonic() - begun >= moment.share * shard)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
        if not alive or -signal.SIGKILL not in codes:
            return None
        return Kill(time.monotonic() - started, made(), len(shards(output)), tuple(unfinished(output)))


def shards(output: pathlib.Path) -> list[str]:
    """Those that are done."""
    return [name for name in _names(output) if name.startswith("mis-") and name.endswith(".json")]


def unfinished(output: pathlib.Path) -> list[str]:
    """Files that are being written, or were when their writer died."""
    return [name for name in _names(output) if name.endswith(".partial")]


def _names(output: pathlib.Path) -> Iterable[str]:
    folder = mis.folder(output)
    return os.listdir(folder) if folder.exists() else []


def draw_moments(kills: int, shards_to_make: int, seed: int) -> list[Moment]:
    """In the order of the build, so spread that it is not done before the last of them."""
    rng = random.Random(seed)
    most = max(0, int(shards_to_make / (kills + 1)))  # that one start may make
    return [
        Moment(rng.random()) if number % 4 == 0 else Moment(rng.random(), rng.randint(0, most))
        for number in range(kills)
    ]


def table(kills: Sequence[Kill]) -> str:
    """Markdown: a row a kill."""
    lines = [
        "| kill | seconds after the start | shards made by this start | shards there | being written |",
        "|---|---|---|---|---|",
    ]
    for number, kill in enumerate(kills, start=1):
        written = ", ".join(name.split(".partial")[0].rpartition(".")[0].lstrip(".") for name in kill.unfinished) or "-"
        lines.append(f"| {number} | {kill.seconds:.2f} | {kill.made} | {kill.there} | {written} |")
    return "\n".join(lines)
