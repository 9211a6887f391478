"""Runs that are started, watched from outside, and killed with SIGKILL: what tests/soak.py and the tests share."""

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.002
UNFINISHED = ".orbax-checkpoint-tmp"  # how the name of a checkpoint ends while it is written


def xla_flags(devices: int) -> str:
    """For a process with so many of them; what else is set stays."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()


class Leg:
    """One start of the run, up to its end or to its kill. `poll` looks at what it prints and writes."""

    def __init__(
        self, command: Sequence[object], workdir: pathlib.Path, log: pathlib.Path, environment: dict[str, str]
    ):
        self._checkpoints, self._log = workdir / "checkpoints", log
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # whose processes are found again, in whatever groups
            )
        self._started, self._ended, self.killed = time.monotonic(), None, False
        self._writing_since: float | None = None
        self.step_seconds: dict[int, float] = {}  # step -> when it was seen to be done, after the start
        self.write_seconds: list[float] = []  # that checkpoints took

    @property
    def seconds(self) -> float:
        """Since the start, to the end if there was one."""
        return (self._ended or time.monotonic()) - self._started

    @property
    def step(self) -> int:
        """The last that was done; 0 before."""
        return max(self.step_seconds, default=0)

    @property
    def saved(self) -> int:
        """The last step that has a whole checkpoint; 0 before."""
        return max((int(name) for name in self._saves() if name.isdigit()), default=0)

    @property
    def resumed(self) -> int | None:
        """The step it was taken up at; None where it did not come so far as to say."""
        found = re.search(r"resumed at step (\d+)", self.printed)
        return int(found[1]) if found else 0 if "from scratch" in self.printed else None

    @property
    def printed(self) -> str:
        """By all its processes, so far."""
        return self._log.read_text()

    def poll(self) -> bool:
        """Waits a moment; whether the run still lives."""
        time.sleep(POLL_SECONDS)
        done = [int(step) for step in re.findall(r"^step +(\d+)/", self.printed, re.MULTILINE)]
        for step in done:
            self.step_seconds.setdefault(step, self.seconds)
        # What a killed leg left is cleared away before the first step.
        if done and self.unfinished() and self._writing_since is None:
            self._writing_since = self.seconds
        elif self._writing_since is not None and not self.unfinished():
            self.write_seconds.append(self.seconds - self._writing_since)
            self._writing_since = None
        return self._process.poll() is None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint was being written at the last `poll`."""
        return self._writing_since is not None

    def unfinished(self) -> str:
        """The checkpoint that is not whole yet, or was not when the run died; '' where there is none."""
        return next((name for name in self._saves() if name.endswith(UNFINISHED)), "")

    def _saves(self) -> list[str]:
        return os.listdir(self._checkpoints) if self._checkpoints.exists() else []

    def kill(self) -> None:
        """All its processes at once, with no chance to say goodbye."""
        # The launcher first, or it would see what happens to the others.
        self._process.kill()
        for name in os.listdir("/proc"):
            with contextlib.suppress(ProcessLookupError):
                if name.isdigit() and os.getsid(int(name)) == self._process.pid:
                    os.kill(int(name), signal.SIGKILL)
        self._end()
        self.killed = True

    def finish(self) -> None:
        """Until it ends by itself. Raises RuntimeError with what it printed where it ends badly."""
        while self.poll():
            pass
        self._end()
        if self._process.returncode:
            raise RuntimeError(f"exit code {self._process.returncode}:\n{self.printed[-4000:]}")

    def _end(self) -> None:
        self._process.wait()
        self._ended = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Moment:
    """To die at. step 0: after `share` of the start-up; else `seconds` after that step was done.

    in_write: of the first checkpoint that is written from then on, after `share` of what writing takes.
    """

    step: int
    seconds: float = 0.0
    share: float = 0.0
    in_write: bool = False


@dataclasses.dataclass
class Kill:
    """What was seen of one: seconds after the start, the last step done (0: none), the checkpoint being written
    ('': none), and where the next start resumed."""

    seconds: float
    step: int
    unfinished: str
    resumed: int | str | None = None


