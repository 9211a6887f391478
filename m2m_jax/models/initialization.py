"""How M2M starts from a pretrained U-Net, and what its parameters are called."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.keys import Domain, domain_key
from m2m_jax.core.parameters import Params, split
from m2m_jax.diffusion.schedule import NoiseSchedule, UnsupportedSchedule
from m2m_jax.models.diffusers_folder import SCHEDULER, load_params, load_schedule, load_unet_config
from m2m_jax.models.folder import differences, first_of
from m2m_jax.models.unet import UNet, UNetConfig


def is_set_attention(name: str) -> bool:
    """Parameters that Image-Set Attention adds to a transformer block: attn2 and the norm before it."""
    return ".attn2." in name or (".norm2." in name and ".transformer_blocks." in name)


def is_attention(name: str) -> bool:
    """Parameters of a transformer block's attentions, with the norms before them."""
    return is_set_attention(name) or ".attn1." in name or (".norm1." in name and ".transformer_blocks." in name)


def initial_params(
    build: Callable[[jax.Array], UNet], config: UNetConfig, schedule: NoiseSchedule, folder: str, *, seed: int
) -> Params:
    """Parameters at step 0: from the U-Net in a folder of diffusers' layout, or from scratch where that is empty.

    build: the network of `config`, of a key. schedule: that it will be trained under; a warning says where that of the
    folder is another. Raises UserError as `from_pretrained`.
    """
    params = jax.jit(lambda key: split(build(key))[1])(domain_key(Domain.INITIALIZE, seed))
    if not folder:
        return params
    params = from_pretrained(params, config, load_params(folder), load_unet_config(folder), folder)
    _warn_of_another_schedule(folder, schedule)
    return params


def _warn_of_another_schedule(folder: str, schedule: NoiseSchedule) -> None:
    """The schedule stands beside a U-Net that this project saved, and in a folder of its own in a pipeline."""
    files = (Path(folder) / SCHEDULER, Path(folder) / ".." / "scheduler" / SCHEDULER)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return
    try:
        changed = load_schedule(file).differences(schedule)
    except UnsupportedSchedule as error:
        warn(f"config.schedule is not compared with that of init.path={folder}: {error}")
        return
    if changed:
        warn(
            f"config.schedule is not the one that init.path={folder} was trained under: in {file} {'; '.join(changed)}"
        )


def from_pretrained(
    params: Params, config: UNetConfig, pretrained: Params, pretrained_config: UNetConfig, folder: str
) -> Params:
    """The parameters at step 0 of a U-Net that starts from another one.

    What of a single-image U-Net is taken over: everything but the attention to text, where it has one. What is new:
    attn2 and the norm before it, in every transformer block. Queries and norm start as copies of attn1's in the same
    block, and so do keys and values of M2M-Self: they already match like with like. Keys and values of an encoder's
    tokens (M2M-DINO, text) start at random, as they are in `params`. The output projection starts at zero, and
    its bias as the text attention's: at step 0 the network is, whatever the context, the pretrained one with all text
    tokens zero, and the context fades in. Not the paper's choice, which is not known.

    Args:
      params: freshly drawn ones of the network of `config`.
      pretrained: of the network of `pretrained_config`. An M2M network is taken over as it is, and one that attends to
        text where this one does.
      folder: where that was read, for messages.

    Raises:
      UserError: the architectures differ in more than attn2, or a parameter is missing, left over or of another shape.
    """
    problems = [
        f"{name} is {theirs} there and {ours} here"
        for name, ours, theirs in _compared(config, pretrained_config)
        if ours != theirs
    ]
    new, text_bias = set(), {}
    if pretrained_config.attn2 not in ("image_set", config.attn2):
        new = {name for name in params if is_set_attention(name)}
        text_bias = {name: x for name, x in pretrained.items() if name.endswith(".attn2.to_out.bias")}
        pretrained = {name: x for name, x in pretrained.items() if not is_set_attention(name)}
    taken = {name: x for name, x in params.items() if name not in new}
    problems += differences(taken, pretrained)
    if problems:
        raise UserError(
            f"init.path={folder} does not fit config.model: {first_of(problems)}; "
            "set config.model to that folder's config.json, or init.path= to train from scratch"
        )
    started = {name: pretrained[name] for name in taken}
    for name in new:
        twin = name.replace(".attn2.", ".attn1.").replace(".norm2.", ".norm1.")
        if ".attn2.to_out." in name:
            started[name] = text_bias.get(name, params[name] * 0)
        elif ".order." in name or (config.cross_attention_dim and (".to_k." in name or ".to_v." in name)):
            started[name] = params[name]
        else:
            started[name] = started[twin]
    return started


def _compared(config: UNetConfig, other: UNetConfig) -> list[tuple[str, Any, Any]]:
    """(field, value, value of the other) of what must be equal for parameters to mean the same in both."""
    free = {"attn2", "cross_attention_dim", "order_embedding", "clean_sees"}
    free |= {"attention_backend", "remat", "dtype", "precision"}
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    return [(name, getattr(config, name), getattr(other, name)) for name in names]
