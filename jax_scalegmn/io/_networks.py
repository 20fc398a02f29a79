"""Networks in files, read as params and written back as they came: PyTorch's and Flax's formats, and Orbax's.

No file can run code: pickles are not executed (`torch_file`), msgpack and Orbax hold data alone.
"""

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import _atomic, _trees, tensors, torch_layout
from jax_scalegmn.types import Params

TENSORS = (".safetensors", ".npz", ".pt", ".pth")
ORBAX = "orbax"


class Format(NamedTuple):
    """How a file stores arrays.

    Attributes:
      kind: the ending of the file's name, or "orbax" for a folder.
      wrapper: the key under which a .pt or .pth file holds its state_dict, if any.
    """

    kind: str
    wrapper: str | None = None


class Contents(NamedTuple):
    """What a file holds: tensors by name, or the nested mapping of a msgpack or Orbax file, in their own dtypes."""

    path: Path
    format: Format
    arrays: dict[str, Any]


class NetworkFile(NamedTuple):
    """A network with the file that it comes from.

    Attributes:
      params: of the network, statistics of batch normalizations beside the weights; in float32 or wider.
      format: of the file.
      template: its arrays as in `Contents`.
    """

    params: dict[str, Any]
    format: Format
    template: dict[str, Any]


def read_network(path: str | os.PathLike[str], arch: Architecture) -> NetworkFile:
    """A network from a file, in whichever of the formats it is.

    - .safetensors, .npz, .pt, .pth: PyTorch's tensors by name, as `io.from_torch` reads them, or arrays by their
      paths in Flax with "/" or "." between; the names tell which.
    - .msgpack: flax.serialization.to_bytes or msgpack_serialize, of params or variables.
    - a folder: a checkpoint of params or variables by orbax.checkpoint.StandardCheckpointer.

    Paths are those of `arch.parameters`, all below "params" or none, with "batch_stats" as in Flax's variables. Half
    precision is computed in float32. float64 stays what it is where JAX has it (`jax.enable_x64`), and becomes float32
    elsewhere, as always in JAX.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if it is damaged, foreign or of another network, asks for code to be run, or has a NaN.
    """
    return interpret(read_contents(path), arch)


def interpret(found: Contents, arch: Architecture) -> NetworkFile:
    """The network whose arrays a file holds; `read` is this behind `contents`.

    Raises:
      ValueError: if the arrays are of another network, no floating-point numbers, or hold a NaN.
    """
    try:
        return NetworkFile(_params(arch, found.format, found.arrays), found.format, found.arrays)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def write_network(
    path: str | os.PathLike[str], arch: Architecture, params: Params, like: NetworkFile, *, overwrite: bool = False
) -> None:
    """Writes a network as the file `like` was: its format, names, wrappers and dtypes, and its num_batches_tracked.

    The file is there in full or not at all; a folder is only replaced where it is a checkpoint itself.

    Args:
      path: ends like the file that `like` was read from; a folder for Orbax.
      arch: of the network.
      params: of the network.
      like: what `read` gave.
      overwrite: replace a file or checkpoint that is there.

    Raises:
      FileExistsError: if there is one and `overwrite` is not set.
      FileNotFoundError: if there is no folder to put it into.
      ValueError: on another ending, params that do not fit the architecture or `like`, or a number that is too large
        for its dtype.
    """
    path = Path(path)
    check_output(path, like.format, overwrite=overwrite)
    content = _content(arch, params, like)
    if like.format.kind in TENSORS:
        tensors.write(path, content, wrapper=like.format.wrapper, overwrite=overwrite)
    else:
        _trees.write(path, content, overwrite=overwrite)


def check_output(path: str | os.PathLike[str], format: Format, *, overwrite: bool = False) -> None:
    """Checks that a network of that format may be written to `path`, before it is computed.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `write`.
    """
    path = Path(path)
    kinds = (".pt", ".pth") if format.kind in (".pt", ".pth") else (format.kind,)
    if format.kind == ORBAX:
        if path.suffix in (*TENSORS, _trees.MSGPACK):
            raise ValueError(f"{path}: expected the name of a folder, since the network is from an Orbax checkpoint.")
    elif path.suffix not in kinds:
        raise ValueError(
            f"{path}: expected a name that ends in {' or '.join(kinds)}, since the network is written in the format of "
            f"the first one; got {path.suffix!r}. Rename it."
        )
    (_atomic if format.kind in TENSORS else _trees).check_free(path, overwrite=overwrite)


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """The format of a file and its arrays as they are stored, without an architecture that says what they mean.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if it is damaged or foreign, or asks for code to be run.
    """
    path = Path(path)
    if path.is_dir():
        return Contents(path, Format(ORBAX), _trees.read(path))
    if path.suffix == _trees.MSGPACK:
        return Contents(path, Format(path.suffix), _trees.read(path))
    if path.suffix not in TENSORS:
        raise ValueError(
            f"{path}: expected a file {', '.join((*TENSORS, _trees.MSGPACK))}, or the folder of an Orbax "
            "checkpoint. Rename it."
        )
    state_dict, wrapper = tensors.read_wrapped(path)
    return Contents(path, Format(path.suffix, wrapper), state_dict)


