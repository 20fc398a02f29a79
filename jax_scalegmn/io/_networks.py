"""Networks in files, read as params and written back in the same format: PyTorch's and Flax's formats, and Orbax's."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, architecture, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import _atomic, _order, _torch_modules, _trees, tensors, torch_layout
from jax_scalegmn.types import Params


class FileFormat(NamedTuple):
    """How a file stores arrays.

    Attributes:
      kind: The ending of the file's name, like ".pt", or "orbax" for a folder.
      wrapper: The key under which a PyTorch file holds its state_dict, if any; several for dicts within dicts.

    >>> from jax_scalegmn import io
    >>> io.FileFormat(".safetensors")
    FileFormat(kind='.safetensors', wrapper=None)
    """

    kind: str
    wrapper: str | tuple[str, ...] | None = None


class ArrayFile(NamedTuple):
    """A file as it is stored, before an architecture says what its arrays mean.

    Attributes:
      path: The file or folder.
      format: The file's format.
      arrays: Tensors by name, or the nested dicts of a msgpack or Orbax file; arrays in their own dtypes.
      shared: The names of tensors that share entries, in groups, as in `tensors.shared`.

    >>> import pathlib
    >>> from jax_scalegmn import io
    >>> io.ArrayFile(pathlib.Path("a.npz"), io.FileFormat(".npz"), {}).format.kind
    '.npz'
    """

    path: Path
    format: FileFormat
    arrays: dict[str, Any]
    shared: tuple[tuple[str, ...], ...] = ()


class NetworkFile(NamedTuple):
    """A network and the file that it was read from.

    Attributes:
      params: The network's params in float32 or wider, with the statistics of batch normalizations next to the weights.
      format: The file's format.
      stored: The file's arrays, as in `ArrayFile.arrays`; those that are one in the file share memory.
      order: The names of PyTorch's modules in the order of the layers; None for Flax's names.
      ties: Tensors that are no params of their own, since they are another one: (name, its name, whether transposed).
      prefix: What all names of the file begin with, and the params' names do not, like "module.".

    >>> from jax_scalegmn import io
    >>> io.NetworkFile({}, io.FileFormat(".pt", "model"), {}).format.wrapper
    'model'
    """

    params: dict[str, Any]
    format: FileFormat
    stored: dict[str, Any]
    order: tuple[str, ...] | None = None
    ties: tuple[tuple[str, str, bool], ...] = ()
    prefix: str = ""

    def with_ties(self, params: Params) -> dict[str, Any]:
        """Params of this file with all its names: those of `ties` get what they are."""
        return {**params, **{name: params[own].T if turned else params[own] for name, own, turned in self.ties}}


def read_network(
    path: str | os.PathLike[str],
    arch: Architecture,
    *,
    order: Sequence[str] | None = None,
    key: str | None = None,
) -> NetworkFile:
    """Reads a network from a file in any of these formats:

    - .safetensors, .npz, and PyTorch's files of any name: PyTorch's tensors by name, as `from_torch` reads them, or
      Flax's arrays by their paths with "/" or "." between the keys. The names tell which.
    - .msgpack: flax.serialization.to_bytes or msgpack_serialize, of params or variables.
    - a folder: a checkpoint of params or variables by orbax.checkpoint.StandardCheckpointer.

    Flax's paths are those of `arch.parameters`, with or without "params" before them, and statistics under
    "batch_stats" as in Flax's variables. Half precision is converted to float32. float64 is kept if JAX has it enabled
    (`jax.enable_x64`), and otherwise becomes float32.

    Args:
      path: The file or folder.
      arch: The network's architecture.
      order: The names of PyTorch's modules in the order in which the network applies them, as in `from_torch`. Files
        whose names are sorted, like .safetensors, need it if shapes and numbers in the names leave several orders.
      key: The dict of tensors to read in a PyTorch file that holds several, as in `tensors.read`.

    Returns:
      The network and the file's format, which `write_network` needs.

    Raises:
      FileNotFoundError: If there is no such file or folder.
      ImportError: On an Orbax checkpoint, if Orbax is not installed.
      ValueError: If the file is damaged, foreign or of another network, holds a NaN, or several dicts of tensors; and
        if the order of its modules is unknown.

    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.pt"
    >>> sg.io.tensors.write(path, sg.io.to_torch(arch, sg.network.init(arch, jax.random.key(0))))
    >>> file = sg.io.read_network(path, arch)
    >>> file.params["Dense_0"]["kernel"].shape
    (2, 4)
    """
    return as_network(read_arrays(path, key=key), arch, order=order)


def read_arrays(path: str | os.PathLike[str], *, key: str | None = None) -> ArrayFile:
    """Reads the arrays of a file as they are stored; the first half of `read_network`.

    Args:
      path: The file or folder, in a format of `read_network`.
      key: The dict of tensors to read in a PyTorch file that holds several, as in `tensors.read`.

    Raises:
      FileNotFoundError: If there is no such file or folder.
      ImportError: On an Orbax checkpoint, if Orbax is not installed.
      ValueError: If it is damaged or foreign, or holds several dicts of tensors and no `key` is given; and if `key` is
        given for another format.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from jax_scalegmn import io
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(path, **{"Dense_0/kernel": np.ones((2, 1)), "Dense_0/bias": np.zeros(1)})
    >>> list(io.read_arrays(path).arrays)
    ['Dense_0/kernel', 'Dense_0/bias']
    """
    path = Path(path)
    if path.is_dir() or path.suffix == _trees.MSGPACK:
        if key is not None:
            raise ValueError(f"{path}: key is {key!r}, but only a file of PyTorch has dicts of tensors. Leave it out.")
        tree = _trees.read(path)
        wrong = [key for key, leaf in architecture.flatten(tree).items() if isinstance(leaf, list | tuple)]
        if wrong:
            where = architecture.describe(wrong[0])[:200]
            raise ValueError(f"{path}: {where} is a list; expected arrays in dicts. Save it as an array.")
        return ArrayFile(path, FileFormat(_ORBAX if path.is_dir() else path.suffix), tree)
    file = tensors.read_wrapped(path, key=key)
    return ArrayFile(path, FileFormat(file.kind, file.wrapper), file.tensors, file.shared)


def as_network(file: ArrayFile, arch: Architecture, *, order: Sequence[str] | None = None) -> NetworkFile:
    """Reads a file's arrays as the params of a network; the second half of `read_network`.

    Args:
      file: What `read_arrays` returned.
      arch: The network's architecture.
      order: The order of PyTorch's modules, as in `read_network`.

    Raises:
      ValueError: If the arrays are of another network, are not floating-point numbers, or hold a NaN; and if the order
        of their modules is unknown, or `order` is given for Flax's names, which tell the layers.

    >>> import pathlib
    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> arrays = {"0.weight": np.ones((1, 2), "float32"), "0.bias": np.zeros(1, "float32")}
    >>> file = sg.io.ArrayFile(pathlib.Path("a.pt"), sg.io.FileFormat(".pt"), arrays)
    >>> sg.io.as_network(file, sg.mlp((2, 1))).params["Dense_0"]["kernel"].shape
    (2, 1)
    """
    try:
        if arch.function is not None and all(len(path) == 1 for path in arch.array_shapes):
            return _by_name(arch, file, order)
        keys = _keys(arch, file.format, file.arrays)
        if keys is None:
            arrays = _torch_modules.tied(_in_known_order(file), file.shared)
            names = tuple(torch_layout.module_order(arch, arrays, order))
            params: dict[str, Any] = torch_layout.from_torch(arch, arrays, order=names)
            stored = {name: arrays[name] for name in file.arrays}
            return NetworkFile(stacks.at_least_float32(params), file.format, stored, names)
        if order is not None:
            raise ValueError(f"order {list(order)} is for PyTorch's names; Flax's name the layers. Leave it out.")
        return NetworkFile(_params(arch, keys, file.arrays), file.format, file.arrays)
    except ValueError as error:
        raise ValueError(f"{file.path}: {_bounded.one_line(error, 1800)}") from error


def as_stored(file: ArrayFile) -> NetworkFile:
    """Reads a file's arrays as params with the names and shapes that they have there, for a function of your own.

    Params are the tensors by name, like {"fc.weight": [out, in]} of a PyTorch file, or the nested dicts of Flax's
    formats. Whole numbers, like counters, are no params; `write_network` writes them unchanged. Of tensors that are
    one in the file the first is among the params, and stays what all of them are: a function that reads the others
    gets them by `NetworkFile.with_ties`.

    Args:
      file: What `read_arrays` returned.

    Returns:
      The network, in float32 or wider, and the file's format.

    Raises:
      ValueError: If a number is NaN or infinite, if there are no floating-point numbers, or if tensors overlap without
        being one or the transpose of one.

    >>> import pathlib
    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> arrays = {"0.weight": np.ones((1, 2), "float16"), "steps": np.array(3)}
    >>> file = sg.io.ArrayFile(pathlib.Path("a.pt"), sg.io.FileFormat(".pt"), arrays)
    >>> sg.io.as_stored(file).params["0.weight"].dtype
    dtype('float32')
    """
    ties = _ties(file)
    leaves = architecture.flatten(file.arrays)
    weights = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(np.asarray(leaf).dtype, jnp.floating)}
    weights = {path: leaf for path, leaf in weights.items() if path not in {(name,) for name, _, _ in ties}}
    if not weights:
        raise ValueError(
            f"{file.path}: no floating-point numbers, only "
            f"{_bounded.short([architecture.describe(path) for path in leaves])}."
        )
    params = stacks.at_least_float32(architecture.unflatten(weights))
    try:
        stacks.check_finite(params)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return NetworkFile(params, file.format, file.arrays, ties=ties)


@stacks.any_container("params")
def write_network(
    path: str | os.PathLike[str], arch: Architecture, params: Params, like: NetworkFile, *, overwrite: bool = False
) -> None:
    """Writes a network in the format, names and dtypes of a file that was read, num_batches_tracked included.

    The file is written completely or not at all. A folder is only replaced if it is an Orbax checkpoint.

    Args:
      path: Where to write. Its ending is that of the file that `like` was read from; a folder for Orbax.
      arch: The network's architecture.
      params: The network's params.
      like: What `read_network` returned for a network of this architecture.
      overwrite: Replace a file or checkpoint that exists.

    Raises:
      FileExistsError: If it exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      ImportError: On an Orbax checkpoint, if Orbax is not installed.
      ValueError: On another ending, if the params do not fit the architecture or `like`, or if a number is too large
        for its dtype.

    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> sg.io.tensors.write(folder / "a.pt", sg.io.to_torch(arch, sg.network.init(arch, jax.random.key(0))))
    >>> file = sg.io.read_network(folder / "a.pt", arch)
    >>> halved = jax.tree.map(lambda leaf: leaf / 2, file.params)
    >>> sg.io.write_network(folder / "b.pt", arch, halved, file)
    >>> list(sg.io.tensors.read(folder / "b.pt")) == list(file.stored)
    True
    """
    path = Path(path)
    check_writable(path, like.format, overwrite=overwrite)
    content = _content(arch, params, like)
    if like.format.kind in tensors.SUFFIXES:
        tensors.write(path, content, wrapper=like.format.wrapper, overwrite=overwrite)
    else:
        _trees.write(path, content, overwrite=overwrite)


def check_writable(path: str | os.PathLike[str], format: FileFormat | None = None, *, overwrite: bool = False) -> None:
    """Checks that a file may be written to `path`, before the work whose result it will hold.

    Args:
      path: Where to write.
      format: The format of a network, as `write_network` needs it; None for any other file.
      overwrite: Replace a file or checkpoint that exists.

    Raises:
      FileExistsError: If it exists and `overwrite` is not set.
      FileNotFoundError: If the folder to put it into does not exist.
      ValueError: If the ending is not that of the format.

    >>> from jax_scalegmn import io
    >>> io.check_writable("a.npz", io.FileFormat(".pt"))
    Traceback (most recent call last):
    ...
    ValueError: a.npz: expected a name that ends in .pt or .pth, ...
    """
    path = Path(path)
    if format is None:
        _atomic.check_free(path, overwrite=overwrite)
        return
    kinds = tensors.TORCH_SUFFIXES if format.kind in (".pt", ".pth") else (format.kind,)
    if format.kind == _ORBAX:
        if path.suffix in (*tensors.SUFFIXES, _trees.MSGPACK):
            raise ValueError(f"{path}: expected the name of a folder, since the network is from an Orbax checkpoint.")
    elif path.suffix not in kinds:
        raise ValueError(
            f"{path}: expected a name that ends in {' or '.join(kinds[:2])}, since the network is written in the "
            f"format of the first one; got {path.suffix!r}. Rename it."
        )
    if format.kind in tensors.SUFFIXES:
        _atomic.check_free(path, overwrite=overwrite)
    else:
        _trees.check_free(path, overwrite=overwrite)


def infer_mlp(file: ArrayFile, activation: str, *, order: Sequence[str] | None = None) -> Architecture:
    """Infers the multilayer perceptron of a file: its widths are the shapes of the dense kernels.

    PyTorch's layers are taken in the order of the file, or the one that shapes and numbers in the names leave, where
    the names are sorted; Flax's as Dense_0, Dense_1, ...

    Args:
      file: What `read_arrays` returned.
      activation: The activation of all hidden layers, which no file stores.
      order: The order of PyTorch's modules, as in `read_network`.

    Raises:
      ValueError: If the arrays are not a chain of dense kernels in a known order, or the activation's symmetry group
        is unknown.

    >>> import pathlib
    >>> import numpy as np
    >>> from jax_scalegmn import io
    >>> arrays = {"0.weight": np.ones((4, 2)), "0.bias": np.ones(4), "1.weight": np.ones((1, 4)), "1.bias": np.ones(1)}
    >>> io.infer_mlp(io.ArrayFile(pathlib.Path("a.pt"), io.FileFormat(".pt"), arrays), "relu").name
    'mlp 2-4-1 relu'
    """
    if activation == "sine":
        raise ValueError(f"{file.path}: the frequency of sines does not follow from the arrays. {_PASS_ARCHITECTURE}")
    shapes = _dense_kernels(file, order)
    links = [left[-1:] == right[:1] for left, right in itertools.pairwise(shapes)]
    if not shapes or not all(links) or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"{file.path}: kernels {_bounded.short(shapes)} [in, out] are not a chain of dense layers. "
            f"{_PASS_ARCHITECTURE}"
        )
    return architecture.mlp([shapes[0][0], *(width for _, width in shapes)], activation)


# --- private: what the arrays mean ----------------------------------------------------------------------------------

_ORBAX = "orbax"
_PASS_ARCHITECTURE = "Pass the architecture, as a builder or as JSON of Architecture.as_json."
_TORCH_KINDS = {*_torch_modules.KINDS, *_torch_modules.PARTS, *_torch_modules.SPECTRAL, *_torch_modules.COUNTERS}
_Path: TypeAlias = tuple[str, ...]
# Three layouts of weights and statistics: the paths as they are, all below "params", and Flax's variables.
_PREFIXES: tuple[tuple[_Path, _Path], ...] = (
    ((), ()),
    (("params",), ("params",)),
    (("params",), ("batch_stats",)),
)


def _params(arch: Architecture, keys: Mapping[_Path, _Path], stored: Mapping[str, Any]) -> dict[str, Any]:
    leaves = architecture.flatten(stored)
    if set(keys.values()) != leaves.keys():
        missing = [architecture.describe(key) for key in keys.values() if key not in leaves]
        additional = [architecture.describe(key) for key in leaves if key not in keys.values()]
        raise ValueError(
            f"{arch.name!r} expects {len(keys)} arrays; missing are {missing[:5]}, additional {additional[:5]}. It is "
            "another network, or the file holds more than one: save its params alone, or params and batch_stats."
        )
    arrays = {}
    for path, key in keys.items():
        value = leaves[key]
        if not isinstance(value, np.ndarray) or not jnp.issubdtype(value.dtype, jnp.floating):
            got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            name = architecture.describe(key)
            raise ValueError(f"{name} is {got}; expected an array of floating-point numbers. Convert it.")
        arrays[path] = stacks.at_least_float32(value)
    params = architecture.unflatten(arrays)
    architecture.check_params(arch, params)
    return params


def _keys(arch: Architecture, format: FileFormat, stored: Mapping[str, Any]) -> dict[_Path, _Path] | None:
    """The file's key for each path of the params; None for PyTorch's names."""
    paths = arch.array_shapes.keys()
    layouts = []
    for weights, statistics in _PREFIXES:
        keys = {path: (*(statistics if path[-1] in network.STATISTICS else weights), *path) for path in paths}
        if format.kind not in tensors.SUFFIXES:
            layouts.append(keys)
        else:
            layouts += [{path: (separator.join(key),) for path, key in keys.items()} for separator in "/."]
    leaves = architecture.flatten(stored)
    for keys in layouts:
        if set(keys.values()) == leaves.keys():
            return keys
    if format.kind in tensors.SUFFIXES and _is_torch(stored):
        return None
    return max(layouts, key=lambda keys: len(leaves.keys() & set(keys.values())))  # the nearest, for the error


def _by_name(arch: Architecture, file: ArrayFile, order: Sequence[str] | None) -> NetworkFile:
    """A network whose params are the file's tensors by name."""
    own = as_stored(file)
    if own.ties:
        raise ValueError(
            f"{file.path}: {own.ties[0][0]!r} and {own.ties[0][1]!r} are one tensor, which the layers of {arch.name!r} "
            "have as two. Infer your own function (sg.infer, --module), which keeps the tie, or save copies."
        )
    wanted = {name for (name,) in arch.array_shapes}
    prefix = _prefix(own.params.keys(), min(wanted))
    if prefix and {prefix + name for name in wanted} == own.params.keys():
        own = own._replace(params={name: own.params[prefix + name] for name in wanted}, prefix=prefix)
    names = own.params.keys()
    if order is not None:
        raise ValueError(f"order {list(order)} is given, but {arch.name!r} has the names of the file. Leave it out.")
    if names != wanted:
        raise ValueError(
            f"{arch.name!r} expects the names {sorted(wanted)[:10]}; missing are {sorted(wanted - names)[:5]}, "
            f"additional {sorted(names - wanted)[:5]}. Give the layers the file's names, by name=."
        )
    architecture.check_params(arch, own.params)
    return own


