"""Set-up of all tests: eight fake devices, shapes checked at every call, and the networks that tests run over."""

import os

# Before jax is imported. The programs are tiny: compiling them fast matters more than running them fast.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jax_scalegmn", "beartype.beartype")

import support  # noqa: E402 (behind the hook)


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
