"""A network's params as PyTorch's tensors, and back. `tensors` reads and writes their files."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import (
    Architecture,
    BatchNorm,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    NeuronLayer,
    Parameter,
    Scaling,
)
from jax_scalegmn.io import _order, _torch_modules
from jax_scalegmn.types import Params

__all__ = ["StateDict", "array_of_tensor", "checked_tensor", "from_torch", "storable", "tensor_shape", "to_torch"]

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

    A bias that is not there is 0, and the scale of a BatchNorm with affine=False is 1. Weight normalization's weight
    is g v / |v|, and spectral normalization's W / (u^T W v) as in evaluation mode, in both spellings. The bias of a
    convolution before a BatchNorm, which it undoes, is subtracted from the mean if the architecture has none.

    Args:
      arch: The network's architecture, with layers.
      state_dict: The tensors of each linear, convolutional or normalizing module, and no others, except the counters
        num_batches_tracked and n_averaged, which are ignored.
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
    modules = _modules(arch, state_dict, order)
    folded = _folded(arch, modules)
    values = []
    for parameter in arch.parameters:
        value = _read(arch, state_dict, modules[parameter.path[:-1]], parameter)
        bias = folded.get(parameter.path[:-1]) if parameter.path[-1] == "mean" else None
        if bias is not None:
            value = value - checked_tensor(state_dict, bias, value.shape, arch.name)
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
        counters. Weight normalization gets v and g = |v|; spectral normalization vectors by which evaluation mode
        computes this weight, whatever its norm is, until a training begins; the bias of a convolution before a
        BatchNorm 0. Without a template the names are those of the layers, like "Dense_0.weight", and the dtypes those
        of `params`.
      order: The order of the template's modules, as in `from_torch`.

    Returns:
      The tensors by name, in PyTorch's layout.

    Raises:
      ValueError: If the params or the template do not fit the architecture, or a number is too large for its dtype; if
        the template has no tensor for numbers that are not 0, or a BatchNorm's scales that are not 1; or if its
        tensors that are one would differ.

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
    modules = _modules(arch, template, order)
    own: dict[str, np.ndarray] = {
        key: np.zeros_like(template[key]) for key in _folded(arch, modules).values() if key is not None
    }
    for parameter, tensor in zip(arch.parameters, tensors, strict=True):
        own |= _written(arch, template, modules[parameter.path[:-1]], parameter, tensor)
    own = {key: as_dtype(value, template[key].dtype, _named(key)) for key, value in own.items()}
    written = {key: own[key] if key in own else np.array(value) for key, value in template.items()}
    for first, second, transposed in _torch_modules.ties(template):
        if not np.array_equal(written[first].T if transposed else written[first], written[second]):
            raise ValueError(
                f"{_named(first)} and {_named(second)} are one tensor, and would be written as two that differ. Align "
                "with the arch that io.storable returns for the state_dict, which keeps them one."
            )
    return written


def storable(arch: Architecture, state_dict: StateDict, *, order: Sequence[str] | None = None) -> Architecture:
    """The architecture with the part of its group whose results fit into a state_dict.

    A BatchNorm with affine=False stores no scale, so its channels are permuted alone. Where two tensors are one in
    memory, W and its transpose in a tied autoencoder, (P W)^T stays W^T P^T under permutations and signs, not under
    positive scales. Neurons on both sides of a module that is used twice stay where they are.

    Args:
      arch: The network's architecture, with layers.
      state_dict: The tensors by name; those that are one share memory, as PyTorch's do after .numpy().
      order: The order of the modules, as in `from_torch`.

    Returns:
      The architecture; `arch` itself if everything fits.

    Raises:
      ValueError: As `from_torch`; if tensors overlap otherwise; or if tensors that are one leave no symmetry.

    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> w = np.ones((3, 2), "float32")
    >>> tensors = {"enc.weight": w, "enc.bias": np.zeros(3, "f"), "dec.weight": w.T, "dec.bias": np.zeros(2, "f")}
    >>> sg.io.storable(sg.mlp((2, 3, 2)), tensors).hidden[0].scaling.value
    'permutation'
    """
    modules = _modules(arch, state_dict, order)
    limits: dict[str, set[Scaling]] = {}
    parameter_of: dict[str, Parameter] = {}
    for parameter in arch.parameters:
        keys, kind = modules[parameter.path[:-1]][1], _TORCH_KIND[parameter.path[-1]]
        stored_as = _stored_as(kind, keys)
        parameter_of |= {keys[k]: parameter for k in stored_as if k in keys}
        if parameter.path[-1] == "scale" and kind not in keys:
            limits.setdefault(parameter.neuron_axes[0].neurons, set()).add(Scaling.PERMUTATION)
    tied = list(_torch_modules.ties(state_dict))
    for first, second, transposed in tied:
        if first in parameter_of and second in parameter_of:
            for neurons, scaling in _tie_limits(parameter_of[first], parameter_of[second], transposed):
                limits.setdefault(neurons, set()).add(scaling)
    neuron_layers = tuple(_limited(neurons, limits.get(neurons.name, set())) for neurons in arch.neuron_layers)
    if neuron_layers == arch.neuron_layers:
        return arch
    restricted = dataclasses.replace(arch, neuron_layers=neuron_layers)
    if not restricted.hidden:
        raise ValueError(
            f"{_named(tied[0][0])} and {_named(tied[0][1])} are one tensor, which leaves {arch.name!r} no symmetry: "
            "moving the neurons of one would change the other. Copy one (.clone()), and save the network again."
        )
    return restricted


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
    return [module for module, _ in _modules(arch, state_dict, order).values()]


def _stored_as(kind: str, keys: Mapping[str, str]) -> tuple[str, ...]:
    """The kinds of tensors in which a module stores what a plain one stores in one."""
    return _torch_modules.stored_in(keys) if kind == "weight" else (kind,)


_Module: TypeAlias = tuple[str, Mapping[str, str]]  # its name, and the names of its tensors by kind


def _read(arch: Architecture, state_dict: StateDict, module: _Module, parameter: Parameter) -> np.ndarray:
    """A parameter's tensor, computed or made up where the module has none."""
    (name, keys), kind, shape = module, _TORCH_KIND[parameter.path[-1]], tensor_shape(arch, parameter)
    if kind in keys:
        return checked_tensor(state_dict, keys[kind], shape, arch.name)
    stored_as = _stored_as(kind, keys)
    if stored_as == _torch_modules.PARTS:
        size = checked_tensor(state_dict, keys["weight_g"], np.shape(state_dict[keys["weight_g"]]), arch.name)
        direction = checked_tensor(state_dict, keys["weight_v"], shape, arch.name)
        try:
            return _torch_modules.weight_of(size, direction)
        except ValueError as error:
            raise ValueError(f"{_named(keys['weight_v'])}: {error}") from error
    if stored_as == _torch_modules.SPECTRAL:
        shapes = (shape, shape[:1], (math.prod(shape[1:]),))
        original, u, v = (
            checked_tensor(state_dict, keys[k], own, arch.name) for k, own in zip(stored_as, shapes, strict=True)
        )
        try:
            return _torch_modules.divided(original, u, v)
        except ValueError as error:
            raise ValueError(f"{_named(keys['weight_orig'])}: {error}") from error
    if kind == "bias" or parameter.path[-1] == "scale":
        dtype = np.asarray(state_dict[next(iter(keys.values()))]).dtype
        return np.full(shape, float(kind == "weight"), dtype)
    cure = (
        "A BatchNorm with track_running_stats=False has no function of one example."
        if kind.startswith("running")
        else "Export the network again."
    )
    raise ValueError(
        f"{_named(f'{name}.{kind}'.lstrip('.'))} is missing; {arch.name!r} expects shape {shape} for "
        f"{architecture.describe(parameter.path)}. {cure}"
    )