def _prefix(names: Iterable[str], name: str) -> str:
    """What is before a name in the shortest of the names that end with it after a dot."""
    longer = [own for own in names if own.endswith(f".{name}")]
    return min(longer, key=len).removesuffix(name) if longer else ""


def _content(arch: Architecture, params: Params, like: NetworkFile) -> dict[str, Any]:
    """The file's arrays, with those of the params in place of the stored ones."""
    architecture.check_params(arch, params)
    new = architecture.flatten(like.with_ties(params) if like.ties else params)
    new = {(like.prefix + name, *rest): value for (name, *rest), value in new.items()}
    if new.keys() <= architecture.flatten(like.stored).keys():  # the file's own names
        return _replaced(like.stored, new, ())
    keys = _keys(arch, like.format, like.stored)
    if keys is None:
        return dict(torch_layout.to_torch(arch, params, like.stored, order=like.order))
    if set(keys.values()) != architecture.flatten(like.stored).keys():
        raise ValueError(f"like is not a network of {arch.name!r}. Pass what io.read_network returned for one.")
    return _replaced(like.stored, {key: new[path] for path, key in keys.items()}, ())


def _ties(file: ArrayFile) -> tuple[tuple[str, str, bool], ...]:
    """The tensors that are another one or its transpose, each with the name of the first of its group."""
    try:
        views = _torch_modules.tied(file.arrays, file.shared)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    groups = [(first, other) for first, *others in file.shared for other in others]
    return tuple((other, first, not np.array_equal(views[other], views[first])) for first, other in groups)


