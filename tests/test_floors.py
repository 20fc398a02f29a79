"""The plan of the packages, read from their imports: a module imports only from packages on lower floors."""

import ast
from pathlib import Path

import pytest

import jax_scalegmn

FLOORS = (
    {"types", "_bounded"},
    {"stacks", "distributed"},
    {"architecture"},
    {"network", "inference", "symmetry"},
    {"matching", "io", "testing", "layers"},
    {"zoo", "models", "merge", "landscape"},
    {"training", "report"},
    {"cli"},
    {"__main__"},
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS, 1) for package in packages}
ROOT = Path(jax_scalegmn.__file__).parent
FILES = [path for path in sorted(ROOT.glob("**/*.py")) if path != ROOT / "__init__.py"]
SHOWS = {"cli", "__main__"}  # these print; nothing else does
NEVER = {"experiments", "benchmarks", "tests", "matplotlib", "argparse", "tyro", "logging", "rich", "tqdm"}
FLAX = {"models", "io"}  # metanetworks are Flax modules, and one file format is Flax's


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
    """The imports from this library, split at the dots."""
    return [name.split(".")[1:] for name in sorted(names) if name.startswith("jax_scalegmn.")]


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_package_has_a_floor():
    assert {package_of(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_floors_by_their_faces(path):
    package, tree = package_of(path), ast.parse(path.read_text())
    names = imported(tree)
    for other, *rest in within(names):
        if other == package:
            assert rest, f"import the file, not the face of the own package: {other}"
        else:
            assert FLOOR[other] < FLOOR[package], f"{package} imports {other}"
            private = [part for part in rest if part.startswith("_")]
            assert not private, f"{package} imports the private {'.'.join([other, *rest])}"
    outside = {name.split(".")[0] for name in names}
    assert "flax" not in outside or package in FLAX
    if package not in SHOWS:
        assert not outside & NEVER
        assert "print" not in {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }


def test_the_reader_of_imports_sees_every_form():
    names = imported(ast.parse("import a.b, c\nfrom jax_scalegmn import zoo\nfrom d import f\ndef g():\n    import h"))
    assert names == {"a.b", "c", "jax_scalegmn.zoo", "d.f", "h"}
    assert within(names) == [["zoo"]]
