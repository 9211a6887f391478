"""What a run and the planner make of a task, a config and a mesh: the state's shapes and places, and the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from m2m_jax.configuration import Config
from m2m_jax.core.parameters import HostParams, Params
from m2m_jax.models.trained import PARAMETERS, Trained
from m2m_jax.tasks.protocol import Objective
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import LearningRate, make_optimizer
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import Step, make_train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """The state and the step that a run and a plan have in common.

    Attributes:
      state: the train state as ShapeDtypeStructs with shardings.
      create: makes the state of a model's parameters, which every process holds alike in the host's memory. Each device
        gets its share of them.
      step: the training step, compiled when it is first called or lowered.
      learning_rate: of a number of updates, for the log.
      trained: which parameters train, and how all become the model's.
    """

    state: TrainState
    create: Callable[[HostParams], TrainState]
    step: Step
    learning_rate: LearningRate
    trained: Trained


def set_up(task: Objective, config: Config, mesh: sharding.AnyMesh) -> Setup:
    """Return what training `task` on `mesh` consists of. Computes nothing, and asks no device for anything."""
    optimizer, learning_rate = make_optimizer(config.optimizer, config.train.steps)
    trained = PARAMETERS.choose(config.train.parameters)

    def create(params: Params) -> TrainState:
        return TrainState.create(trained.start(config.seed, params), optimizer, trained.trains)

    shapes = jax.eval_shape(create, task.shapes)
    shardings = sharding.state_shardings(shapes, mesh)
    compiled = jax.jit(create, out_shardings=shardings)

    def place_and_create(params: HostParams) -> TrainState:
        return compiled(sharding.place(params, shardings.params))

    return Setup(
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        create=place_and_create,
        step=make_train_step(
            task,
            optimizer,
            shardings,
            mesh,
            config.train.ema_decay,
            trained,
            config.train.accumulation,
            config.train.reduce_dtype,
        ),
        learning_rate=learning_rate,
        trained=trained,
    )
