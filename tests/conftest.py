"""Set-up of all tests: eight fake devices, shapes checked at every call, and the networks that tests run over."""

import os

# Before jax is imported. The programs are tiny: compiling them fast matters more than running them fast.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jax_scalegmn", "beartype.beartype")

import support  # noqa: E402 (after the hook)


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache folder: modules, workers and later runs share them."""
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=support.ARCHITECTURES.values(), ids=support.ARCHITECTURES)
def arch(request):
    """Every kind of network that has a builder."""
    return request.param


@pytest.fixture
def params(arch):
    """Random params of `arch` with nonzero biases."""
    return support.random_params(arch)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Thousands of them would fill the memory, and run into the system's limit on memory maps."""
    yield
    jax.clear_caches()
