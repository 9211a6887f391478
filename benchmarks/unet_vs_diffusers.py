"""Seconds per forward pass and per training step of one U-Net, here and in diffusers, side by side in one run.

    make bench                                                 # needs torch: Python 3.11, requirements-parity.txt
    python -m benchmarks.unet_vs_diffusers --dtype=bfloat16 --sizes=sd21 --peak_tflops=989     # one H100 or H200

The same Stable Diffusion U-Net (text cross-attention) at random weights, on the same device and with as many threads:
this project's under `jax.jit`, with the mesh that `m2m_jax.train` makes; diffusers' eager and under `torch.compile`,
channels last. A training step is forward, mean squared error, backward and AdamW, in float32 or with bf16 compute and
float32 parameters. Rounds alternate between the programs, so that a noisy machine is noisy for all; the median counts.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from m2m_jax.core import runtime
from m2m_jax.core.parameters import abstract, count, merge, split
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.diffusers_folder import unet_values
from m2m_jax.models.unet import UNet, UNetConfig

ATTENDS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# (config, images, latent pixels a side, text tokens).
SIZES = {
    "emoji": (
        UNetConfig(
            block_out_channels=(64, 128),
            down_block_types=(ATTENDS, ATTENDS),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            norm_num_groups=16,
            attentions=("self", "text"),
            cross_attention_dim=64,
        ),
        *(64, 8, 16),
    ),
    "medium": (
        UNetConfig(
            block_out_channels=(128, 256, 256),
            down_block_types=(ATTENDS, ATTENDS, PLAIN),
            layers_per_block=2,
            num_attention_heads=(2, 4, 4),
            attentions=("self", "text"),
            cross_attention_dim=256,
        ),
        *(4, 32, 77),
    ),
    "sd21": (UNetConfig(attentions=("self", "text"), cross_attention_dim=1024), *(4, 64, 77)),
}

NAMES = flags.DEFINE_list("sizes", ["emoji", "medium"], f"Some of {', '.join(SIZES)}.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What is computed in.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each program.")
PEAK = flags.DEFINE_float("peak_tflops", None, "Of the accelerator, to print the share of it that is used (MFU).")

Call = Callable[[], None]


def jax_calls(config: UNetConfig, inputs: dict[str, np.ndarray]) -> tuple[Call, Call, float, int]:
    """(forward, training step), the FLOPs of a training step by XLA's count, and the number of parameters."""
    graphdef, _ = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split_batch, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = jax.jit(lambda: split(UNet(config, rngs=nnx.Rngs(0)))[1], out_shardings=whole)()
    batch = jax.device_put(inputs, split_batch)
    optimizer = optax.adamw(1e-4)

    def predict(params, batch):
        conditioning = Conditioning(text_bsc=batch["text"])
        return merge(graphdef, params)(batch["x"], batch["timestep"], conditioning)[0]

    def train_step(state, batch):
        params, opt_state = state
        gradients = jax.grad(lambda params: jnp.mean((predict(params, batch) - batch["target"]) ** 2))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    forward = jax.jit(predict)
    state = [(jax.tree.map(jnp.copy, params), jax.jit(optimizer.init, out_shardings=whole)(params))]
    step = jax.jit(train_step, donate_argnums=0).lower(state[0], batch).compile()
    flops = step.cost_analysis()["flops"] * jax.device_count()  # XLA counts one device's

    def run_step():
        state[0] = jax.block_until_ready(step(state[0], batch))

    return lambda: jax.block_until_ready(forward(params, batch)), run_step, flops, count(params)


def torch_calls(config: UNetConfig, inputs: dict[str, np.ndarray], compiled: bool) -> tuple[Call, Call]:
    """(forward, training step)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    diffusers.utils.logging.set_verbosity_error()  # our fields of the config are not theirs
    model = diffusers.UNet2DConditionModel.from_config(unet_values(config))
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, target = (torch.from_numpy(inputs[k].transpose(0, 3, 1, 2).copy()).to(device) for k in ("x", "target"))
    x = x.to(memory_format=torch.channels_last)
    timestep, text = (torch.from_numpy(inputs[k]).to(device) for k in ("timestep", "text"))
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=DTYPE.value == "bfloat16")
    run = torch.compile(model, dynamic=False) if compiled else model

    def finish():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad(), autocast():
            run(x, timestep, text)
        finish()

    def step():
        optimizer.zero_grad()
        with autocast():
            loss = torch.mean((run(x, timestep, text).sample.float() - target) ** 2)
        loss.backward()
        optimizer.step()
        finish()

    return forward, step


def programs(config: UNetConfig, inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, Call, Call]]:
    """Those of torch that run here: without a C++ compiler, for one, `torch.compile` does not."""
    for name, compiled in (("diffusers, eager", False), ("diffusers, torch.compile", True)):
        try:
            forward, step = torch_calls(config, inputs, compiled)
            forward(), step()
        except Exception as error:  # whatever the compiler raises
            print(f"{name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        yield name, forward, step


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv):
    runtime.start()
    print(f"{jax.devices()[0].device_kind}: {jax.device_count()} JAX devices, {torch.get_num_threads()} torch threads")
    print(f"jax {jax.__version__}, torch {torch.__version__}, {DTYPE.value}, median of {ROUNDS.value} rounds")
    for name in NAMES.value:
        config, b, side, tokens = SIZES[name]
        config = UNetConfig(**(vars(config) | {"dtype": DTYPE.value}))
        rng = np.random.default_rng(0)
        inputs = {
            "x": rng.standard_normal((b, side, side, 4), np.float32),
            "target": rng.standard_normal((b, side, side, 4), np.float32),
            "timestep": rng.integers(0, 1000, b, np.int32),
            "text": rng.standard_normal((b, tokens, config.cross_attention_dim), np.float32),
        }
        forward, step, flops, parameters = jax_calls(config, inputs)
        forward(), step()
        rows = {"m2m_jax": (forward, step)} | {n: (f, s) for n, f, s in programs(config, inputs)}
        times = {n: ([], []) for n in rows}
        for _ in range(ROUNDS.value):
            for n, calls in rows.items():
                for kind in (0, 1):
                    times[n][kind].append(seconds(calls[kind]))
        print(f"\n{name}: {parameters:,} parameters, {b} images of {side}x{side}x4, {flops / 1e9:.0f} GFLOP a step\n")
        print("| program | forward, s | against ours | training step, s | against ours |\n|---|---|---|---|---|")
        ours = [statistics.median(t) for t in times["m2m_jax"]]
        for n, both in times.items():
            f, s = (statistics.median(t) for t in both)
            print(f"| {n} | {f:.4f} | {f / ours[0]:.2f}x | {s:.4f} | {s / ours[1]:.2f}x |")
        if PEAK.value:
            print(f"\nMFU of our training step: {flops / ours[1] / PEAK.value / 1e12:.1%}")


if __name__ == "__main__":
    app.run(main)
