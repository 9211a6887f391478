"""The training step of the text network in diffusers, under `torch.compile`: what else a GPU can be asked to run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import diffusers
import numpy as np
import torch

from benchmarks.accelerator.networks import task_of_text
from benchmarks.accelerator.sizes import Size
from m2m_jax.models.diffusers_folder import unet_values

ROUNDS, STEPS = 3, 5


def seconds_of_step(size: Size, images: int) -> dict[str, Any]:
    """Return seconds of a step (forward, mean squared error, backward, fused AdamW; channels last, no EMA)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    diffusers.utils.logging.set_verbosity_error()  # our fields of the config are not theirs
    config, task = task_of_text(size, images, "cpu")
    dtype = torch.bfloat16 if task.compute_dtype == "bfloat16" else torch.float32
    model = diffusers.UNet2DConditionModel.from_config(unet_values(task.unet_config))
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    side, _, channels = task.models.latent_shape(config.data.image_size)
    tokens = (images, size.text_encoder.max_position_embeddings, size.text_encoder.hidden_size)
    x, target = (torch.randn(images, channels, side, side, device=device) for _ in range(2))
    x, text = x.to(memory_format=torch.channels_last), torch.randn(*tokens, device=device)
    timestep = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, images)).to(device)
    run = torch.compile(model, dynamic=False)

    def step(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = torch.mean((run(x, timestep, text).sample.float() - target) ** 2)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / times

    first = step(1)
    step(1)
    seconds = statistics.median(step(STEPS) for _ in range(ROUNDS))
    return {
        "seconds": round(seconds, 6),
        "images_per_second": round(images / seconds, 3),
        "compile_seconds": round(first, 1),
        "torch": torch.__version__,
    }
