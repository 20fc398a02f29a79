"""A network's params as PyTorch's tensors, and back. `tensors` reads and writes their files."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, BatchNorm, Conv, Dense, GroupNorm, LayerNorm, Parameter
from jax_scalegmn.io import _order
from jax_scalegmn.types import Params

__all__ = ["StateDict", "array_of_tensor", "checked_tensor", "from_torch", "tensor_shape", "to_torch"]

# Tensors by name, in PyTorch's layout and in the order of the modules.
StateDict: TypeAlias = Mapping[str, np.ndarray]
_Path: TypeAlias = tuple[str, ...]


def from_torch(
    arch: Architecture, state_dict: StateDict, *, order: Sequence[str] | None = None
) -> dict[str, dict[str, jax.Array]]:
    """Converts a PyTorch state_dict to the params of a network.

    The modules of `state_dict` are those of `arch.layers` in that order: the order in which PyTorch registers them, if
    nothing has sorted the names; else the one order that shapes and numbers in the names leave. Linear weights
    [out, in] and convolutional ones [out, in, kh, kw] become kernels [in, out] and [kh, kw, in, out]. After a Flatten
    the inputs are reordered, from PyTorch's channels slowest to channels fastest. A normalization's weight becomes its
    scale, and running_mean and running_var its mean and var. The modules of a Residual are in the order branch,
    shortcut, as in torchvision; PyTorch's strided convolutions need padding=1 (`architecture.resnet`).

    Args:
      arch: The network's architecture, with layers.
      state_dict: The tensors of each linear, convolutional or normalizing module, and no others, except BatchNorm's
        num_batches_tracked, which is ignored.
      order: The names of modules in the order in which the network applies them: of all, or of those of equal shape
        whose order nothing else tells. Sorted names (safetensors, pytrees) need it, unless they are numbered.

    Returns:
      The params, for `network.apply`.

    Raises:
      ValueError: On a missing, additional or misshapen tensor, or one that is not of finite floating-point numbers;
        and if the order of the modules is unknown.

    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> tensors = {"0.weight": np.array([[1.0, 2.0]]), "0.bias": np.array([3.0])}
    >>> params = sg.io.from_torch(sg.mlp((2, 1)), tensors)
    >>> params["Dense_0"]["kernel"].tolist()
    [[1.0], [2.0]]
    """
    values = []
    for parameter, key in zip(arch.parameters, _keys(arch, state_dict, order), strict=True):
        value = checked_tensor(state_dict, key, tensor_shape(arch, parameter), arch.name)
        values.append(jnp.asarray(array_of_tensor(arch, parameter, value)))
    return architecture.pack(arch, values)


@stacks.any_container("params")
def to_torch(
    arch: Architecture, params: Params, template: StateDict | None = None, *, order: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Converts a network's params to a PyTorch state_dict; the inverse of `from_torch`, bit for bit.

    Args:
      arch: The network's architecture, with layers.
      params: The params of one network.
      template: A state_dict of the same modules; the result has its names, order and dtypes, and a copy of its
        num_batches_tracked. Without it the names are those of the layers, like "Dense_0.weight", and the dtypes those
        of `params`.
      order: The order of the template's modules, as in `from_torch`.

    Returns:
      The tensors by name, in PyTorch's layout.

    Raises:
      ValueError: If the params or the template do not fit the architecture, or a number is too large for its dtype.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> tensors = sg.io.to_torch(arch, sg.network.init(arch, jax.random.key(0)))
    >>> {name: value.shape for name, value in tensors.items()}
    {'Dense_0.weight': (4, 2), 'Dense_0.bias': (4,), 'Dense_1.weight': (1, 4), 'Dense_1.bias': (1,)}
    """
    kinds = _kinds(arch)
    architecture.check_params(arch, params)
    arrays = [np.asarray(value) for value in architecture.unpack(arch, params)]
    tensors = [_tensor_of_array(arch, p, array) for p, array in zip(arch.parameters, arrays, strict=True)]
    if template is None:
        names = [".".join((*parameter.path[:-1], kinds[parameter.path])) for parameter in arch.parameters]
        return dict(zip(names, tensors, strict=True))
    keys = _keys(arch, template, order)
    for key, parameter in zip(keys, arch.parameters, strict=True):
        checked_tensor(template, key, tensor_shape(arch, parameter), arch.name)
    own = {key: as_dtype(tensor, template[key].dtype, _named(key)) for key, tensor in zip(keys, tensors, strict=True)}
    return {key: own[key] if key in own else np.array(value) for key, value in template.items()}