def dense_chain(found: Contents, activation: str) -> Architecture:
    """The multilayer perceptron whose dense kernels a file holds: its widths follow from their shapes.

    In PyTorch's names the order is that of the modules in the file; in Flax's the layers are Dense_0, Dense_1, ...

    Args:
      found: in the file.
      activation: of all hidden layers, which the tensors do not tell.

    Raises:
      ValueError: on an activation whose group is unknown; if the arrays are no chain of dense kernels in a known order.
    """
    if activation == "sine":
        raise ValueError(f"{found.path}: the frequency of sines does not follow from the arrays. {_SAY}")
    kernels = _dense_kernels(found)
    links = [left[-1:] == right[:1] for left, right in itertools.pairwise(kernels)]
    if not kernels or not all(links) or any(len(shape) != 2 for shape in kernels):
        raise ValueError(f"{found.path}: kernels {kernels} [in, out] are no chain of dense layers. {_SAY}")
    return architecture.mlp([kernels[0][0], *(width for _, width in kernels)], activation)


# --- private: what the arrays mean ----------------------------------------------------------------------------------

_SAY = "Say the architecture, by a builder or as JSON of Architecture.as_json."
_TORCH_KINDS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# Where weights and statistics stand: as they are, all below "params", and in Flax's variables.
_PLACES = (((), ()), (("params",), ("params",)), (("params",), ("batch_stats",)))


def _params(arch: Architecture, format: Format, template: Mapping[str, Any]) -> dict[str, Any]:
    leaves = _leaves(template)
    keys = _keys(arch, format, template)
    if keys is None:
        params: dict[str, Any] = torch_layout.from_torch(arch, template)
        return stacks.at_least_float32(params)
    if set(keys.values()) != leaves.keys():
        missing = [_shown(key) for key in keys.values() if key not in leaves]
        additional = [_shown(key) for key in leaves if key not in keys.values()]
        raise ValueError(
            f"{arch.name!r} expects {len(keys)} arrays; missing are {missing[:5]}, additional {additional[:5]}. It is "
            "another network, or the file holds more than one: save its params alone, or params and batch_stats."
        )
    # By path, since several parameters may be blocks of one array.
    params = {}
    for path, key in keys.items():
        value = leaves[key]
        if not isinstance(value, np.ndarray) or not jnp.issubdtype(value.dtype, jnp.floating):
            got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise ValueError(f"{_shown(key)} is {got}; expected an array of floating-point numbers. Convert it.")
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = stacks.at_least_float32(value)
    architecture.unpack(arch, params)
    return params


def _keys(
    arch: Architecture, format: Format, template: Mapping[str, Any]
) -> dict[tuple[str, ...], tuple[str, ...]] | None:
    """Where each path's array stands in the file; None for PyTorch's names."""
    paths = dict.fromkeys(parameter.path for parameter in arch.parameters)
    places = []
    for weights, statistics in _PLACES:
        place = {path: (*(statistics if path[-1] in network.STATISTICS else weights), *path) for path in paths}
        if format.kind not in TENSORS:
            places.append(place)
        else:
            places += [{path: (mark.join(key),) for path, key in place.items()} for mark in "/."]
    leaves = _leaves(template)
    for place in places:
        if set(place.values()) == leaves.keys():
            return place
    if format.kind in TENSORS and _is_torch(template):
        return None
    return max(places, key=lambda place: len(leaves.keys() & set(place.values())))  # to say what is wrong


def _content(arch: Architecture, params: Params, like: NetworkFile) -> dict[str, Any]:
    """The params in the place of what the file held."""
    architecture.unpack(arch, params)
    keys = _keys(arch, like.format, like.template)
    if keys is None:
        return dict(torch_layout.to_torch(arch, params, like.template))
    if set(keys.values()) != _leaves(like.template).keys():
        raise ValueError(f"like is of another network than {arch.name!r}. Pass what io.read_network gave for it.")
    new = _leaves(params)
    return _replaced(like.template, {key: new[path] for path, key in keys.items()}, ())


def _replaced(node: Any, values: Mapping[tuple[str, ...], Any], at: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
        return {key: _replaced(inner, values, (*at, key)) for key, inner in node.items()}
    value = np.asarray(values[at])
    if value.shape != node.shape:
        raise ValueError(f"{_shown(at)} has shape {node.shape} in the file, the new one {value.shape}; expected one.")
    return torch_layout.as_dtype(value, node.dtype, _shown(at))


def _leaves(tree: Any, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(tree, Mapping):
        return {where: leaf for key, node in tree.items() for where, leaf in _leaves(node, (*at, key)).items()}
    return {at: tree}


def _shown(key: tuple[str, ...]) -> str:
    return architecture.describe(key)


def _dense_kernels(found: Contents) -> list[tuple[int, ...]]:
    """The shapes [in, out] of the kernels Dense_0, Dense_1, ..., or of the weights of PyTorch's modules, in order."""
    path, format, arrays = found
    if format.kind in TENSORS and _is_torch(arrays):
        weights = [name for name in arrays if name.rpartition(".")[-1] == "weight"]
        if format.kind == ".safetensors" and len({re.sub(r"\d+", "0", name) for name in weights}) > 1:
            raise ValueError(f"{path}: the order of {weights} is not told by the format, which sorts them. {_SAY}")
        return [np.shape(arrays[name])[::-1] for name in weights]
    leaves = {
        key if format.kind not in TENSORS else tuple(re.split(r"[/.]", key[0])): leaf
        for key, leaf in _leaves(arrays).items()
    }
    shapes = {key[-2:]: np.shape(leaf) for key, leaf in leaves.items() if key[:-2] in ((), ("params",))}
    count = sum(key[-1] == "kernel" for key in shapes)
    kernels = [shapes.get((f"Dense_{index}", "kernel"), ()) for index in range(count)]
    if not kernels or () in kernels:
        raise ValueError(f"{path}: expected the kernels Dense_0, Dense_1, ...; got {list(leaves)[:10]}. {_SAY}")
    return kernels


def _is_torch(arrays: Mapping[str, Any]) -> bool:
    return all(name.rpartition(".")[-1] in _TORCH_KINDS for name in arrays)
