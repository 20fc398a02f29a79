"""The wheel installs in a fresh environment with the core's dependencies alone, on every supported Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = (
    "tyro",
    "matplotlib",
    "sklearn",
    "ott",
    "anywidget",
    "optuna",
    "submitit",
)  # Flax itself brings orbax and rich

USE = """
import importlib.util, jax, jax_scalegmn as sg
assert not [name for name in %r if importlib.util.find_spec(name)], "an extra is installed"
arch = sg.siren((2, 8, 1))
target = sg.network.init(arch, jax.random.key(0))
params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), target)
aligned = sg.matching.align(arch, params, target)
assert all(abs(a - b).max() < 1e-5 for a, b in zip(jax.tree.leaves(aligned), jax.tree.leaves(target)))
for name in sg.__all__:
    getattr(sg, name)
try:
    sg.matching.sinkhorn_matching(arch, params, target)
except ImportError as error:
    assert 'pip install "jax-scalegmn[sinkhorn]"' in str(error)
else:
    raise AssertionError("Sinkhorn matching ran without ott-jax")
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "uv", "build", "-q", "--wheel", "-o", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_with_the_core_alone_aligns_and_names_the_extra_that_is_missing(wheel, tmp_path):
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "uv", "venv", "-q", "--python", sys.executable, str(environment))
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python), str(wheel))
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "XLA_FLAGS"))}
    run(str(python), "-c", USE % (EXTRAS,), cwd=tmp_path, env=variables)
    done = subprocess.run(
        [str(environment / "bin" / "jax-scalegmn"), "--help"], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 2
    assert 'pip install "jax-scalegmn[cli]"' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_dependencies_resolve_on_every_supported_python(version):
    resolved = run(
        sys.executable, "-m", "uv", "pip", "compile", "-q", "--python-version", version, str(ROOT / "pyproject.toml")
    )
    assert "jax==" in resolved
    assert "flax==" in resolved
