"""A network's params as PyTorch's tensors (`torch_file` reads and writes them), and back."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture, BatchNorm, Conv, Dense, GroupNorm, LayerNorm, Parameter
from jax_scalegmn.types import Params

__all__ = ["StateDict", "as_array", "as_dtype", "as_tensor", "checked", "from_torch", "shape", "to_torch"]

# Tensors by name, in PyTorch's layout and in the order of the modules.
StateDict: TypeAlias = Mapping[str, np.ndarray]


def from_torch(arch: Architecture, state_dict: StateDict) -> dict[str, dict[str, jax.Array]]:
    """The params of a network whose modules stand in `state_dict` in the order of `arch.layers`.

    Linear weights [out, in] and convolutional ones [out, in, kh, kw] become kernels [in, out] and [kh, kw, in, out].
    Behind a Flatten the inputs are reordered, from PyTorch's channels slowest to channels fastest. A normalization's
    weight becomes its scale, and running_mean and running_var its mean and var. The modules of a Residual stand in the
    order branch, shortcut, as in torchvision; PyTorch's strided convolutions need padding=1 (`architecture.resnet`).

    Args:
      arch: of the network, with layers.
      state_dict: the tensors of each linear, convolutional or normalizing module, and nothing else but BatchNorm's
        num_batches_tracked, which is not read.

    Raises:
      ValueError: on a missing, additional or misshapen tensor, or one that is not of finite floating-point numbers.
    """
    values = []
    for parameter, key in zip(arch.parameters, _keys(arch, state_dict), strict=True):
        value = checked(state_dict, key, shape(arch, parameter), arch.name)
        values.append(jnp.asarray(as_array(arch, parameter, value)))
    return architecture.pack(arch, values)


def to_torch(arch: Architecture, params: Params, template: StateDict | None = None) -> dict[str, np.ndarray]:
    """The state_dict of a network: the inverse of `from_torch`, bit for bit.

    Args:
      arch: of the network, with layers.
      params: of one network.
      template: a state_dict of the same modules, whose names, order and dtypes are taken over, and whose
        num_batches_tracked are copied. Without one the names are those of the layers, like "Dense_0.weight", and the
        dtypes those of `params`.

    Returns:
      The tensors by name, in PyTorch's layout.

    Raises:
      ValueError: if the params or the template do not fit the architecture, or a number is too large for its dtype.
    """
    kinds = _kinds(arch)
    arrays = [np.asarray(value) for value in architecture.unpack(arch, params)]
    tensors = [as_tensor(arch, parameter, array) for parameter, array in zip(arch.parameters, arrays, strict=True)]
    if template is None:
        names = [".".join((*parameter.path[:-1], kinds[parameter.path])) for parameter in arch.parameters]
        return dict(zip(names, tensors, strict=True))
    keys = _keys(arch, template)
    for key, parameter in zip(keys, arch.parameters, strict=True):
        checked(template, key, shape(arch, parameter), arch.name)
    own = {key: as_dtype(tensor, template[key].dtype, _named(key)) for key, tensor in zip(keys, tensors, strict=True)}
    return {key: own[key] if key in own else np.array(value) for key, value in template.items()}


def checked(state_dict: StateDict, key: str, shape: Sequence[int], expecting: str) -> np.ndarray:
    """The tensor of that name.

    Raises:
      ValueError: if it has another shape than `expecting`, the name of a network, expects, or is not of finite
        floating-point numbers.
    """
    value = np.asarray(state_dict[key])
    if value.shape != tuple(shape):
        raise ValueError(
            f"{_named(key)} has shape {value.shape}; {expecting!r} expects {tuple(shape)}, in PyTorch's layout. It is "
            "of another architecture, or its modules stand in another order."
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
      ValueError: if one of them is too large for it.
    """
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype)
    if not np.isfinite(rounded).all():
        raise ValueError(
            f"{name} has entries up to {np.abs(value).max():.3g}, too large for its dtype {np.dtype(dtype)}. Store "
            "the network in float32, or rescale it less."
        )
    return rounded


