"""What differs between two values that JSON holds."""

from typing import Any


def first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """Return in words the first field that differs, by its dotted name, with both values; None where none does."""
    if found == wanted:
        return None
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            here = f"{name}.{key}" if name else key
            if (different := first_difference(found.get(key), wanted.get(key), here)) is not None:
                return different
    return f"{name} was {found!r:.80}, and now is {wanted!r:.80}"
