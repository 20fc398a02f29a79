"""`import jax_scalegmn as sg`: a short list of documented names, of which none is imported before it is asked for."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jax_scalegmn as sg

ROOT = Path(sg.__file__).parent
FACES = [path.parent.name for path in ROOT.glob("*/__init__.py")]


def test_the_front_door_has_at_most_sixty_names_and_each_is_documented():
    assert len(sg.__all__) <= 60
    assert set(sg.__all__) <= set(dir(sg))
    for name in sg.__all__:
        value = getattr(sg, name)
        if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
            assert (inspect.getdoc(value) or "").strip(), f"sg.{name} has no docstring"


def test_type_checkers_see_the_names_that_programs_get():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body for alias in node.names}
    assert typed == set(sg.__all__)
    assert set(sg._MODULE_OF) <= typed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sg.nothing  # noqa: B018


@pytest.mark.parametrize("package", FACES)
def test_every_package_lists_its_public_names(package):
    module = importlib.import_module(f"jax_scalegmn.{package}")
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert not [name for name in module.__all__ if name.startswith("_") or not hasattr(module, name)]
    files = {path.stem for path in (ROOT / package).glob("*.py")}
    public = {name for name in files if not name.startswith("_")}
    assert public <= set(module.__all__), "a file without an underscore is public"


def public(module, seen):
    """Every public function and class of the library that can be reached from a module's `__all__`, by full name."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value) and value not in seen:
            seen.add(value)
            yield from public(value, seen)
        elif (inspect.isclass(value) or callable(value)) and getattr(value, "__module__", "").startswith(sg.__name__):
            yield f"{value.__module__}.{name}", value


def test_every_public_function_and_class_has_an_example():
    """Pytest runs the examples, with their output: `--doctest-modules` is on."""
    documented = dict(public(sg, set()))
    assert len(documented) > 150
    assert not [name for name, value in documented.items() if ">>>" not in (inspect.getdoc(value) or "")]


def test_importing_the_library_imports_no_jax():
    code = "import sys, jax_scalegmn; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
