"""What a run and the planner make of a task, a config and a mesh: the state's shapes and places, and the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from m2m_jax.configuration import Config
from m2m_jax.core.parameters import Params
from m2m_jax.models.initialization import TRAINED
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import Step, make_train_step

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True)
class Setup:
    """state: the train state as ShapeDtypeStructs with shardings; create: what makes it of parameters, compiled."""

    state: TrainState
    create: Callable[[Params], TrainState]
    step: Step
    learning_rate: optax.Schedule
    trains: Callable[[str], bool]


def set_up(task: Any, config: Config, mesh: Mesh) -> Setup:
    """Of `SetDiffusion` or `Autoencoding`. Nothing is computed and no device is asked for anything."""
    optimizer, learning_rate = make_optimizer(config.optimizer, config.train.steps)
    trains = TRAINED[config.train.parameters]

    def create(params: Params) -> TrainState:
        return TrainState.create(params, optimizer, trains)

    shapes = jax.eval_shape(create, task.shapes)
    shardings = sharding.state_shardings(shapes, mesh)
    return Setup(
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        create=jax.jit(create, out_shardings=shardings),
        step=make_train_step(
            task, optimizer, shardings, mesh, config.train.ema_decay, trains, config.train.accumulation
        ),
        learning_rate=learning_rate,
        trains=trains,
    )
