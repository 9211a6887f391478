"""Files of installed Python packages, which are found without importing the packages."""

import importlib.util
from pathlib import Path

from m2m_jax.core.errors import UserError


def installed_file(package: str, module: str, file: str, remedy: str) -> Path:
    """Return the path of a file in a package. Raises UserError, which ends with `remedy`, where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations))) / file
