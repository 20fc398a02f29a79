"""The user's own function of --module: imports it, checks that it is one of a network, and infers its architecture."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, architecture, inference
from jax_scalegmn.inference import Inference
from jax_scalegmn.io import ArrayFile, NetworkFile

# Outputs of one example alone and within a batch differ by rounding.
_TOLERANCE = 1e-3


def load(name: str) -> Callable[[Any, Any], Any]:
    """The function that --module names, `module:function`, imported with the current folder on the path.

    Raises:
      ValueError: If the name has another form, or if the module cannot be imported or has no such function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute) or module_name.endswith(".py") or "/" in module_name:
        raise ValueError(f"--module is {name!r}; expected module:function, like my_model:apply for my_model.py.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does
        raise ValueError(
            f"--module {name}: {module_name!r} cannot be imported ({error!r}). Run in its folder, or set PYTHONPATH."
        ) from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = sorted(n for n, v in vars(value).items() if callable(v) and not n.startswith("_"))
            raise ValueError(f"--module {name}: {module_name!r} has no {part!r}; it has {names[:10]}.")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"--module {name} is a {type(value).__name__}; expected a function (params, x) -> outputs.")
    return value


def of_params(
    name: str, function: Callable[[Any, Any], Any], files: list[ArrayFile], networks: list[NetworkFile]
) -> Callable[[Any, Any], Any]:
    """The function of the params alone; it gets the file's other arrays, like counters, and those that are tied to one.

    Args:
      name: Its name on the command line.
      function: The function of all arrays of a file.
      files: The files.
      networks: The same, as params.

    Raises:
      ValueError: If an array of numbers that are no weights differs from file to file, or if other tensors are one.
    """
    for file, network in zip(files, networks, strict=True):
        if network.ties != networks[0].ties:
            raise ValueError(
                f"{file.path}: the tensors that are one are {_bounded.short([tie[:2] for tie in network.ties])}, and "
                f"{_bounded.short([tie[:2] for tie in networks[0].ties])} in {files[0].path}; expected the same. "
                "Save copies in both."
            )
    constants = [_other_arrays(file) for file in files]
    for file, some in zip(files[1:], constants[1:], strict=True):
        for path, value in some.items():
            if np.size(value) > 1 and not np.array_equal(value, np.asarray(constants[0].get(path))):
                raise ValueError(
                    f"{file.path}: {architecture.describe(path)} is {np.asarray(value).dtype}, and differs from that "
                    f"in {files[0].path}; expected weights of floating-point numbers, and all else alike."
                )

    def call(params: Any, x: Any) -> Any:
        whole = networks[0].with_ties(params) if networks[0].ties else params
        return function(architecture.unflatten(architecture.flatten(whole) | constants[0]), x)

    call.__name__ = name
    return call


def infer(name: str, function: Callable[[Any, Any], Any], file: NetworkFile, path: Path, x: jax.Array) -> Inference:
    """The architecture of the network that the function computes; the function is checked on one and on two examples.

    Raises:
      ValueError: If the function fails, is not pure, does not treat the examples of a batch one by one, or has no
        neurons that could be aligned.
    """
    pair = x[:2] if len(x) > 1 else jnp.concatenate([x, x])
    try:
        first, again, alone = (np.asarray(function(file.params, some)) for some in (pair, pair, pair[:1]))
    except Exception as error:  # whatever the user's function does
        raise ValueError(
            f"--module {name} failed on x {pair.shape} {pair.dtype} of {path}: {error!r}. It gets the file's tensors "
            f"by name, like {_example(file.params)}, and a batch of x."
        ) from error
    if first.dtype.kind != "f":
        raise ValueError(f"--module {name} returns {first.dtype}; expected one array of floating-point numbers.")
    if not np.array_equal(first, again, equal_nan=True):
        raise ValueError(f"--module {name} is not pure: two calls differ. Let it depend on (params, x) alone.")
    if first.shape[:1] != (2,) or alone.shape[:1] != (1,):
        raise ValueError(
            f"--module {name} returns {first.shape} for 2 examples and {alone.shape} for 1; expected a leading batch "
            "axis. Let it return one output per example."
        )
    size = np.abs(first).max(initial=0)
    if not np.abs(first[:1] - alone).max(initial=0) <= _TOLERANCE * max(size, 1e-30):
        raise ValueError(
            f"--module {name} gives an example other outputs in a batch than alone, or outputs that are not finite; "
            "expected a function in evaluation mode. Let it use stored statistics."
        )
    found = inference.infer(function, file.params, pair)
    if not found.arch.hidden:
        raise ValueError(f"--module {name} has no neurons that could be aligned: {' '.join(found.notes[:3])}")
    return found


# --- private ------------------------------------------------------------------------------------------------------


def _other_arrays(file: ArrayFile) -> dict[tuple[str, ...], Any]:
    leaves = architecture.flatten(file.arrays)
    return {path: leaf for path, leaf in leaves.items() if not jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating)}


def _example(params: Mapping[str, Any]) -> str:
    path, leaf = next(iter(architecture.flatten(params).items()))
    return f"params{architecture.describe(path)} {np.shape(leaf)}"
