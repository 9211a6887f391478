"""What the fields of an architecture may be: a folder from elsewhere must not make a model of a billion layers."""

from __future__ import annotations

from typing import Any

from m2m_jax.core.errors import UserError

CHANNELS = (1, 2**16)
LAYERS = (1, 128)
LEVELS = (1, 8)
BLOCKS = 256  # of a U-Net's way down: ten times those of the largest published ones


def require_between(config: Any, **limits: tuple[float, float]) -> None:
    """Raise UserError for a field of `config`, or an item of one that is a tuple, outside of (smallest, largest)."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if not low <= item <= high:
                raise UserError(f"{type(config).__name__}: {name} is {value}; it must be between {low:g} and {high:g}")


def require_levels(config: Any, *names: str) -> None:
    """Raise UserError unless `block_out_channels` has 1 to 8 levels, `norm_num_groups` divides each, and every field
    of `names` has an item a level."""
    channels, kind = config.block_out_channels, type(config).__name__
    if not LEVELS[0] <= len(channels) <= LEVELS[1]:
        raise UserError(f"{kind}: block_out_channels is {channels}; it must have {LEVELS[0]} to {LEVELS[1]} levels")
    if any(count % config.norm_num_groups for count in channels):
        raise UserError(f"{kind}: norm_num_groups={config.norm_num_groups} must divide block_out_channels={channels}")
    for name in names:
        if len(getattr(config, name)) != len(channels):
            raise UserError(f"{kind}: {name}={getattr(config, name)} must have one item for each of {channels}")


def require_one_of(config: Any, **choices: tuple[str, ...]) -> None:
    """Raise UserError for a field whose value, or an item of whose value, is none of its choices."""
    for name, known in choices.items():
        value = getattr(config, name)
        if any(item not in known for item in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{type(config).__name__}: {name} is {value!r}; it takes {', '.join(known)}")
