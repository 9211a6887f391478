"""What differs between the config and code that a checkpoint was saved with and those that go on from it."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

import m2m_jax

# Where, how fast and how often; never what is computed.
_DO_NOT_MATTER = (
    "checkpoint.",
    "mesh.",
    "profile.",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "data.augment.on_device",  # the same images, to the bit
    "data.resident",  # likewise
    "data.log_examples",
    "train.log_every",
)
# The same data may have moved.
_PLACES = ("data.directory", "data.path")
_ABSENT = object()


def config_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `config.FIELD: was -> now` for every field that matters, and what follows from it; empty if none does.

    was, now: configs as `configuration.to_json` writes them, perhaps of versions with other fields.
    """
    before, after = (flatten_dict(config, sep=".") for config in (was, now))
    changed = [
        name
        for name in sorted({*before, *after})
        if before.get(name, _ABSENT) != after.get(name, _ABSENT) and not name.startswith(_DO_NOT_MATTER)
    ]
    lines = [f"config.{name}: {_shown(name, before)} -> {_shown(name, after)}" for name in changed]
    order = [name for name in changed if name == "seed" or (name.startswith("data.") and name not in _PLACES)]
    if order:
        lines.append(
            f"{', '.join(order)} {'decides' if len(order) == 1 else 'decide'} on data and noise: "
            "the run will not be the one it would have been"
        )
    return lines


def listing_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for every split whose listing, as `SetExamples.fingerprint` tells, is another; empty if none is.

    was, now: {split: fingerprint}; what is in only one of them cannot be compared.
    """
    changed = [split for split in sorted({*was} & {*now}) if was[split] != now[split]]
    return [f"the data of split {split!r}: sets or files came or went, and examples are others" for split in changed]


@functools.cache
def code_version() -> str:
    """Return `m2m_jax.__version__`, and the git commit where the package lies in a checkout."""
    root = Path(m2m_jax.__file__).parents[1]
    if not (root / ".git").exists():
        return m2m_jax.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return m2m_jax.__version__
    return f"{m2m_jax.__version__} ({commit})"


def _shown(name: str, config: Mapping[str, Any]) -> str:
    return json.dumps(config[name]) if name in config else "(no such field)"