def draw_moments(unbroken: Leg, kills: int, seed: int) -> list[Moment]:
    """One in each of as many equal parts of the life of `unbroken`; every fourth waits for the write of a checkpoint.

    In the order of that life; but a start-up is as good as any other for the kills of the first.
    """
    rng = random.Random(seed)
    times, life = unbroken.step_seconds, unbroken.seconds
    moments, starts = [], []
    for number in range(kills):
        at, share = life * (number + rng.random()) / kills, rng.random()
        step = max((step for step, seen in times.items() if seen <= at), default=0)
        if not step:
            starts.append(Moment(step=0, share=at / times[1]))
        elif number % 4 == 3 and step < max(times):
            moments.append(Moment(step=step, share=share, in_write=True))
        else:
            moments.append(Moment(step=step, seconds=at - times[step]))
    for start in starts:
        moments.insert(rng.randint(0, len(moments)), start)
    return moments


class Launch:
    """The very same command again and again, each with a workdir."""

    def __init__(self, arguments: Sequence[object], processes: int, devices: int, cache: pathlib.Path):
        """
        Args:
            arguments: of m2m_jax.train.
            processes, devices: how many, and of each; more than one process by launch/local.sh.
            cache: where compiled programs are kept.
        """
        self._command = [sys.executable, "-m", "m2m_jax.train", *arguments]
        if processes > 1:
            launcher = [ROOT / "launch" / "local.sh", f"--processes={processes}", f"--devices={devices}"]
            self._command = [*launcher, "--restarts=0", f"--python={sys.executable}", "--", *arguments]
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }

    def start(self, workdir: pathlib.Path, log: pathlib.Path) -> Leg:
        """One start."""
        return Leg([*self._command, f"--workdir={workdir}"], workdir, log, self._environment)


def unbroken_run(launch: Launch, workdir: pathlib.Path) -> Leg:
    """From its start to its end."""
    leg = launch.start(workdir, workdir.with_suffix(".log"))
    leg.finish()
    return leg


def killed_run(launch: Launch, workdir: pathlib.Path, unbroken: Leg, moments: Sequence[Moment]) -> list[Kill]:
    """One that dies at each of `moments`, and is then left to finish. `unbroken`: a leg that was not killed."""
    start_up, write = unbroken.step_seconds[1], statistics.median(unbroken.write_seconds)
    left, kills, number = list(moments), [], 0
    while True:
        leg = launch.start(workdir, workdir.with_suffix(f".{number}.log"))
        if not left:
            leg.finish()
        elif _live_until(leg, left.pop(0), start_up, write):
            leg.kill()
        else:  # Resumed beyond the moment, it ended before. A finished run must survive a kill, too.
            leg.finish()
            left.append(Moment(step=0, share=0.5))
        if kills and kills[-1].resumed is None:
            kills[-1].resumed = leg.resumed if leg.resumed is not None else "killed before"
        if leg.killed:
            # Before the first step nothing is written: what lies there, another kill left.
            kills.append(Kill(leg.seconds, leg.step, leg.unfinished() if leg.step else ""))
        elif not left:
            return kills
        start_up = min(leg.step_seconds.values(), default=start_up)
        number += 1


def _live_until(leg: Leg, moment: Moment, start_up: float, write: float) -> bool:
    """Returns at `moment`, or when the run has ended before: whether it still lives.

    start_up: seconds from the start to the end of the first step. write: seconds that a checkpoint takes.
    """

    def wait_until(reached) -> bool:
        while not reached():
            if not leg.poll():
                return False
        return True

    if not moment.step:
        return wait_until(lambda: leg.seconds >= moment.share * start_up)
    if not wait_until(lambda: leg.step >= moment.step and (leg.writing or not moment.in_write)):
        return False
    until = leg.seconds + (moment.share * write if moment.in_write else moment.seconds)
    return wait_until(lambda: leg.seconds >= until)


def table(kills: Sequence[Kill]) -> str:
    """Markdown: a row a kill."""
    lines = [
        "| kill | seconds after the start | last step done | checkpoint being written | resumed at step |",
        "|---|---|---|---|---|",
    ]
    for number, kill in enumerate(kills, start=1):
        step = kill.step or "none yet"
        lines.append(f"| {number} | {kill.seconds:.2f} | {step} | {kill.unfinished or '-'} | {kill.resumed} |")
    return "\n".join(lines)
