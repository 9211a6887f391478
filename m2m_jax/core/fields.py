"""What is known of a field beside its type and default: its help, its limits and its choices.

Fields of a configuration (`config_fields.py`) and options of a program (`options.py`) are made of this.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import nearest

MAX_NUMBER = 2**32 - 1  # of all fields; no field has use for more, and devices count no further


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a field.

    Attributes:
      help: one or more sentences.
      low, high: limits of a number, or of each number of a tuple.
      choices: the words that a text, or each text of a tuple, may be; or "module:NAME", where they stand.
      also: further words, beside those of that table.
      path: whether a text is the path of a file or folder; a leading `~` is the home folder.
      options_of: of a dict: the field of its group that chooses the thing whose `Options` it holds.
    """

    help: str
    low: float = -math.inf
    high: float = MAX_NUMBER
    choices: str | tuple[str, ...] | Mapping[str, Any] = ()
    also: tuple[str, ...] = ()
    path: bool = False
    options_of: str = ""

    @property
    def table(self) -> Mapping[str, Any]:
        """What the words of `choices` choose: {word: thing}; {word: None} where they are only words."""
        words: Any = self.choices
        if isinstance(words, str):
            module, _, name = words.partition(":")
            words = getattr(importlib.import_module(module), name)
        return words if isinstance(words, Mapping) else dict.fromkeys(words)

    @property
    def words(self) -> tuple[str, ...]:
        """All words that the field may hold; none where it may hold any."""
        return (*self.also, *self.table)

    @property
    def limits(self) -> str:
        """The limits of a number in words; an empty text where there are none."""
        if self.low == -math.inf:
            return ""
        return f"at least {self.low:g}" if self.high == MAX_NUMBER else f"between {self.low:g} and {self.high:g}"

    def check(self, value: Any, name: str) -> None:
        """Raise UserError where a value, or an item of a tuple, is outside of the limits or none of the choices."""
        for item in value if isinstance(value, tuple) else (value,):
            if self.choices and item not in self.words:
                hint = nearest(str(item), self.words) or ";"
                raise UserError(f"{name} is {value!r}{hint} it must be one of {', '.join(self.words)}")
            if not isinstance(item, Real):
                continue
            number = float(item)
            if not abs(number) <= MAX_NUMBER:
                raise UserError(f"{name} is {value!r}; numbers are at most {MAX_NUMBER}")
            if not self.low <= number <= self.high:
                raise UserError(f"{name} is {value}; it must be {self.limits}")
