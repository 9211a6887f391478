"""How M2M starts from a pretrained U-Net, and what its parameters are called."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError, warn
from m2m_jax.core.parameters import HostParams, initial
from m2m_jax.diffusion.schedule import NoiseSchedule, UnsupportedSchedule
from m2m_jax.models.attentions import parameter_names
from m2m_jax.models.diffusers_folder import SCHEDULER, load_params, load_schedule, load_unet_config
from m2m_jax.models.folder import differences, first_of
from m2m_jax.models.unet import UNet, UNetConfig, unet_structure


def is_set_attention(name: str) -> bool:
    """Whether a parameter is of what Image-Set Attention adds to a transformer block: attn2 and the norm before it."""
    return _part_of_block(name) in ("attn2", "norm2")


def is_attention(name: str) -> bool:
    """Whether a parameter is of a transformer block's attentions, with the norms before them."""
    return _part_of_block(name) not in ("", "norm3", "ff")


def _part_of_block(name: str) -> str:
    """Return the module of a transformer block that a parameter is in, as `attentions.parameter_names` has it."""
    found = re.search(r"\.transformer_blocks\.\d+\.(\w+)\.", name)
    return found[1] if found else ""


def initial_params(config: UNetConfig, schedule: NoiseSchedule, folder: str, *, seed: int) -> HostParams:
    """Return parameters at step 0: from a U-Net in diffusers' layout, or from scratch where that is empty.

    They are drawn and stay in the host's memory: nothing is compiled, and of what the folder has nothing is drawn.

    schedule: that it will be trained under; a warning says where that of the folder is another. Raises UserError as
    `from_pretrained`.
    """

    def draw(names: Collection[str] | None) -> HostParams:
        return initial(lambda rngs: UNet(config, rngs=rngs), seed, names)

    if not folder:
        return draw(None)
    shapes = unet_structure(config)[1]
    params = from_pretrained(shapes, draw, config, load_params(folder), load_unet_config(folder), folder)
    _warn_of_another_schedule(folder, schedule)
    return params


def _warn_of_another_schedule(folder: str, schedule: NoiseSchedule) -> None:
    """Warn of another schedule, which lies beside a U-Net of this project, and in a pipeline in a folder of its own."""
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
    shapes: Mapping[str, Any],
    draw: Callable[[Collection[str]], HostParams],
    config: UNetConfig,
    pretrained: Mapping[str, Any],
    pretrained_config: UNetConfig,
    folder: str,
) -> HostParams:
    """Return the parameters at step 0 of a U-Net that starts from another one.

    What both have is taken over: everything outside of the attentions, and each kind of attention that both have.
    Attention to text is left out where there is none here. What is new is each other kind of attention, and the norm
    before it, in every transformer block. Queries and norm of a new one start as copies of those of the self-attention
    in the same block, and so do keys and values of M2M-Self: they already match like with like. Keys and values of
    tokens of another model (M2M-DINO, text) start at random. The output projection starts at
    zero, and its bias, where sets stand in the place of text, as the text attention's: at step 0 the network is,
    whatever the context, the pretrained one with all text tokens zero, and the context fades in. Not the paper's
    choice, which is not known.

    Args:
      shapes: of the parameters of the network of `config`, by name.
      draw: returns fresh parameters of these names.
      pretrained: of the network of `pretrained_config`.
      folder: where that was read, for messages.

    Raises:
      UserError: the architectures differ in more than their attentions, or a parameter is missing, left over or of
        another shape.
    """
    problems = [
        f"{name} is {theirs} there and {ours} here"
        for name, ours, theirs in _compared(config, pretrained_config)
        if ours != theirs
    ]
    ours, theirs = parameter_names(config.attentions), parameter_names(pretrained_config.attentions)
    common = [kind for kind in ours if kind in theirs]
    # {part of a block: kind} of attentions that only one of the networks has.
    new = {part: kind for kind in ours.keys() - theirs.keys() for part in ours[kind]}
    dropped = set() if "text" in ours else set(theirs.get("text", ()))
    renamed = {part: mine for kind in common for part, mine in zip(theirs[kind], ours[kind], strict=True)}

    fresh = {name: x for name, x in shapes.items() if _part_of_block(name) in new}
    found = {
        _in_part(name, renamed.get(_part_of_block(name))): x
        for name, x in pretrained.items()
        if _part_of_block(name) not in dropped
    }
    taken = {name: x for name, x in shapes.items() if name not in fresh}
    problems += differences(taken, found)
    if problems:
        raise UserError(
            f"init.path={folder} does not fit config.model: {first_of(problems)}; "
            "set config.model to that folder's config.json, or init.path= to train from scratch"
        )
    started = {name: found[name] for name in taken}
    at_random = []
    for name, x in fresh.items():
        part = _part_of_block(name)
        kind = new[part]
        twin = _in_part(name, ours["self"][ours[kind].index(part)]) if "self" in ours else ""
        of_others = kind not in ("set", "self") or config.attends_to_encoded
        if ".to_out." in name:
            of_text = _in_part(name, theirs["text"][0]) if kind == "set" and dropped else ""
            started[name] = pretrained[of_text] if of_text.endswith(".bias") else np.zeros(x.shape, x.dtype)
        elif (of_others and (".to_k." in name or ".to_v." in name)) or twin not in started:
            at_random.append(name)
        else:
            started[name] = started[twin]
    return started | draw(at_random)


def _in_part(name: str, part: str | None) -> str:
    """Return the name of the like parameter in another part of the same transformer block; None: the same."""
    return name if part is None else re.sub(r"(\.transformer_blocks\.\d+\.)\w+", rf"\g<1>{part}", name)


def _compared(config: UNetConfig, other: UNetConfig) -> list[tuple[str, Any, Any]]:
    """Return (field, value, value of the other) of what must be equal for parameters to mean the same in both."""
    free = {"attentions", "cross_attention_dim", "context_dim", "order_embedding", "clean_sees"}
    free |= {"attention_backend", "remat", "dtype", "precision"}
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    return [(name, getattr(config, name), getattr(other, name)) for name in names]
