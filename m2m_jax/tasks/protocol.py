"""What a task is: what its config makes of it for the training step, for evaluations, and for their previews.

A task is a class, made of a config, which registers in `tasks/registry.py: TASKS` under the word that `config.task`
says. Most are a kind of `tasks/latent_diffusion.py: LatentDiffusion` and say little more than what the network is told.

Example, a task whose loss pulls a pretrained network to zero:

    @TASKS.register("decay")
    class Decay(SetDiffusion):
        def loss(self, params, frozen, batch, draws):
            loss = sum(jnp.sum(x**2) for x in params.values())
            return loss, {"loss": loss}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from m2m_jax.core.parameters import HostParams, Params
from m2m_jax.models.frozen import FrozenParams
from m2m_jax.tasks.sample_grid import Samples


class Objective(Protocol):
    """What the training step needs.

    Attributes:
      compute_dtype: of the layers; parameters are float32.
      shapes: of the parameters, {dotted name: ShapeDtypeStruct}.
      frozen: parameters of the models that do not train, {name of the model: its parameters}.
    """

    compute_dtype: str
    shapes: dict[str, jax.ShapeDtypeStruct]
    frozen: FrozenParams

    def init(self) -> HostParams:
        """Return the parameters at step 0, in the host's memory."""
        ...

    def draw(self, batch: dict, step: jax.Array) -> Any:
        """Return what is random in the loss of a batch: arrays that begin with an axis of sets. Traceable."""
        ...

    def loss(self, params: Params, frozen: FrozenParams, batch: dict, draws: Any) -> tuple[jax.Array, dict]:
        """Return the mean loss over the sets of a batch, and scalars for the log, "loss" among them. Traceable."""
        ...


class Reader(Protocol):
    """What decides which parts of the data are read.

    Attributes:
      tokenizer: captions to ids, int32 [captions, s]; None: captions are not read.
      needs_images: whether images are wanted also where the data set holds latents.
      attributes: {name: numbers an image} of what else the data must say of every image.
    """

    @property
    def tokenizer(self) -> Callable[[Sequence[str]], np.ndarray] | None: ...
    @property
    def needs_images(self) -> bool: ...
    @property
    def attributes(self) -> Mapping[str, int]: ...


class Evaluator(Protocol):
    """What measures parameters on held-out sets."""

    def evaluate(
        self, params: Params, frozen: FrozenParams, batch: dict, batch_index: jax.Array
    ) -> dict[str, jax.Array]:
        """Return scalars of one held-out batch. Random draws depend on its index alone. Traceable."""
        ...

    def score(self, means: dict[str, float]) -> float:
        """Return how bad parameters are, lower is better, by {"eval/NAME": mean over the batches of an evaluation}."""
        ...


class Previewer(Protocol):
    """What shows parameters at work."""

    def samples(self, params: Params, batch: dict, number_b: Sequence[int], step: int) -> Samples:
        """Return images of some held-out sets.

        Args:
          params: whole, on this process's devices.
          number_b: the number of each set in the grid, on which its noise depends.
          step: of the parameters.
        """
        ...

    def sheet(self, samples: Samples) -> Image.Image:
        """Return one picture of all samples."""
        ...


class Task(Objective, Reader, Evaluator, Previewer, Protocol):
    """Everything that a run asks of its task.

    Attributes:
      summary: what is trained, for the log.
      metadata: what a checkpoint must say so that it can be sampled from alone; can be written as JSON.
    """

    @property
    def summary(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