def _replaced(node: Any, values: Mapping[_Path, Any], key: _Path) -> Any:
    """Nested dicts like `node`, empty ones included, with new values in the order and dtypes of the old ones."""
    if isinstance(node, Mapping):
        return {name: _replaced(inner, values, (*key, name)) for name, inner in node.items()}
    if key not in values:
        return node
    value, name = np.asarray(values[key]), architecture.describe(key)
    if value.shape != node.shape:
        raise ValueError(f"{name} has shape {node.shape} in the file, the new one {value.shape}; expected one shape.")
    return torch_layout.as_dtype(value, node.dtype, name)


def _in_known_order(file: ArrayFile) -> dict[str, Any]:
    """The file's tensors, sorted where the format does not keep their order, so that this shows."""
    return dict(sorted(file.arrays.items())) if file.format.kind == ".safetensors" else file.arrays


def _torch_chain(file: ArrayFile, order: Sequence[str] | None) -> list[tuple[int, ...]]:
    arrays = _in_known_order(file)
    if (cause := _torch_modules.cause(arrays)) is not None:
        raise ValueError(f"{file.path}: {cause}")
    tensors_of = {name: _torch_modules.shapes(arrays, keys) for name, keys in _torch_modules.grouped(arrays).items()}
    shapes = {name: of["weight"][::-1] for name, of in tensors_of.items() if "weight" in of}
    if any(len(shape) != 2 for shape in shapes.values()):
        return list(shapes.values())
    try:
        names = _order.chain(shapes, told=_order.is_told(arrays), order=order)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return [shapes[name] for name in names or shapes]


