"""Which parameters train, which new ones are added for it, and how all become those that a model computes with.

Everything that needs parameters (the training step, evaluations, previews, samplers) asks `Trained.effective` for them,
and the first step asks `Trained.start`; nothing else knows that there may be an adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from m2m_jax.core.keys import Domain, Stream, stream_key
from m2m_jax.core.parameters import Params
from m2m_jax.core.registry import Registry
from m2m_jax.models.initialization import is_attention, is_set_attention


@dataclasses.dataclass(frozen=True)
class Trained:
    """One choice of `config.train.parameters`.

    Attributes:
      trains: whether the parameter of a dotted name trains. The others lie still: no gradient is computed for them, and
        neither optimizer nor average holds anything of them.
      new: (key, the model's parameters) -> parameters beside the model's, of names that the model has not. Traceable.
      merge: all parameters, new ones included -> the model's own, as it computes with them. Traceable.

    Example, an adapter of rank 1 beside every query (the new names end like others, so `training/sharding.py` has a
    rule for them):

        def new(key, params):
            queries = {name: x for name, x in params.items() if name.endswith("to_q.kernel")}
            down = {f"adapter.down.{name}": jnp.ones((x.shape[0], 1)) for name, x in queries.items()}
            return down | {f"adapter.up.{name}": jnp.zeros((1, x.shape[1])) for name, x in queries.items()}

        def merge(params):
            own = {name: x for name, x in params.items() if not name.startswith("adapter.")}
            ups = {name: x for name, x in params.items() if name.startswith("adapter.up.")}
            for name, up in ups.items():
                own[name.removeprefix("adapter.up.")] += params[name.replace(".up.", ".down.", 1)] @ up
            return own

        PARAMETERS.register("adapter")(Trained(lambda name: name.startswith("adapter."), new, merge))
    """

    trains: Callable[[str], bool]
    new: Callable[[jax.Array, Params], Params] = lambda key, params: {}
    merge: Callable[[Params], Params] = lambda params: params

    def start(self, seed: int, params: Params) -> Params:
        """Return all parameters at step 0: the model's own, and the new ones beside them. Traceable.

        Raises:
          ValueError: a new parameter has the name of one of the model's.
        """
        new = self.new(stream_key(Domain.INITIALIZE, seed, 0, Stream.ADAPTER), params)
        if taken := sorted(new.keys() & params.keys()):
            raise ValueError(f"the model has parameters of these names already: {', '.join(taken)}")
        return params | new

    def effective(self, params: Params, trained: Params) -> Params:
        """Return the model's parameters as it computes with them. Traceable.

        Args:
          params: all parameters.
          trained: other values of some of them, which stand in their place: those that a gradient is taken of, or
            averages.
        """
        return self.merge({**params, **trained})

    def of(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return those that train."""
        return {name: value for name, value in params.items() if self.trains(name)}


PARAMETERS = Registry[Trained]("choice of parameters that train", package="m2m_jax.models")

PARAMETERS.register("all")(Trained(lambda name: True))
PARAMETERS.register("attention")(Trained(is_attention))
PARAMETERS.register("set_attention")(Trained(is_set_attention))
