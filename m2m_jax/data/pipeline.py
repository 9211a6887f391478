"""The input pipeline: image sets -> batches, with an order that is computed rather than remembered.

    choose.py      (seed, split, example) -> record, images in their order, augmentation     pure
    fetch.py       record, images -> pixels, latents, captions, attributes                   reads, through a source
    transform.py   pixels, augmentation -> images                                            on the host or in the step
    examples.py    example i: these three, one after another; damaged records are named or replaced
    loader.py      batches of step s: Grain maps, reads ahead, batches

Sources are the modules of `sources/`; they register in `source.py: SOURCES`. What training and programs use of all
this is here.
"""

from m2m_jax.data.examples import SetExamples, open_examples
from m2m_jax.data.loader import batches, held_out_inputs, inputs, make_dataset
from m2m_jax.data.source import SOURCES, DataSource, RecordSource, find_sources, open_source

__all__ = [
    "SOURCES",
    "DataSource",
    "RecordSource",
    "SetExamples",
    "batches",
    "find_sources",
    "held_out_inputs",
    "inputs",
    "make_dataset",
    "open_examples",
    "open_source",
]