def _dense_kernels(file: ArrayFile, order: Sequence[str] | None) -> list[tuple[int, ...]]:
    """The shapes [in, out] of the kernels Dense_0, Dense_1, ..., or of the weights of PyTorch's modules, in order."""
    path, format, arrays = file.path, file.format, file.arrays
    if format.kind in tensors.SUFFIXES and _is_torch(arrays):
        return _torch_chain(file, order)
    leaves = architecture.flatten(arrays)
    if format.kind in tensors.SUFFIXES:
        leaves = {tuple(re.split(r"[/.]", key[0])): leaf for key, leaf in leaves.items()}
    shapes = {key[-2:]: np.shape(leaf) for key, leaf in leaves.items() if key[:-2] in ((), ("params",))}
    count = sum(key[-1] == "kernel" for key in shapes)
    kernels = [shapes.get((f"Dense_{index}", "kernel"), ()) for index in range(count)]
    if not kernels or () in kernels:
        raise ValueError(
            f"{path}: expected the kernels Dense_0, Dense_1, ...; got {_bounded.short(list(leaves))}. "
            f"{_PASS_ARCHITECTURE}"
        )
    return kernels


def _is_torch(arrays: Mapping[str, Any]) -> bool:
    plain = all(_torch_modules.split(name)[1] in _TORCH_KINDS for name in arrays)
    return plain or _torch_modules.cause(arrays) is not None
