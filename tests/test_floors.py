"""The plan of the package, read from its imports: a module imports from the floors below it alone."""

import ast
from pathlib import Path

import pytest

import jax_scalegmn

FLOORS = (
    ("types", "architecture"),
    (
        "symmetry",
        "graph",
        "layers",
        "normalised",
        "initialization",
        "layer_functions",
        "variables",
        "moments",
        "assignment",
        "atomic_file",
        "inert_pickle",
    ),
    ("network", "builders", "gauge", "message_passing", "torch_file", "torch_layout", "tree_file", "cifar_files"),
    ("canonical", "shorthand", "zoo", "classifiers", "baselines", "metanetwork"),
    ("matching", "merge", "models", "relaxation"),
    (
        "activation_matching",
        "differentiable_matching",
        "common_frame",
        "task_vectors",
        "repair",
        "landscape",
        "alignment_report",
        "datasets",
        "train",
        "classifier_zoo",
    ),
    ("losses", "interop", "checkpoint", "testing"),
    ("inr_folders", "small_cnn_zoo", "network_files", "cli_options"),
    ("cli",),
    ("__main__",),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
PACKAGE = Path(jax_scalegmn.__file__).parent
FILES = {
    **{path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"},
    **{path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")},
}
COMMAND_LINE = {"cli", "cli_options", "__main__"}
NEVER = {"experiments", "benchmarks", "tests", "matplotlib", "argparse", "tyro", "logging", "rich", "tqdm"}
FLAX = {"layers", "message_passing", "metanetwork", "models", "baselines", "interop", "tree_file"}


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
    """But for the command line, which shows; the files of a folder import each other."""
    for tree in [ast.parse(path.read_text()) for path in FILES[module]]:
        names = imported(tree)
        for other in within(names) - {module}:
            assert FLOOR[other] < FLOOR[module] or (other, module) == ("types", "architecture"), (
                f"{module} imports {other}"
            )
        outside = {name.split(".")[0] for name in names}
        assert "flax" not in outside or module in FLAX
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        if module not in COMMAND_LINE:
            assert not outside & NEVER
            assert "print" not in calls


def test_the_reader_of_imports_sees_every_form():
    names = imported(ast.parse("import a.b, c\nfrom jax_scalegmn import zoo\nfrom d import f\ndef g():\n    import h"))
    assert names == {"a.b", "c", "jax_scalegmn.zoo", "d.f", "h"}
    assert within(names) == {"zoo"}
