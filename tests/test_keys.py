"""Random streams: no key is given twice, to whichever program."""

import ast
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core.keys import Domain, Stream, domain_key, stream_key

ROOT = pathlib.Path(__file__).parents[1]
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


def attributes() -> set[tuple[str, str, str]]:
    """(module, owner, name) of every `owner.name` in the package."""
    found = set()
    for path in (ROOT / "m2m_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add((path.relative_to(ROOT).as_posix(), ast.unparse(node.value), node.attr))
    return found


def test_every_programs_keys_begin_at_its_domain():
    """One module makes a key of a seed; and whatever has a name is drawn somewhere."""
    used = attributes()
    makers = {module for module, owner, name in used if owner == "jax.random" and name in ("key", "PRNGKey")}
    assert makers == {"m2m_jax/core/keys.py"}
    for names in (Domain, Stream):
        assert {one.name for one in names} <= {name for _, owner, name in used if owner == names.__name__}
