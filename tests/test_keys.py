"""Random streams: no key is given twice, to whichever program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core.keys import Domain, Stream, domain_key, stream_key

SEEDS, INDICES = (0, 1, 7, 2**32 - 1), range(9)


def words(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_no_two_programs_streams_or_steps_share_a_key():
    # Every way in which a program counts: by (step, stream), by one index, by two.
    fold = jax.random.fold_in
    keys = {}
    for domain, seed in itertools.product(Domain, SEEDS):
        root = domain_key(domain, seed)
        keys[domain, seed] = words(root)
        for i in INDICES:
            keys[domain, seed, i] = words(fold(root, i))
            # The children of the key of an index, which training has as streams and the samplers as images, or as
            # (initial noise, noise of the steps).
            for j in INDICES:
                keys[domain, seed, i, j] = words(fold(fold(root, i), j))
            for stream in Stream:
                assert words(stream_key(domain, seed, i, stream)) == keys[domain, seed, i, int(stream)]
            # Those of a model's parameters, which Flax makes of the key that it is given.
            rngs = nnx.Rngs(stream_key(domain, seed, i, Stream.PARAMS))
            keys |= {(domain, seed, i, "parameter", n): words(rngs.params()) for n in range(3)}
    assert len(set(keys.values())) == len(keys)


def test_keys_do_not_care_for_tracing():
    traced = jax.jit(lambda seed, step: stream_key(Domain.TRAIN, seed, step, Stream.NOISE))(
        jnp.uint32(2**32 - 1), jnp.int32(7)
    )
    assert words(traced) == words(stream_key(Domain.TRAIN, 2**32 - 1, 7, Stream.NOISE))
