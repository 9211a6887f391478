"""What types the fields of a dataclass may have that is read from JSON, a config file or a command line."""

from __future__ import annotations

import math
from types import UnionType
from typing import Any, Union, get_args, get_origin

_ONE = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False", type(None): "None"}
_MANY = {int: "whole numbers", float: "finite numbers", str: "texts"}


def is_of(value: Any, kind: Any) -> bool:
    """Say whether a value is of a type: bool, int, float, str, dict, None, or a union or a tuple of these.

    A whole number is a float, too; a bool is no number. Numbers are finite, and whole ones below 2**53, as in JSON.
    """
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if kinds[1:] == (...,):
            return all(is_of(item, kinds[0]) for item in value)
        return len(value) == len(kinds) and all(map(is_of, value, kinds))
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is kind and (kind is not int or abs(value) < 2**53)


def described(kind: Any) -> str:
    """Return such a type in words: "a tuple of whole numbers"."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        items = _MANY.get(kinds[0], "items")
        return f"a tuple of {items}" if kinds[1:] == (...,) else f"a tuple of {len(kinds)} {items}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(described, get_args(kind)))
    return _ONE.get(kind, "a dict of options")