def checked_tensor(state_dict: StateDict, key: str, shape: Sequence[int], network: str) -> np.ndarray:
    """Returns one tensor of a state_dict, after a check of its shape and values.

    Args:
      state_dict: The tensors by name.
      key: The tensor's name.
      shape: The shape that the network expects, in PyTorch's layout.
      network: The network's name, for the error.

    Raises:
      ValueError: If the tensor has another shape, or is not of finite floating-point numbers.

    >>> import numpy as np
    >>> from jax_scalegmn.io import torch_layout
    >>> torch_layout.checked_tensor({"weight": np.eye(2)}, "weight", (2, 2), "a network").shape
    (2, 2)
    """
    value = np.asarray(state_dict[key])
    if value.shape != tuple(shape):
        raise ValueError(
            f"{_named(key)} has shape {value.shape}; {network!r} expects {tuple(shape)}, in PyTorch's layout. It is "
            "of another architecture: these shapes fit in no order of the modules."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{_named(key)} is {value.dtype}; expected floating-point numbers. Convert quantized weights.")
    if not np.isfinite(value).all():
        raise ValueError(
            f"{_named(key)} holds {int((~np.isfinite(value)).sum())} NaN or infinite entries; expected finite numbers. "
            "The training diverged or the file is damaged: train or export it again."
        )
    return value


def as_dtype(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Finite numbers rounded to a dtype.

    Raises:
      ValueError: If one of them is too large for it.
    """
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(
            f"{name} has entries up to {np.abs(value).max():.3g}, too large for its dtype {np.dtype(dtype)}. Store "
            "the network in float32, or rescale it less."
        )
    return rounded


def tensor_shape(arch: Architecture, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter's tensor in PyTorch: [out], [out, in] or [out, in, kh, kw].

    Args:
      arch: The network's architecture.
      parameter: One of `arch.parameters`.

    >>> import jax_scalegmn as sg
    >>> arch = sg.cnn((1, 16), 10)
    >>> arch.shape(arch.parameters[0]), sg.io.torch_layout.tensor_shape(arch, arch.parameters[0])
    ((3, 3, 1, 16), (16, 1, 3, 3))
    """
    ours = arch.shape(parameter)
    return (*ours[:-3:-1], *ours[:-2])


def array_of_tensor(arch: Architecture, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """Converts one PyTorch tensor to the array of a parameter.

    The axes are permuted. For a dense layer after a Flatten, the inputs are also reordered, from channels slowest to
    channels fastest.

    Args:
      arch: The network's architecture.
      parameter: One of `arch.parameters`.
      value: Its tensor, with the shape `tensor_shape`.

    Returns:
      The array, with the shape `arch.shape(parameter)`.

    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1))
    >>> sg.io.torch_layout.array_of_tensor(arch, arch.parameters[0], np.zeros((3, 2))).shape
    (2, 3)
    """
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        channels_slowest = value.reshape(len(value), -1, parameter.neuron_axes[0].repeat)
        return channels_slowest.transpose(2, 1, 0).reshape(arch.shape(parameter))
    return value


# --- private ------------------------------------------------------------------------------------------------------

_WITH_PARAMS = Dense | Conv | BatchNorm | LayerNorm | GroupNorm
_TORCH_KIND = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _tensor_of_array(arch: Architecture, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """The inverse of `array_of_tensor`."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2:
        channels_fastest = value.reshape(parameter.neuron_axes[0].repeat, -1, value.shape[-1])
        return channels_fastest.transpose(2, 1, 0).reshape(tensor_shape(arch, parameter))
    return value


def _layers(arch: Architecture) -> list[_Path]:
    """The paths of the layers that have parameters, in order."""
    return [(*at, layer.name) for at, layer in architecture.walk(arch.layers) if isinstance(layer, _WITH_PARAMS)]


def _kinds(arch: Architecture) -> dict[_Path, str]:
    """What PyTorch calls each parameter within its module."""
    layers = _layers(arch)
    foreign = {parameter.path[-1] for parameter in arch.parameters} - _TORCH_KIND.keys()
    if not layers or foreign or set(layers) != {parameter.path[:-1] for parameter in arch.parameters}:
        raise ValueError(
            f"{arch.name!r} does not name the layer of each parameter (its layers are {_listed(layers)}). Convert the "
            "params yourself: kernels are transposed."
        )
    return {parameter.path: _TORCH_KIND[parameter.path[-1]] for parameter in arch.parameters}


def module_order(arch: Architecture, state_dict: StateDict, order: Sequence[str] | None = None) -> list[str]:
    """The modules of a state_dict in the order of the layers, as `from_torch` reads them.

    Raises:
      ValueError: As `from_torch`, but for values that are not finite.
    """
    kinds = _kinds(arch)
    return [module for module, _ in _modules(arch, state_dict, kinds, order).values()]


def _keys(arch: Architecture, state_dict: StateDict, order: Sequence[str] | None) -> list[str]:
    """The name of every parameter's tensor, in the order of `arch.parameters`."""
    kind_of_path = _kinds(arch)
    modules = _modules(arch, state_dict, kind_of_path, order)
    expected = {(path[:-1], kind) for path, kind in kind_of_path.items()}
    surplus = [
        name for layer, (_, names) in modules.items() for kind, name in names.items() if (layer, kind) not in expected
    ]
    if surplus:
        raise ValueError(
            f"The state_dict has {surplus}, for which {arch.name!r} has no parameters. It has other modules, or "
            "the biases of convolutions must be folded into the means of the normalizations after them."
        )
    keys = []
    for parameter in arch.parameters:
        module, names = modules[parameter.path[:-1]]
        kind = kind_of_path[parameter.path]
        if kind not in names:
            raise ValueError(
                f"{_named(f'{module}.{kind}'.lstrip('.'))} is missing; {arch.name!r} expects shape "
                f"{tensor_shape(arch, parameter)} for {architecture.describe(parameter.path)}. A module without bias "
                "needs a bias of zeros."
            )
        keys.append(names[kind])
    return keys


def _modules(
    arch: Architecture, state_dict: StateDict, kind_of_path: Mapping[_Path, str], order: Sequence[str] | None
) -> dict[_Path, tuple[str, dict[str, str]]]:
    """For each layer, its module's name and the names of that module's tensors by kind, like "weight"."""
    modules = _grouped(arch, state_dict, set(kind_of_path.values()))
    layers = _layers(arch)
    if len(modules) != len(layers):
        raise ValueError(
            f"The state_dict has {len(modules)} modules {list(modules)}; {arch.name!r} expects {len(layers)}, one for "
            f"each of {_listed(layers)}. Remove modules of other networks, or use another Architecture."
        )
    expected: dict[_Path, dict[str, tuple[int, ...]]] = {}
    for parameter in arch.parameters:
        shapes = expected.setdefault(parameter.path[:-1], {})
        shapes[kind_of_path[parameter.path]] = tensor_shape(arch, parameter)
    got = {module: {kind: np.shape(state_dict[key]) for kind, key in keys.items()} for module, keys in modules.items()}
    fits = [{module for module, shapes in got.items() if shapes == expected[layer]} for layer in layers]
    norms = {module for module, shapes in got.items() if len(shapes.get("weight", ())) < 2}
    told = _order.is_told(state_dict)
    names = _order.find(fits, list(modules), told=told, norms=norms, order=order)
    if names is None:  # no order fits: an error, of the first module that does not
        names = list(modules)
    return {layer: (name, modules[name]) for layer, name in zip(layers, names, strict=True)}


def _grouped(arch: Architecture, state_dict: StateDict, kinds: set[str]) -> dict[str, dict[str, str]]:
    """The names of the tensors by module and kind, in their order."""
    modules: dict[str, dict[str, str]] = {}
    for key in state_dict:
        module, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked" and "running_mean" in kinds:
            continue
        if kind not in kinds:
            raise ValueError(
                f"{_named(key)} is not a {' or '.join(sorted(kinds, reverse=True))}; {arch.name!r} expects no other. "
                "Remove it."
            )
        modules.setdefault(module, {})[kind] = key
    return modules


def _listed(layers: Sequence[_Path]) -> list[str]:
    return [".".join(path) for path in layers]


def _named(key: str) -> str:
    return f"state_dict[{key!r}]"
