"""From a list of layers, in Python, as text or as JSON, to an architecture with its function and PyTorch's names."""

import ast
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jax_scalegmn import inference
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.layers._kinds import Activation, Layer
from jax_scalegmn.types import Params

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Layer)}
_EXAMPLE = "sequential([Conv(16, 3), 'relu', MaxPool(2), Flatten(), Dense(10)], (1, 28, 28))"


def sequential(layers: Sequence[Layer | str], input_shape: Sequence[int]) -> Architecture:
    """Describes a network by the list of its layers, as torch.nn.Sequential does; names and layout are PyTorch's.

    Its params are the flat dict of a state_dict, {"0.weight": [out, in, h, w], "0.bias": [out], ...}, where a module is
    named by its place in the list, or by its `name`. `io.read_network` reads a file of these names. The function takes
    batches [N, *input_shape]. The group is what `infer` finds in it.

    Args:
      layers: The layers; an activation without options may be its name alone.
      input_shape: The shape of one example: (features,) or (channels, height, width).

    Returns:
      The architecture, with the function. The same list always gives an equal one.

    Raises:
      ValueError: If a layer does not fit what comes before it, or two modules have one name.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.layers import Conv, Dense, Flatten, MaxPool
    >>> arch = sg.sequential([Conv(4, 3, padding=1), "relu", MaxPool(2), Flatten(), Dense(2, name="fc")], (1, 6, 6))
    >>> arch.array_shapes["fc.weight",], arch.hidden
    ((2, 36), (NeuronLayer(name='0.weight', width=4, scaling=<Scaling.POSITIVE: 'positive'>),))
    """
    if isinstance(layers, str) or isinstance(input_shape, int | str):
        raise ValueError(f"Expected a list of layers and the shape of one example, like {_EXAMPLE}.")
    every = tuple(Activation(layer) if isinstance(layer, str) else layer for layer in layers)
    foreign = [layer for layer in every if not isinstance(layer, get_args(Layer))]
    if foreign or not every:
        raise ValueError(f"layers holds {foreign[:3]}; expected one or more of {', '.join(_KINDS)}.")
    return _sequential(every, tuple(int(size) for size in input_shape))


def parse(text: str) -> Architecture:
    """Reads the Python expression of a `sequential` call; nothing in it is run.

    Args:
      text: A call of `sequential` with calls of layers and literals alone, like
        "sequential([Dense(8), 'relu', Dense(1)], (2,))".

    Returns:
      The architecture.

    Raises:
      ValueError: On anything else.

    >>> import jax_scalegmn as sg
    >>> sg.layers.parse("sequential([Dense(8), 'relu', Dense(1)], (2,))").hidden[0].width
    8
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no Python expression ({error.msg}); expected one like {_EXAMPLE!r}.") from error
    if not isinstance(call, ast.Call) or _name(call) != "sequential":
        raise ValueError(f"{text!r} is not a call of sequential; expected one like {_EXAMPLE!r}.")
    try:
        return sequential(*(_value(node) for node in call.args), **_options(call))
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}; expected a call like {_EXAMPLE!r}.") from error


def as_json(layers: Sequence[Layer | str], input_shape: Sequence[int]) -> dict[str, Any]:
    """The arguments of `sequential` as plain JSON values, for files; `from_json` reads them.

    Args:
      layers: The layers.
      input_shape: The shape of one example.

    >>> from jax_scalegmn import layers
    >>> layers.as_json([layers.Flatten()], (1, 2, 2))
    {'input_shape': [1, 2, 2], 'layers': [{'type': 'Flatten', 'order': 'channels_first'}]}
    """
    every = [Activation(layer) if isinstance(layer, str) else layer for layer in layers]
    described = [{"type": type(layer).__name__, **dataclasses.asdict(layer)} for layer in every]
    return {"input_shape": list(input_shape), "layers": described}


def from_json(description: Mapping[str, Any]) -> Architecture:
    """Reads the architecture that `as_json` describes.

    Args:
      description: The mapping.

    Raises:
      ValueError: If it describes no list of layers.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn import layers
    >>> some = [layers.Dense(8), "relu", layers.Dense(1)]
    >>> layers.from_json(layers.as_json(some, (2,))) == sg.sequential(some, (2,))
    True
    """
    try:
        layers = []
        for fields in description["layers"]:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "type"}
            layers.append(_KINDS[fields["type"]](**values))
        return sequential(layers, description["input_shape"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"This describes no list of layers ({error!r}): expected the JSON of layers.as_json, got "
            f"{str(description)[:200]!r}."
        ) from error


# --- private ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _sequential(layers: tuple[Layer, ...], input_shape: tuple[int, ...]) -> Architecture:
    names = [getattr(layer, "name", None) or str(place) for place, layer in enumerate(layers)]
    params: dict[str, Any] = {}
    shape = input_shape
    for name, layer in zip(names, layers, strict=True):
        own = {kind: jax.ShapeDtypeStruct(size, jnp.float32) for kind, size in layer.shapes(shape).items()}
        if own and any(key.rpartition(".")[0] == name for key in params):
            raise ValueError(f"Two modules are named {name!r}; expected one name each. Pass name=.")
        shape = _output_shape(layer, own, shape)
        params |= {f"{name}.{kind}": value for kind, value in own.items()}
    if not params:
        raise ValueError("The layers hold no tensors; expected a Dense or a Conv at least.")

    def function(params: Params, x: Any) -> Any:
        x = jnp.asarray(x)
        for name, layer in zip(names, layers, strict=True):
            parts = {key: key.rpartition(".") for key in params}
            x = layer({part[2]: jnp.asarray(params[key]) for key, part in parts.items() if part[0] == name}, x)
        return x

    function.__name__ = "sequential"
    arch = inference.infer(function, params, jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)).arch
    kinds = "-".join(f"{type(layer).__name__}{getattr(layer, 'features', '')}" for layer in layers)
    return dataclasses.replace(arch, name=f"sequential {kinds}")


def _output_shape(layer: Layer, tensors: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        out = jax.eval_shape(layer, tensors, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).shape[1:]
    except Exception as error:
        raise ValueError(f"{layer} fails on values of shape {shape}: {error}") from error
    if 0 in out:
        raise ValueError(f"{layer} gets a map of shape {shape}, too small for it. Take larger images.")
    return tuple(out)


def _name(call: ast.Call) -> str:
    """The name of what is called, without the modules before it."""
    node = call.func
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Call):
        if _name(node) not in _KINDS:
            raise ValueError(f"{ast.unparse(node)!r} is no layer; expected one of {', '.join(_KINDS)}.")
        try:
            return _KINDS[_name(node)](*(_value(item) for item in node.args), **_options(node))
        except TypeError as error:
            raise ValueError(f"{ast.unparse(node)!r} does not fit: {error}.") from error
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{ast.unparse(node)!r} is no literal; expected numbers, words and layers.") from error


def _options(call: ast.Call) -> dict[str, Any]:
    if any(option.arg is None for option in call.keywords):
        raise ValueError(f"{ast.unparse(call)!r} unpacks a mapping; expected options by name.")
    return {str(option.arg): _value(option.value) for option in call.keywords}
