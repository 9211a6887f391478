"""A hostile set-up: what passes here does not depend on one device, or on JAX forgiving a careless dtype or rank."""

import getpass
import os
import signal
import tempfile

# A script's background jobs ignore Ctrl-C, and so would what the tests start and tell to stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when JAX is first imported. Eight devices on one CPU: every test can shard. And without LLVM's optimisations, by
# which a training step takes half as long again to compile, where programs run for a moment; XLA's own (fusions, what
# devices send) are as ever. A caller's flags come after these, and so decide.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    f"--xla_llvm_disable_expensive_passes=true {os.environ.get('XLA_FLAGS', '')}"
).strip()

# Where compiled programs are kept, for the tests and for all that they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"m2m_jax-{getpass.getuser()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
import shape_checks

shape_checks.install()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest. They are begun first: the last minutes are for the short ones, and keep all workers busy.
LONGEST = ("launch", "killed_builds", "sample", "killed_runs", "plan", "bundle", "damaged_checkpoints", "train_numbers")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _no_word_of_compilation():
    """What takes seconds to compile is named on standard error: on a slow machine, and with an empty cache, much is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_jax.core.compilation.PATIENCE", 1e6)
        yield


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