def _written(
    arch: Architecture, template: StateDict, module: _Module, parameter: Parameter, tensor: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors by name that store a parameter's tensor in a module."""
    (name, keys), kind = module, _TORCH_KIND[parameter.path[-1]]
    _read(arch, template, module, parameter)  # checks the template
    if kind in keys:
        return {keys[kind]: tensor}
    stored_as = _stored_as(kind, keys)
    if stored_as == _torch_modules.SPECTRAL:
        try:
            return {keys[k]: value for k, value in zip(stored_as, _torch_modules.spectral_of(tensor), strict=True)}
        except ValueError as error:
            raise ValueError(f"{_named(keys['weight_orig'])}: {error}") from error
    if stored_as == _torch_modules.PARTS:
        size, direction = _torch_modules.parts_of(tensor, np.asarray(template[keys["weight_g"]]))
        return {keys["weight_g"]: size, keys["weight_v"]: direction}
    constant = float(kind == "weight")
    if not (tensor == constant).all():
        raise ValueError(
            f"params{architecture.describe(parameter.path)} is not {constant:g} everywhere, and module {name!r} has no "
            f"{kind} to store it. Align with the arch that io.storable returns, without REPAIR, or give the module one."
        )
    return {}


def _folded(arch: Architecture, modules: Mapping[_Path, _Module]) -> dict[_Path, str | None]:
    """For each BatchNorm the name of the bias of the convolution before it that the architecture does not have."""
    own = {parameter.path for parameter in arch.parameters}
    return {
        norm: modules[conv][1].get("bias")
        for conv, norm in _normalized(arch).items()
        if (*conv, "bias") not in own and "bias" in modules[conv][1]
    }


def _normalized(arch: Architecture) -> dict[_Path, _Path]:
    """The BatchNorm right after each convolution or dense layer that has one."""
    layers = list(architecture.walk(arch.layers))
    return {
        (*at, layer.name): (*after, norm.name)
        for (at, layer), (after, norm) in itertools.pairwise(layers)
        if isinstance(layer, Conv | Dense) and layer.activation is None and isinstance(norm, BatchNorm) and at == after
    }


def _tie_limits(first: Parameter, second: Parameter, transposed: bool) -> list[tuple[str, Scaling]]:
    """The largest group on neuron layers under which two parameters that are one tensor stay one."""
    limits = []
    axes = second.neuron_axes[::-1] if transposed else second.neuron_axes
    if len(first.neuron_axes) != len(axes):
        return [(axis.neurons, Scaling.FIXED) for axis in (*first.neuron_axes, *axes)]
    for ours, theirs in zip(first.neuron_axes, axes, strict=True):
        if (ours.neurons, ours.repeat) != (theirs.neurons, theirs.repeat):
            limits += [(ours.neurons, Scaling.FIXED), (theirs.neurons, Scaling.FIXED)]
        else:  # q ** power is the same for both where q is a sign and the powers +1 and -1
            limits += [(ours.neurons, Scaling.SIGN)] if ours.power != theirs.power else []
            limits += [(ours.neurons, Scaling.POSITIVE)] if ours.shows_sign != theirs.shows_sign else []
    return limits


def _limited(neurons: NeuronLayer, limits: set[Scaling]) -> NeuronLayer:
    return dataclasses.replace(neurons, scaling=functools.reduce(Scaling.common, limits, neurons.scaling))


def _modules(arch: Architecture, state_dict: StateDict, order: Sequence[str] | None) -> dict[_Path, _Module]:
    """For each layer, its module's name and the names of that module's tensors by kind, like "weight"."""
    kind_of_path = _kinds(arch)
    modules = _torch_modules.grouped(state_dict)
    _check_kinds(arch, state_dict, modules, set(kind_of_path.values()))
    layers = _layers(arch)
    if len(modules) != len(layers):
        raise ValueError(
            f"The state_dict has {len(modules)} modules {list(modules)}; {arch.name!r} expects {len(layers)}, one for "
            f"each of {_listed(layers)}. Take out modules of other networks, or use another Architecture; a module "
            "without tensors, like a LayerNorm with elementwise_affine=False, is not in a state_dict."
        )
    fits, expected = _fits(arch, state_dict, modules, kind_of_path)
    norms = {
        name for name, keys in modules.items() if len(_torch_modules.shapes(state_dict, keys).get("weight", ())) < 2
    }
    told = _order.is_told(state_dict)
    names = _order.find(fits, list(modules), told=told, norms=norms, order=order)
    if names is not None:
        return {layer: (name, modules[name]) for layer, name in zip(layers, names, strict=True)}
    in_turn = dict(zip(layers, modules.items(), strict=True))
    _check_misfits(arch, in_turn, expected)
    return dict(in_turn)  # an error of the first tensor of another shape


def _fits(
    arch: Architecture,
    state_dict: StateDict,
    modules: Mapping[str, Mapping[str, str]],
    kind_of_path: Mapping[_Path, str],
) -> tuple[list[set[str]], dict[_Path, dict[str, tuple[int, ...]]]]:
    """For each layer the modules whose tensors fit it, and the shapes that it can have by kind."""
    layer_at = {
        (*at, layer.name): layer for at, layer in architecture.walk(arch.layers) if isinstance(layer, _WITH_PARAMS)
    }
    expected: dict[_Path, dict[str, tuple[int, ...]]] = {}
    for parameter in arch.parameters:
        shapes = expected.setdefault(parameter.path[:-1], {})
        shapes[kind_of_path[parameter.path]] = tensor_shape(arch, parameter)
    needed = {
        path: set(shapes) - ({"weight", "bias"} if isinstance(layer_at[path], BatchNorm) else {"bias"})
        for path, shapes in expected.items()
    }
    for layer in _normalized(arch):
        expected[layer].setdefault("bias", expected[layer]["weight"][:1])
    by_shapes: dict[frozenset[Any], set[str]] = collections.defaultdict(set)
    for name, keys in modules.items():
        by_shapes[frozenset(_torch_modules.shapes(state_dict, keys).items())].add(name)

    @functools.cache  # layers of equal shapes share the set
    def fitting(own: frozenset[Any], optional: frozenset[str]) -> set[str]:
        free = [item for item in own if item[0] in optional]
        left_out = (set(some) for count in range(len(free) + 1) for some in itertools.combinations(free, count))
        return set().union(*(by_shapes.get(own - some, ()) for some in left_out))

    fits = [
        fitting(frozenset(expected[layer].items()), frozenset(expected[layer].keys() - needed[layer]))
        for layer in layer_at
    ]
    return fits, expected


def _check_kinds(
    arch: Architecture, state_dict: StateDict, modules: Mapping[str, Mapping[str, str]], kinds: set[str]
) -> None:
    stored = {name: set(_torch_modules.stored_in(keys)) for name, keys in modules.items()}
    known = {name: kinds | (kinds_of if "weight" in kinds else set()) for name, kinds_of in stored.items()}
    incomplete = set(_torch_modules.PARTS)
    for key in (key for name, keys in modules.items() for kind, key in keys.items() if kind not in known[name]):
        kind = _torch_modules.split(key)[1]
        if kind in incomplete and "weight" in kinds:
            continue
        if (cause := _torch_modules.cause(state_dict)) is not None:
            raise ValueError(cause)
        raise ValueError(
            f"{_named(key)} is not a {' or '.join(sorted(kinds, reverse=True))}; {arch.name!r} expects no other. "
            "Take it out, or use an Architecture that has it."
        )
    for name, keys in modules.items():
        if len(parts := keys.keys() & incomplete - stored[name]) == 1:
            raise ValueError(
                f"{_named(keys[parts.pop()])} is one of the two tensors of weight normalization. Save both."
            )


def _check_misfits(arch: Architecture, modules: Mapping[_Path, _Module], expected: Mapping[_Path, Any]) -> None:
    """Raises an error of tensors that a layer does not have, in a state_dict that fits in no order."""
    surplus = [
        name
        for layer, (_, keys) in modules.items()
        for kind, name in keys.items()
        if kind not in (*expected[layer], *_torch_modules.stored_in(keys))
    ]
    if surplus:
        raise ValueError(
            f"The state_dict has {surplus}, for which {arch.name!r} has no parameters, in whatever order its modules "
            "are. The biases of layers that a LayerNorm or GroupNorm follows need an Architecture that has them."
        )


def _listed(layers: Sequence[_Path]) -> list[str]:
    return [".".join(path) for path in layers]


def _named(key: str) -> str:
    return f"state_dict[{key!r}]"
