"""What context costs: seconds an image with 0 to 24 context images, cached and uncached, and the FLOPs behind them.

    make bench-context                             # the U-Net of Stable Diffusion 2.1 at 256 px, on a CPU
    python -m benchmarks.context_cost --latent_size=64 --dtype=bfloat16 --output=docs/context_cost_gpu.json

M2M-Self and M2M-DINO at random weights: one set, no guidance. What `m2m_jax.Sampler` compiles is timed in two parts, a
denoising step and the addition of a finished image to the cache; an image is `--steps` of the first and one of the
second. Pixels are left out: encoding and decoding cost the same with any context. Uncached is the paper's way: at every
step each context image passes through the U-Net (M2M-Self), or its tokens through the projections (M2M-DINO).

The floor is the same ratio of FLOPs: XLA's count of the uncached programs, which have no loop; for the cache that of no
context, and 4 x queries x keys x width for each attention and context image. Rounds alternate between all programs, so
that a noisy machine is noisy for all; the median counts. `docs/plot_context_cost.py` draws the result.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core import runtime
from m2m_jax.core.parameters import abstract, count, merge, split
from m2m_jax.diffusion.guidance import EVERYTHING
from m2m_jax.models.context_cache import append_image, denoise_next, empty_cache
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

COUNTS = (0, 1, 2, 4, 8, 24)
TOKENS, WIDTH = 257, 1024  # of DINOv2-L, a 224 px image
TIMESTEP, CLEAN_TIMESTEP = np.float32(500), 0

LATENT_SIZE = flags.DEFINE_integer("latent_size", 32, "Latent pixels a side: 32 is 256 px, 64 is 512 px.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What is computed in, and the cache kept in.")
STEPS = flags.DEFINE_integer("steps", 50, "Steps of an image, each one evaluation of the network.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed calls of each program.")
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write, too.")


class Variant:
    """One set's context and next image at random, and the programs over them.

    Attributes:
      cached, uncached, append: {number of context images: a call}; `append` adds one more to so many.
    """

    def __init__(self, name: str):
        config = UNetConfig(dtype=DTYPE.value, context_dim=WIDTH if name == "M2M-DINO" else None)
        self.config, self.graphdef = config, abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))[0]
        self.params = jax.jit(lambda: split(UNet(config, rngs=nnx.Rngs(0)))[1])()
        side = LATENT_SIZE.value
        shape = (TOKENS, WIDTH) if config.attends_to_encoded else (side, side, 4)
        noise_key, context_key = jax.random.split(jax.random.key(0))
        self.noised_bhwc = jax.random.normal(noise_key, (1, side, side, 4))
        self.context = jax.random.normal(context_key, (1, max(COUNTS), *shape))
        cache, append, denoise = jax.jit(self._empty)(self.params), jax.jit(self._append), jax.jit(self._denoise)
        self.key_shapes = [k.shape[2:] for k in cache.k_bmshd.values()]
        self.cached, self.uncached, self.append, self.uncached_flops = {}, {}, {}, {}
        for n in range(max(COUNTS) + 1):
            if n in COUNTS:
                self.cached[n] = functools.partial(denoise, self.params, cache)
                self.append[n] = functools.partial(append, self.params, cache, self.context[:, n % max(COUNTS)])
                program = (
                    jax.jit(functools.partial(self._together, n)).lower(self.params, self.context[:, :n]).compile()
                )
                self.uncached[n] = functools.partial(program, self.params, self.context[:, :n])
                self.uncached_flops[n] = program.cost_analysis()["flops"]
            if n < max(COUNTS):
                cache = append(self.params, cache, self.context[:, n])

    def _empty(self, params):
        image = jax.ShapeDtypeStruct(self.context[:, 0].shape, self.context.dtype)
        return empty_cache(merge(self.graphdef, params), image, max(COUNTS), DTYPE.value)

    def _append(self, params, cache, image):
        unet, everyone = merge(self.graphdef, params), jnp.ones(1, bool)
        return append_image(unet, cache, image, clean_timestep=CLEAN_TIMESTEP, append_b=everyone)

    def _denoise(self, params, cache):
        return denoise_next(merge(self.graphdef, params), self.noised_bhwc, TIMESTEP, (EVERYTHING,), cache=cache)[:, 0]

    def _together(self, n, params, context):
        layout = SetLayout.sampling(n, self.config.clean_sees, self.config.attends_to_encoded)
        inputs = (context if n else None, self.noised_bhwc[:, None], jnp.full((1, 1), TIMESTEP))
        return denoise_sets(merge(self.graphdef, params), *inputs, layout, clean_timestep=CLEAN_TIMESTEP)


def seconds(call: Callable[[], jax.Array]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(variant: Variant) -> dict[str, dict[int, float]]:
    """Median seconds of each program."""
    programs = {kind: getattr(variant, kind) for kind in ("cached", "append", "uncached")}
    times = {kind: {n: [] for n in calls} for kind, calls in programs.items()}
    for number in range(1 + ROUNDS.value):
        # Largest first: what it leaves in memory and caches is paid for by the next, which is large, too.
        for n in reversed(COUNTS):
            for kind, calls in programs.items():
                taken = seconds(calls[n])
                if number:  # the first round compiles
                    times[kind][n].append(taken)
    return {kind: {n: statistics.median(t) for n, t in by_count.items()} for kind, by_count in times.items()}


def rows(variant: Variant, queries: list[int]) -> Iterator[dict[str, float]]:
    """One for each number of context images; seconds and ratios of a whole image.

    Args:
      queries: tokens of the image being made at each Image-Set Attention.
    """
    median, steps = measure(variant), STEPS.value
    # Of each context image at each step: q k^T and its product with v.
    pairs = zip(queries, variant.key_shapes, strict=True)
    attention = sum(4 * t * s * heads * width for t, (s, heads, width) in pairs)
    alone = variant.uncached_flops[0]
    # Adding an image of M2M-Self is one clean pass; of M2M-DINO, a few projections that no ratio sees.
    adds = 0 if variant.config.attends_to_encoded else 1
    for n in COUNTS:
        yield {
            "context": n,
            "cached_seconds": steps * median["cached"][n] + median["append"][n],
            "uncached_seconds": steps * median["uncached"][n],
            "cached_flops": steps * (alone + n * attention) + adds * (alone + n * attention),
            "uncached_flops": steps * variant.uncached_flops[n],
        }


def against_none(table: list[dict[str, float]], row: dict[str, float]) -> dict[str, float]:
    """Ratios to an image without context and without a cache: the U-Net alone."""
    none = table[0]
    return {
        f"{kind}_{unit}": row[f"{kind}_{unit}"] / none[f"uncached_{unit}"]
        for kind in ("cached", "uncached")
        for unit in ("seconds", "flops")
    }


def main(argv):
    runtime.start()
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flags": {"latent_size": LATENT_SIZE.value, "dtype": DTYPE.value, "steps": STEPS.value},
        "variants": {},
    }
    queries = None
    print(f"{result['device']}, jax {jax.__version__}, {result['flags']}, median of {ROUNDS.value} rounds")
    for name in ("M2M-Self", "M2M-DINO"):
        variant = Variant(name)
        # The tokens of a layer are queries and, in M2M-Self, keys.
        queries = queries or [s for s, _, _ in variant.key_shapes]
        print(f"\n{name}: {count(variant.params):,} parameters\n")
        print("| context images | cached, s | against none | its floor | uncached, s | against none | its floor |")
        print("|---|---|---|---|---|---|---|")
        table = result["variants"][name] = list(rows(variant, queries))
        for row in table:
            ratios = against_none(table, row)
            print(
                f"| {row['context']} "
                f"| {row['cached_seconds']:.1f} | {ratios['cached_seconds']:.2f}x | {ratios['cached_flops']:.2f}x "
                f"| {row['uncached_seconds']:.1f} | {ratios['uncached_seconds']:.2f}x "
                f"| {ratios['uncached_flops']:.2f}x |",
                flush=True,
            )
        del variant
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