def shape(arch: Architecture, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter's tensor in PyTorch: [out], [out, in] or [out, in, kh, kw]."""
    ours = arch.shape(parameter)
    return (*ours[:-3:-1], *ours[:-2])


def as_array(arch: Architecture, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """A PyTorch tensor as the array of a parameter: its axes and, of flattened maps, its inputs in our order."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        channels_slowest = value.reshape(len(value), -1, parameter.neuron_axes[0].repeat)
        return channels_slowest.transpose(2, 1, 0).reshape(arch.shape(parameter))
    return value


def as_tensor(arch: Architecture, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """The array of a parameter as PyTorch's tensor: the inverse of `as_array`."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2:
        channels_fastest = value.reshape(parameter.neuron_axes[0].repeat, -1, value.shape[-1])
        return channels_fastest.transpose(2, 1, 0).reshape(shape(arch, parameter))
    return value


# --- private ------------------------------------------------------------------------------------------------------

_WITH_PARAMS = Dense | Conv | BatchNorm | LayerNorm | GroupNorm
_TORCH_KIND = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _layers(arch: Architecture) -> list[tuple[str, ...]]:
    """The paths of the layers that have parameters, in order."""
    return [(*at, layer.name) for at, layer in architecture.walk(arch.layers) if isinstance(layer, _WITH_PARAMS)]


def _kinds(arch: Architecture) -> dict[tuple[str, ...], str]:
    """What PyTorch calls each parameter within its module."""
    layers = _layers(arch)
    foreign = {parameter.path[-1] for parameter in arch.parameters} - _TORCH_KIND.keys()
    if not layers or foreign or set(layers) != {parameter.path[:-1] for parameter in arch.parameters}:
        raise ValueError(
            f"{arch.name!r} does not say which layer each parameter is of (its layers are {_listed(layers)}). Write "
            "the params yourself: kernels are transposed."
        )
    return {parameter.path: _TORCH_KIND[parameter.path[-1]] for parameter in arch.parameters}


def _keys(arch: Architecture, state_dict: StateDict) -> list[str]:
    """The name of every parameter's tensor, in the order of `arch.parameters`."""
    of_path = _kinds(arch)
    kinds = set(of_path.values())
    modules: dict[str, dict[str, str]] = {}
    for key in state_dict:
        module, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked" and "running_mean" in kinds:
            continue
        if kind not in kinds:
            raise ValueError(
                f"{_named(key)} is no {' or '.join(sorted(kinds, reverse=True))}, and {arch.name!r} expects no other. "
                "Remove it."
            )
        modules.setdefault(module, {})[kind] = key
    layers = _layers(arch)
    if len(modules) != len(layers):
        raise ValueError(
            f"The state_dict has {len(modules)} modules {list(modules)}; {arch.name!r} expects {len(layers)}, one for "
            f"each of {_listed(layers)}. Remove modules of other networks, or use another Architecture."
        )
    module_of = dict(zip(layers, modules.items(), strict=True))
    expected = {(path[:-1], kind) for path, kind in of_path.items()}
    surplus = [of[kind] for layer, (_, of) in module_of.items() for kind in of if (layer, kind) not in expected]
    if surplus:
        raise ValueError(
            f"The state_dict has {surplus}, of which {arch.name!r} has no parameters. The modules stand in another "
            "order, or the biases of convolutions must be folded into the means behind them."
        )
    keys = []
    for parameter in arch.parameters:
        module, found = module_of[parameter.path[:-1]]
        kind = of_path[parameter.path]
        if kind not in found:
            raise ValueError(
                f"{_named(f'{module}.{kind}'.lstrip('.'))} is missing; {arch.name!r} expects shape "
                f"{shape(arch, parameter)} for {architecture.describe(parameter.path)}. A module without bias needs "
                "one of zeros."
            )
        keys.append(found[kind])
    return keys


def _listed(layers: Sequence[tuple[str, ...]]) -> list[str]:
    return [".".join(path) for path in layers]


def _named(key: str) -> str:
    return f"state_dict[{key!r}]"
