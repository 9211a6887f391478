"""What it costs that nothing is lost: checkpoints and guards, as shares of the time that training takes.

    make bench-overhead                                  # the demo: its model, data and checkpoint interval
    python -m benchmarks.overhead --config configs/emoji.py:tiny --checkpoint_rounds=2 --guard_rounds=3   # a try

Checkpoints: some steps with a save at their beginning, on disk at their end, against as many without. What is waited
for, the steps that are slower while it is written, checksums and the removal of old checkpoints are all in it; divided
by the time of `config.checkpoint.every` steps.

Guards: `m2m_jax.train`'s step and what its loop asks and looks at after each, against the same step without the test
for finite numbers and the norms of modules, in a loop that only waits for the last step.

The two sides take turns, and the first of a pair is the second of the next; what counts is the median of the pairs'
differences. In brackets, where that median lies with 95 % confidence, whatever the noise looks like.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import optax
from absl import flags

from m2m_jax.checkpoints.checkpointer import Checkpointer
from m2m_jax.config_flag import define_config_flag
from m2m_jax.config_rules import validate
from m2m_jax.core import runtime
from m2m_jax.core.interruption import Interruption
from m2m_jax.core.program import run_program
from m2m_jax.data.pipeline import batches, inputs, make_dataset, open_examples
from m2m_jax.tasks.set_diffusion import SetDiffusion
from m2m_jax.training import sharding
from m2m_jax.training.divergence import Divergence
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.setup import set_up
from m2m_jax.training.throughput import Throughput
from m2m_jax.training.watchdog import Watchdog

CONFIG = define_config_flag()
CHECKPOINT_ROUNDS = flags.DEFINE_integer("checkpoint_rounds", 12, "Pairs with and without a save.")
CHECKPOINT_STEPS = flags.DEFINE_integer("checkpoint_steps", 10, "Of each side of these; a save ends within them.")
GUARD_ROUNDS = flags.DEFINE_integer("guard_rounds", 80, "Pairs with and without guards.")
GUARD_STEPS = flags.DEFINE_integer("guard_steps", 3, "Of each side of these.")

CHECKPOINT_LIMIT, GUARD_LIMIT = 0.02, 0.01  # what is promised


class Training:
    """A run of `config` with its data, guarded as in `m2m_jax.train` and bare."""

    def __init__(self, config, workdir: str, interruption: Interruption, watchdog: Watchdog):
        self.config, self.interruption, self.watchdog = config, interruption, watchdog
        self.mesh = sharding.make_mesh(config.mesh)
        self.task = SetDiffusion(config)
        self.setup = set_up(self.task, config, self.mesh)
        self.frozen = sharding.replicate(self.task.frozen, self.mesh)
        self.checkpoints = Checkpointer(workdir, keep=config.checkpoint.keep)
        examples = open_examples(config.data, split=config.data.train_split, seed=config.seed)
        dataset = make_dataset(examples, batch_size=config.data.batch_size, threads=config.data.threads)
        self.stream = batches(dataset, 0, config.data.prefetch)
        self.divergence = Divergence(config, examples, self.checkpoints, print)
        self.throughput = Throughput(config, self.task.compute_dtype)
        params = self.task.init()
        # Each side has a state of its own: a step takes the buffers of the one before.
        self.guarded_state, self.bare_state = self.setup.create(params), self.setup.create(params)
        batch = self._batch()
        self._guarded = self.setup.step.lower(self.guarded_state, self.frozen, batch).compile()
        self._bare = self._bare_step().lower(self.bare_state, self.frozen, batch).compile()
        self.step = 0  # of the guarded state

    def guarded(self, steps: int) -> None:
        """So many steps as `m2m_jax.train` takes them."""
        for _ in range(steps):
            self.step += 1
            self.watchdog.step(self.step)
            with self.throughput.waiting():
                batch = self._batch()
            with jax.transfer_guard("disallow"):
                self.guarded_state, metrics = self._guarded(self.guarded_state, self.frozen, batch)
            self.throughput.count_step()
            self.interruption.requested(self.step)
            self.divergence.add(self.step, metrics)
            self.divergence.look(until=self.step - 1)
        self.divergence.look(until=self.step)
        jax.block_until_ready(self.guarded_state)

    def bare(self, steps: int) -> None:
        """So many steps and nothing else."""
        metrics = None
        for _ in range(steps):
            batch, previous = self._batch(), metrics
            self.bare_state, metrics = self._bare(self.bare_state, self.frozen, batch)
            jax.block_until_ready(previous)
        jax.block_until_ready(self.bare_state)

    def saved(self, steps: int) -> None:
        """`guarded`, with a save at the beginning that is on disk at the end."""
        self.checkpoints.save(self.step, self.guarded_state, frozen=self.frozen, metadata=self.task.metadata)
        self.guarded(steps)
        self.checkpoints.wait()

    def _batch(self) -> dict[str, jax.Array]:
        return sharding.make_global_batch(self.mesh, inputs(next(self.stream)), self.config.data.batch_size)

    def _bare_step(self) -> Callable:
        """`training/step.py` without its guards."""
        task, config = self.task, self.config
        optimizer, _ = make_optimizer(config.optimizer, config.train.steps)

        def step(state, frozen, batch):
            def loss(params):
                return task.loss(params, frozen, batch, task.draw(batch, state.step))

            gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
            metrics |= {"gradient_norm": optax.global_norm(gradients)}
            return state.apply_gradients(gradients, optimizer, config.train.ema_decay), metrics

        shardings = jax.tree.map(lambda x: x.sharding, self.setup.state)
        step = sharding.traced_on(self.mesh, step)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(self.mesh)))


def differences(one: Callable[[], None], other: Callable[[], None], rounds: int) -> Iterator[tuple[float, float]]:
    """(seconds that `one` took longer than `other`, seconds of `other`) of each of so many pairs."""
    for number in range(rounds):
        seconds = {}
        for call in (one, other) if number % 2 else (other, one):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        yield seconds[one] - seconds[other], seconds[other]


def median_and_range(values: list[float]) -> tuple[float, float, float]:
    """The median, and the values that the true one lies between with 95 % confidence, as the sign test has it."""
    ordered = sorted(values)
    inwards = max(0, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return statistics.median(ordered), ordered[inwards], ordered[-1 - inwards]


def report(name: str, pairs: Iterable[tuple[float, float]], steps: int, every: int, limit: float) -> bool:
    """Prints a row of the table; whether the median share is below `limit`.

    pairs: as from `differences`. steps: of each side of a pair. every: what costs this comes once in so many steps.
    """
    pairs = list(pairs)
    step_seconds = statistics.median(seconds for _, seconds in pairs) / steps
    # Of `steps` steps: one save, or as many guards.
    costs = [difference / max(1, steps // every) for difference, _ in pairs]
    cost, low, high = median_and_range(costs)
    share, lowest, highest = (seconds / (step_seconds * every) for seconds in (cost, low, high))
    print(
        f"| {name} | {1e3 * cost:.1f} ms | {share:.2%} | {lowest:.2%} to {highest:.2%} | {limit:.0%} "
        f"| {step_seconds:.3f} s | {len(pairs)} |",
        flush=True,
    )
    return share < limit


def main(argv):
    config = CONFIG.value
    validate(config)
    runtime.start()
    print(f"{jax.devices()[0].device_kind}: {jax.device_count()} devices, jax {jax.__version__}")
    with tempfile.TemporaryDirectory() as workdir, Interruption() as interruption, Watchdog() as watchdog:
        training = Training(config, workdir, interruption, watchdog)
        training.saved(2), training.bare(2)  # what comes but once
        print("\n| what | cost | of training | 95 % | promised | a step | pairs |\n|---|---|---|---|---|---|---|")
        every, steps = config.checkpoint.every, CHECKPOINT_STEPS.value
        pairs = differences(lambda: training.saved(steps), lambda: training.guarded(steps), CHECKPOINT_ROUNDS.value)
        kept = report(f"a checkpoint every {every} steps", pairs, steps, every, CHECKPOINT_LIMIT)
        steps = GUARD_STEPS.value
        pairs = differences(lambda: training.guarded(steps), lambda: training.bare(steps), GUARD_ROUNDS.value)
        kept &= report("guards of a step", pairs, steps, 1, GUARD_LIMIT)
        training.checkpoints.close()
    return 0 if kept else 1


if __name__ == "__main__":
    run_program(main, CONFIG.take)
