"""A hostile set-up: what passes here does not depend on one device, or on JAX forgiving a careless dtype or rank."""

import getpass
import os
import signal
import tempfile

# A script's background jobs ignore Ctrl-C, and so would what the tests start and tell to stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when JAX is first imported. Eight devices on one CPU: every test can shard.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest
import shape_checks

shape_checks.install()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"m2m_jax-{getpass.getuser()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """A process that keeps every program it compiled grows to 6 GB over the suite."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def diffusers():
    """The reference of the parity tests, which skip where it is missing."""
    pytest.importorskip("torch", reason="parity with diffusers runs on torch, a test-only dependency")
    return pytest.importorskip("diffusers", reason="the reference of the parity tests, a test-only dependency")


@pytest.fixture(scope="session")
def transformers():
    """Likewise."""
    pytest.importorskip("torch", reason="parity with transformers runs on torch, a test-only dependency")
    return pytest.importorskip("transformers", reason="the reference of the parity tests, a test-only dependency")
