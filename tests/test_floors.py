"""The plan of the package, read from its imports: a module imports from the floors below it alone."""

import ast
from pathlib import Path

import pytest

import jax_scalegmn

FLOORS = (
    ("types", "architecture"),
    ("network", "symmetry", "graph", "layers", "normalised"),
    ("builders", "matching", "message_passing", "torch_file", "canonical"),
    ("merge", "zoo", "metanetwork", "baselines"),
    ("landscape", "datasets", "train", "models"),
    ("losses", "interop", "checkpoint", "testing"),
    ("inr_folders", "small_cnn_zoo"),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
FILES = {path.stem: path for path in Path(jax_scalegmn.__file__).parent.glob("*.py") if path.stem != "__init__"}
NEVER = {"experiments", "benchmarks", "tests", "matplotlib", "argparse", "tyro", "logging", "rich", "tqdm"}
FLAX = {"layers", "message_passing", "metanetwork", "models", "baselines", "interop"}


def imported(tree):
    """The full names of all modules that a module imports, as `package.module` or `package.name`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(names):
    """The modules of this package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("jax_scalegmn.")}


def test_every_module_has_a_floor():
    assert set(FILES) == set(FLOOR)


@pytest.mark.parametrize("module", FILES)
def test_modules_import_from_lower_floors_and_nothing_that_shows_or_logs(module):
    tree = ast.parse(FILES[module].read_text())
    names = imported(tree)
    for other in within(names):
        assert FLOOR[other] < FLOOR[module] or (other, module) == ("types", "architecture"), f"{module} imports {other}"
    outside = {name.split(".")[0] for name in names}
    assert not outside & NEVER
    assert "flax" not in outside or module in FLAX
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in calls


def test_the_reader_of_imports_sees_every_form():
    names = imported(ast.parse("import a.b, c\nfrom jax_scalegmn import zoo\nfrom d import f\ndef g():\n    import h"))
    assert names == {"a.b", "c", "jax_scalegmn.zoo", "d.f", "h"}
    assert within(names) == {"zoo"}
