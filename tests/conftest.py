"""Set-up of all tests: eight fake devices, shapes checked at every call, and the networks that tests run over."""

import gc
import os
from pathlib import Path

from experiments import xla_flags

# Before jax is imported. The programs are tiny: compiling them fast matters more than running them fast.
_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
}
os.environ.pop("XLA_FLAGS", None)
xla_flags.add(_FLAGS | xla_flags.PATIENT)

import beartype  # noqa: E402 (after the flags)
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402


def _jaxtyped(*, typechecker, jaxtyped=jaxtyping.jaxtyped):
    """As jaxtyping's, whose record of axes takes ten times as long as the check: left out where there are no arrays."""

    check = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))

    def decorate(checked):
        if isinstance(checked, type) or any("jaxtyping" in str(kind) for kind in checked.__annotations__.values()):
            return jaxtyped(checked, typechecker=typechecker)
        return check(checked)

    return decorate


jaxtyping.jaxtyped = _jaxtyped  # which the import hook puts on every function
# All but `inference`, which handles traced programs and no arrays: there the checks take a third of the time.
_MODULES = {path.stem for path in Path(__file__).parent.with_name("jax_scalegmn").iterdir()} - {"__init__", "inference"}
jaxtyping.install_import_hook([f"jax_scalegmn.{module}" for module in _MODULES], "beartype.beartype")
gc.set_threshold(200_000, 100, 1000)  # JAX's traced programs are many small objects that stay

import support  # noqa: E402 (after the hook)

collect_ignore = ["fixtures"]  # with a script that needs PyTorch


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache folder: modules, workers and later runs share them."""
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # eager operations too: 37 ms instead of 85
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
