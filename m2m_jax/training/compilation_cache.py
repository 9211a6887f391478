"""Compiled programs are kept on disk: the second start of the same program compiles nothing."""

import os
from pathlib import Path

import jax


def enable() -> None:
    """Uses JAX_COMPILATION_CACHE_DIR where it is set, and the user's cache folder where it is not."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m2m_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
