"""Registries of encoders, by the model_type of the folders that hold them and by the class of their configs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, TypeVar

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.models import folder as folders


class Kind(Protocol):
    """A kind of encoder. config: the class of its configs, a dataclass with a field `hidden_size`."""

    config: type


K = TypeVar("K", bound=Kind)


class EncoderRegistry(Registry[K]):
    """Map values of model_type to kinds of encoders. All modules of `m2m_jax.models` are imported to look for them."""

    def __init__(self, kind: str):
        super().__init__(kind, package="m2m_jax.models")

    def of_folder(self, folder: str | Path) -> K:
        """Return the kind that a folder holds.

        Raises:
          UserError: it holds none of these.
        """
        name = folders.read_config(folder, "transformers").get("model_type")
        if name not in self:
            raise UserError(f"{folder}/config.json describes a {name}; {self.kind}s are {' and '.join(self)}")
        return self[name]

    def of_config(self, config: Any) -> K:
        """Return the kind of a config."""
        return self[self._name(config)]

    def to_metadata(self, config: Any) -> dict[str, Any]:
        """Return a config as JSON can hold it."""
        return {"model_type": self._name(config), **dataclasses.asdict(config)}

    def from_metadata(self, values: dict[str, Any]) -> Any:
        """Return the config of what `to_metadata` gave.

        Raises:
          UserError: it is of no such encoder.
        """
        return folders.config_from(self.choose(values["model_type"]).config, values, {})

    def _name(self, config: Any) -> str:
        return next(name for name, kind in self.items() if type(config) is kind.config)
