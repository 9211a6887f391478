"""Sample image sets: context images in, further images of the same set out, one after another.

Here stands the loop around the programs of a model. A subclass says where they come from: `sampler.Sampler` compiles
them from a Flax model, `bundle.Bundle` reads them from files. Needs jax, numpy and Pillow alone.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import read_image
from m2m_jax.core.options import MAX_SEED

# What a sampler is made of; "append" is given the cache to use its memory again.
PROGRAMS = ("empty_cache", "encode", "append", "begin", "denoise", "decode")
ContextImage = np.ndarray | Image.Image | str | Path
# {global embedding: of each set, float32 [m + num_images, c]}: of its m context images, then of those to be made.
Globals = Mapping[str, Sequence[np.ndarray] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Say where a sampler is after a step.

    Attributes:
      image, num_images: number of the image being made, from 0, and how many there will be.
      step, num_steps: steps done for it, and how many it takes.
      preview: the images as the network now predicts them, uint8 [b, size, size, 3]; decoded when called.
    """

    image: int
    num_images: int
    step: int
    num_steps: int
    preview: Callable[[], np.ndarray]


OnStep = Callable[[Progress], object]


class SetSampler(abc.ABC):
    """Sample images that belong with the context images of a set.

    An image depends on its set's context and seed and on its position there, and not on the other sets of a batch.

    Attributes:
      image_size: pixels along each side.
      num_steps: steps of the stepper's table, an image.
      cache_size: context images of a set that are kept at most.
      slide: whether a set that outgrows the cache forgets its oldest image.
      encodes_generated: whether a generated image is encoded again to become context (M2M-DINO), or its latents are.
      reads_context: whether context changes anything: not where a model was trained on single images.
      num_devices: how many devices share the sets of a batch.
      global_widths: {what the model is told of each image as a whole: numbers of a value}; see `sample_sets`.

    Example:
        sampler = Sampler.from_checkpoint("runs/demo")                  # or Bundle("bundle")
        images = sampler(["a.png", "b.png"], num_images=4, seed=0)      # uint8 [4, size, size, 3]
        for image in sampler.stream(["a.png", "b.png"], num_images=4):  # as they are finished
            show(image)
        contexts = [sampler.read(files) for files in (["a.png", "b.png"], ["c.png"])]
        images = sampler.sample_sets(contexts, num_images=4, seed_b=np.array([0, 1]))  # uint8 [2, 4, size, size, 3]
    """

    image_size: int
    num_steps: int
    cache_size: int
    slide: bool
    encodes_generated: bool
    reads_context: bool = True
    num_devices: int = 1
    global_widths: Mapping[str, int] = MappingProxyType({})

    @property
    @abc.abstractmethod
    def programs(self) -> Mapping[str, Callable]:
        """The programs, {name in `PROGRAMS`: method of `programs.Programs` with parameters bound}."""

    def place(self, tree: Any) -> Any:
        """Return arrays with a leading axis of sets where the programs want them."""
        return tree

    def empty_cache(self, seed_b: jax.Array, num_images: int) -> Any:
        """Return a cache with room for so many images of each set, or for `cache_size` if that is less."""
        return self.programs["empty_cache"](seed_b)

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash of the model: of its parameters, or of the files that hold it."""

    @property
    @abc.abstractmethod
    def conditioned_on(self) -> str:
        """Fingerprint of the image encoder whose tokens the model attends to; empty: it attends to its own features."""

    @property
    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What is to be known of the images, as JSON can hold it: checkpoint, settings."""

    def __call__(
        self,
        context_images: Sequence[ContextImage],
        num_images: int,
        seed: int = 0,
        on_step: OnStep | None = None,
        *,
        globals: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return new images that belong with the context images, each in the context of all before it.

        Args:
          context_images: any number, also none: file names, PIL images or uint8 arrays [h, w, 3].
          num_images: how many to generate.
          seed: the same seed gives the same images.
          on_step: called after every step.
          globals: {name in `global_widths`: float32 [m + num_images, c]}, of the m context images and then of those to
            be made, where the model is told such values.

        Returns:
          uint8 [num_images, image_size, image_size, 3].

        Raises:
          UserError: `num_images` is not positive, an image can't be read, the set outgrows the cache, there are
            context images that the model does not read, or `globals` are not the values that it is told.
        """
        return np.stack(list(self.stream(context_images, num_images, seed, on_step, globals=globals)))

    def stream(
        self,
        context_images: Sequence[ContextImage],
        num_images: int,
        seed: int = 0,
        on_step: OnStep | None = None,
        *,
        globals: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield what `__call__` returns, image by image as they are finished: uint8 [image_size, image_size, 3]."""
        contexts, seed_1 = [self.read(context_images)], np.array([seed])
        globals_1 = {name: [values] for name, values in (globals or {}).items()}
        for images_1hwc in self.stream_sets(contexts, num_images, seed_1, on_step, globals=globals_1):
            yield images_1hwc[0]

    def read(self, images: Sequence[ContextImage]) -> np.ndarray:
        """Return images as the model sees them: uint8 [m, image_size, image_size, 3], padded to squares, on white."""
        pixels = [read_image(image, self.image_size) for image in images]
        return np.asarray(pixels, np.uint8).reshape(len(pixels), self.image_size, self.image_size, 3)

    def sample_sets(
        self,
        contexts: Sequence[np.ndarray] | np.ndarray,
        num_images: int,
        seed_b: np.ndarray,
        on_step: OnStep | None = None,
        *,
        globals: Globals | None = None,
    ) -> np.ndarray:
        """Return what `__call__` does, for b sets at once, each with a seed of its own.

        Args:
          contexts: of each set, uint8 [m, image_size, image_size, 3]; m may differ.
          globals: {name in `global_widths`: of each set, float32 [m + num_images, c]}.

        Returns:
          uint8 [b, num_images, image_size, image_size, 3].
        """
        return np.stack(list(self.stream_sets(contexts, num_images, seed_b, on_step, globals=globals)), axis=1)

    def stream_sets(
        self,
        contexts: Sequence[np.ndarray] | np.ndarray,
        num_images: int,
        seed_b: np.ndarray,
        on_step: OnStep | None = None,
        *,
        room: int = 0,
        globals: Globals | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield what `sample_sets` returns, image by image: uint8 [b, image_size, image_size, 3].

        Args:
          contexts, num_images, seed_b, on_step, globals: as in `sample_sets`.
          room: context images of a set that the cache must hold at least. Batches that ask for the same run the same
            compiled programs.
        """
        lengths_b = self._check(contexts, num_images, seed_b)
        values_bnc = self._check_globals(globals or {}, lengths_b, num_images)
        missing = -len(contexts) % self.num_devices
        # Devices get equally many sets: what is missing is sampled without context and thrown away.
        padded: list[Any] = [*contexts, *[()] * missing]
        lengths_b = np.append(lengths_b, np.zeros(missing, int))
        placed_b = self.place(np.append(np.asarray(seed_b, np.uint32), np.zeros(missing, np.uint32)))
        values_bnc = {name: np.pad(x_bnc, ((0, missing), (0, 0), (0, 0))) for name, x_bnc in values_bnc.items()}
        everyone = self.place(np.ones(len(padded), bool))

        def told(number_b: np.ndarray) -> tuple[dict[str, Any], ...]:
            """Return what the programs get besides: the values of one image of each set, where there are any."""
            of_image = {name: x_bnc[np.arange(len(x_bnc)), number_b] for name, x_bnc in values_bnc.items()}
            return (self.place(of_image),) if of_image else ()

        run = self.programs
        cache = self.empty_cache(placed_b, max(room, int(lengths_b.max()) + num_images - 1))
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        for i in range(lengths_b.max()):
            images_bhwc = np.stack([context[i] if i < len(context) else blank for context in padded])
            image, append_b = run["encode"](self.place(images_bhwc)), self.place(i < lengths_b)
            cache = run["append"](cache, placed_b, image, append_b, *told(np.full(len(padded), i)))
        for i in range(num_images):
            told_of_it = told(lengths_b + i)
            latents_bhwc = self._next_image(cache, placed_b, told_of_it, i, num_images, len(contexts), on_step)
            images_bhwc = run["decode"](latents_bhwc)
            yield np.asarray(images_bhwc)[: len(contexts)]
            if i + 1 < num_images:
                image = run["encode"](images_bhwc) if self.encodes_generated else latents_bhwc
                cache = run["append"](cache, placed_b, image, everyone, *told_of_it)

    def _next_image(
        self,
        cache: Any,
        seed_b: jax.Array,
        told: tuple[dict[str, Any], ...],
        image: int,
        num_images: int,
        num_sets: int,
        on_step: OnStep | None,
    ) -> jax.Array:
        """Return latents. Unwatched, all steps are one call; the same program makes them one by one."""
        carry = self.programs["begin"](cache, seed_b)
        stride = 1 if on_step else self.num_steps
        for first in range(0, self.num_steps, stride):
            carry = self.programs["denoise"](cache, seed_b, carry, np.int32(first), np.int32(first + stride), *told)
            if on_step:
                clean_bhwc = carry["previous"]

                def preview(clean_bhwc=clean_bhwc):
                    return np.asarray(self.programs["decode"](clean_bhwc))[:num_sets]

                jax.block_until_ready(clean_bhwc)  # who watches wants to know when it is done, not when it is queued
                on_step(Progress(image, num_images, first + 1, self.num_steps, preview))
        return carry["x"]

    def _check(self, contexts: Sequence[np.ndarray] | np.ndarray, num_images: int, seed_b: np.ndarray) -> np.ndarray:
        """Return how many context images each set has."""
        if num_images < 1:
            raise UserError(f"num_images must be at least 1, not {num_images}")
        if np.shape(seed_b) != (len(contexts),):
            raise UserError(f"{len(contexts)} sets need as many seeds, not seeds of shape {np.shape(seed_b)}")
        for seed in np.asarray(seed_b).tolist():
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"a seed must be between 0 and {MAX_SEED}, not {seed}")
        lengths_b = np.array([len(context) for context in contexts])
        if not self.reads_context:
            if lengths_b.any():
                raise UserError("this model was trained on single images and reads no context: give no context images")
            return lengths_b  # nothing is kept, however many images there are
        longest = int(lengths_b.max()) + num_images - 1  # the last image is context to none
        if longest > self.cache_size and not self.slide:
            raise UserError(
                f"{lengths_b.max()} context images and {num_images} to generate need a cache of {longest}, and "
                f"cache_size is {self.cache_size}: raise it, or set slide to forget the oldest images"
            )
        return lengths_b

    def _check_globals(self, globals: Globals, lengths_b: np.ndarray, num_images: int) -> dict[str, np.ndarray]:
        """Return {name: float32 [b, longest m + num_images, c]}, zeros where a set has fewer images."""
        if globals.keys() != self.global_widths.keys():
            told, given = (", ".join(sorted(names)) or "nothing" for names in (self.global_widths, globals))
            raise UserError(
                f"this model is told of each image: {told}; and values are given of: {given}. From Python, "
                "sample_sets(..., globals=...) takes them"
            )
        padded, longest = {}, lengths_b.max() + num_images
        for name, width in self.global_widths.items():
            if len(globals[name]) != len(lengths_b):
                raise UserError(f"globals[{name!r}] has values of {len(globals[name])} sets, not of {len(lengths_b)}")
            padded[name] = np.zeros((len(lengths_b), longest, width), np.float32)
            for b, of_set in enumerate(globals[name]):
                values_nc, shape = np.asarray(of_set, np.float32), (lengths_b[b] + num_images, width)
                if values_nc.shape != shape or not np.isfinite(values_nc).all():
                    raise UserError(
                        f"globals[{name!r}][{b}] must hold {shape[1]} finite numbers of each of {shape[0]} images, "
                        f"context and new ones; its shape is {values_nc.shape}"
                    )
                padded[name][b, : len(values_nc)] = values_nc
        return padded
