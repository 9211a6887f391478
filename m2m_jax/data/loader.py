"""Batches: examples that Grain maps, reads ahead and batches, in threads or in processes of its own.

Batch s holds the examples s * B to (s + 1) * B - 1, whatever the number of processes that share it; so a run resumes
from its step alone, also on another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from m2m_jax.core.program import mark_flags_parsed
from m2m_jax.data.examples import SetExamples

# What of a batch says what it is. It stays on the host; all else is what a step computes with.
BOOKKEEPING = ("example_index_b", "record_index_b", "substituted_b")
_AXES = {"nhwc", "nc", "ns", "n", "s"}  # that end the names of an example's arrays
_ENDLESS = 2**48  # number of examples: more than any run takes


class BatchDataset:
    """The share of a process of every batch: `dataset[s]` is that of step s, for any s >= 0; see `make_dataset`."""

    def __init__(self, examples: SetExamples, batch_size: int, rows: np.ndarray, threads: int, workers: int):
        self.rows, self.threads, self.workers = rows, threads, workers
        self.examples = grain.MapDataset.range(_ENDLESS // batch_size * len(rows)).map(
            _Examples(examples, batch_size, rows)
        )
        self.batched = self.examples.batch(len(rows), batch_fn=stack)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.batched[int(step)]


def make_dataset(
    examples: SetExamples,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    threads: int = 1,
    workers: int = 0,
) -> BatchDataset:
    """Return this process's share of every batch.

    Element s, with b rows, has each array of an example (`SetExamples`) under its batched name: "images_bnhwc", uint8
    [b, N, S, S, 3]; "latents_bnhwc", float32 [b, N, h, w, c]; "token_ids_bns", int32 [b, N, s]; "attribute_NAME_bnc",
    float32 [b, N, c]; "example_index_b" and "record_index_b", int64 [b]; "substituted_b", bool [b].

    Args:
      batch_size: sets a batch, B, all processes together.
      rows: which of them, 0 to B - 1, are this process's; None: all.
      threads: that make examples ahead, in this process or in each worker.
      workers: processes that make batches ahead; 0: this one does.

    Example:
        dataset = make_dataset(open_examples(config.data, split="train", seed=0), batch_size=16)
        dataset[3]["images_bnhwc"]
        stream = batches(dataset, 3, prefetch=2)
    """
    own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    return BatchDataset(examples, batch_size, own, threads, workers)


def batches(
    dataset: BatchDataset, start_step: int, prefetch: int, stop_step: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over the batches from `start_step` on, so many made ahead in the background (0: none).

    stop_step: the first that is not wanted; None: there is no end.
    """
    threads = dataset.threads if prefetch else 0
    if dataset.workers and prefetch:
        mark_flags_parsed()  # Grain asks flags of its own as it starts workers
        # Whole batches, for workers take turns.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        workers = grain.MultiprocessingOptions(dataset.workers, per_worker_buffer_size=prefetch)
        return iter(dataset.batched[int(start_step) : stop_step].to_iter_dataset(options).mp_prefetch(workers))
    length = len(dataset.rows)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * length)
    stop = None if stop_step is None else stop_step * length
    ahead = dataset.examples[int(start_step) * length : stop].to_iter_dataset(options)
    return iter(ahead.batch(length, batch_fn=stack))


class _Examples:
    """Grain's element of a share -> example; a class, for worker processes get it by pickle."""

    def __init__(self, examples: SetExamples, batch_size: int, rows: np.ndarray):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __call__(self, element: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(element), len(self._rows))
        return self._examples[step * self._batch_size + int(self._rows[place])]


def stack(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return examples as one batch, under batched names."""
    return {batched_name(name): np.stack([example[name] for example in examples]) for name in examples[0]}


def batched_name(name: str) -> str:
    """Return what an array of an example is called in a batch: images_bnhwc for images_nhwc."""
    stem, _, axes = name.rpartition("_")
    return f"{stem}_b{axes}" if stem and axes in _AXES else f"{name}_b"


def inputs(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what of a batch goes to the devices: all but the bookkeeping."""
    return {name: value for name, value in batch.items() if name not in BOOKKEEPING}


def held_out_inputs(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `inputs`, and which record each set is of: an evaluation shows a set the context of another."""
    return inputs(batch) | {"record_index_b": batch["record_index_b"].astype(np.int32)}
