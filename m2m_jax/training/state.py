"""The train state: everything that changes from step to step, as one tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from m2m_jax.core.parameters import Params

if TYPE_CHECKING:
    import optax


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    Attributes:
      step: int32 [], steps that were taken.
      skipped_steps: int32 [], those of them that changed nothing because their numbers were not finite.
      skipped_batches: int32 [], that no step has seen: `config.train.on_nonfinite=rollback` leaves some out. A step's
        data and noise are those of `step + skipped_batches`.
      params: flat dict of all parameters, those that do not train included.
      ema_params: averages of those that train, float32; of the others there is nothing to be averaged.
    """

    step: jax.Array
    skipped_steps: jax.Array
    skipped_batches: jax.Array
    params: Params
    opt_state: Any
    ema_params: Params

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, trains: Callable[[str], bool] = lambda name: True
    ) -> TrainState:
        """Return the state before the first step; the EMA begins at the parameters.

        trains: whether the parameter of a dotted name trains. Optimizer and EMA hold nothing of the others.
        """
        trained = {name: value for name, value in params.items() if trains(name)}
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
            skipped_batches=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(trained),
            # Copies: a donated state must not hold one buffer twice.
            ema_params={name: jnp.array(value, jnp.float32, copy=True) for name, value in trained.items()},
        )

    def apply_gradients(
        self,
        gradients: Params,
        optimizer: optax.GradientTransformationExtraArgs,
        ema_decay: float,
        total_steps: jax.Array | None = None,
    ) -> TrainState:
        """Return the state after one update of parameters, optimizer and EMA. Traceable.

        Args:
          gradients: of the parameters that train.
          ema_decay: of the average; less in the first steps, so that a young run forgets where it began.
          total_steps: int32 [], where the learning rate reaches zero; None: at config.train.steps.
        """
        trained = {name: self.params[name] for name in gradients}
        updates, opt_state = optimizer.update(gradients, self.opt_state, trained, total_steps=total_steps)
        trained = jax.tree.map(lambda p, u: p + u.astype(p.dtype), trained, updates)
        # The average of a young run follows its parameters closely, or it would remember the initial ones for long.
        step = self.step.astype(jnp.float32)
        rate = 1.0 - jnp.minimum(jnp.float32(ema_decay), (1.0 + step) / (10.0 + step))
        ema_params = jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), self.ema_params, trained)
        return self.replace(
            step=self.step + jnp.int32(1),
            params=self.params | trained,
            opt_state=opt_state,
            ema_params=ema_params,
        )

    def skip(self) -> TrainState:
        """Return the state after a step that changed nothing but the counts. Traceable."""
        return self.replace(step=self.step + jnp.int32(1), skipped_steps=self.skipped_steps + jnp.int32(1))
