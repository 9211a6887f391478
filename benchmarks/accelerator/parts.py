"""The parts of the measurement. Each runs in a process of its own, says what it knows when it knows it, and may fail.

@PARTS.register("decoding")
class Decoding(Part):
    limit = 30
    def run(self, session): ...session.say(seconds=1.0)
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image

from benchmarks.accelerator import networks
from benchmarks.accelerator.executable import Compiled, compile_program, load, versions
from benchmarks.accelerator.sizes import Size
from benchmarks.accelerator.timing import Running, measure
from benchmarks.accelerator.trace import longest_kernels
from m2m_jax.core import runtime
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.data.pipeline import batches, inputs, make_dataset, open_examples
from m2m_jax.training import sharding
from m2m_jax.training.setup import set_up


@dataclasses.dataclass(frozen=True)
class Session:
    """What a part is given.

    Attributes:
      executables: folder of programs that were compiled before; None: they are compiled here.
      say: prints figures as one line of JSON.
      began: `time.time()` when this process was started.
    """

    size: Size
    executables: Path | None
    say: Callable[..., None]
    began: float

    def get(self, name: str) -> Compiled:
        """Return a program, loaded or compiled."""
        if self.executables:
            try:
                return load(self.executables, name)
            except UserError as error:
                self.say(program=name, note=f"{error}: compiled here")
        return compile_program(networks.make(self.size, name, jax.local_devices(), jax.default_backend()))[0]


class Part:
    """One part. Subclasses set what differs.

    Attributes:
      limit: seconds after which its process is ended.
    """

    limit: ClassVar[float]

    def run(self, session: Session) -> None:
        """Measure, and say the figures."""
        raise NotImplementedError


PARTS = Registry[type[Part]]("part")


class Start(Part):
    """From the start of the process to the end of the second step, by phase: of the text network, the first size."""

    limit = 120

    def run(self, session: Session) -> None:
        last = session.began

        def phase(name: str) -> None:
            nonlocal last
            now = time.time()
            session.say(phase=name, seconds=round(now - last, 2), since_start=round(now - session.began, 2))
            last = now

        phase("import")
        jax.device_put(np.zeros(1), jax.local_devices()[0]).block_until_ready()
        phase("devices")
        size, (images, _) = session.size, session.size.text_steps[0]
        config, task = networks.task_of_text(size, images, jax.default_backend())
        phase("structure")
        params = jax.block_until_ready(task.init())
        phase("random parameters")
        setup = set_up(task, config, sharding.make_mesh(config.mesh, jax.local_devices()[:1]))
        state = jax.block_until_ready(setup.create(params))
        phase("train state")
        del params, state
        compiled = session.get(networks.names(size)["text_step"][0])
        phase("load the step" if session.executables else "trace and compile the step")
        running = Running.start(compiled)
        phase("fill the step's arguments")
        running.call()
        phase("first step")
        running.call()
        phase("second step")


@PARTS.register("cold_start")
class ColdStart(Start):
    """With an empty compilation cache."""


class Steps(Part):
    """Training steps of several sizes: seconds, MFU, memory, and of the first the longest kernels."""

    def run(self, session: Session) -> None:
        kind = next(name for name, part in PARTS.items() if part is type(self))
        traced = False
        for name in networks.names(session.size)[kind]:
            running = None  # memory of the one before
            try:
                running = Running.start(session.get(name))
                for figures in measure(running):
                    session.say(**figures)
                if not traced:
                    session.say(program=name, kernels=longest_kernels(running.call))
                    traced = True
            except Exception as error:  # whatever it is, smaller ones may run
                session.say(program=name, failed=f"{type(error).__name__}: {error}"[:500])


@PARTS.register("text_step")
class TextStep(Steps):
    """The race of MLPerf: Stable Diffusion's own network and objective."""

    limit = 150


@PARTS.register("set_step")
class SetStep(Steps):
    """M2M-Self."""

    limit = 150


@PARTS.register("warm_start")
class WarmStart(Start):
    """With what the cold start left in the compilation cache."""

    limit = 60


@PARTS.register("sampling")
class Sampling(Steps):
    """Denoising with kept images, and keeping one more."""

    limit = 90


@PARTS.register("autoencoder")
class Autoencoder(Steps):
    """Encoding and decoding."""

    limit = 40


@PARTS.register("input")
class Input(Part):
    """Batches of images from PNG files, drawn here; no device takes part."""

    limit = 45
    images: ClassVar[int] = 4  # a set

    def run(self, session: Session) -> None:
        for side in session.size.read_pixels:
            with tempfile.TemporaryDirectory() as folder:
                sets = max(16, session.size.read_sets // (1 + 7 * (side > 256)))
                self._draw(Path(folder), side, sets)
                config = session.size.config(
                    data__name="folder", data__path=folder, data__image_size=side, data__images_per_set=self.images
                )
                config.data.batch_size = 8
                examples = open_examples(config.data, split="train", seed=0)
                dataset = make_dataset(examples, batch_size=8, threads=config.data.threads)
                stream = batches(dataset, 0, config.data.prefetch)
                inputs(next(stream))
                started, count = time.monotonic(), 0
                while time.monotonic() - started < 3:
                    count += len(inputs(next(stream))["images_bnhwc"]) * self.images
                seconds = time.monotonic() - started
                del stream, dataset
                session.say(pixels=side, images_per_second=round(count / seconds, 1), threads=config.data.threads)

    def _draw(self, folder: Path, side: int, sets: int) -> None:
        """Write sets of smooth pictures with some noise: PNG packs neither plain colours nor noise alone."""
        rng = np.random.default_rng(0)
        for number in range(sets):
            (folder / f"set{number:04}").mkdir()
            for i in range(self.images):
                small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((side, side))
                noisy = np.asarray(small, np.int16) + rng.integers(-4, 5, (side, side, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"set{number:04}" / f"{i}.png")


@PARTS.register("diffusers")
class Diffusers(Part):
    """The text network's training step in diffusers under torch.compile, where both are there."""

    limit = 120

    def run(self, session: Session) -> None:
        from benchmarks.accelerator.torch_step import seconds_of_step

        try:
            images, _ = session.size.text_steps[0]
            session.say(program=f"diffusers_{images}", **seconds_of_step(session.size, images))
        except ImportError as error:
            session.say(skipped=str(error))


def run_part(name: str, size: Size, executables: Path | None, began: float) -> None:
    """Run one part in this process: a line of JSON on stdout for each figure, one more where it failed."""

    def say(**figures: Any) -> None:
        print(json.dumps({"part": name} | figures), flush=True)

    try:
        runtime.start()
        say(device=jax.local_devices()[0].device_kind, cores=os.cpu_count(), **versions())
        PARTS.choose(name)().run(Session(size, executables, say, began))
    except UserError:
        raise
    except Exception as error:
        say(failed=f"{type(error).__name__}: {error}"[:500])
        raise
