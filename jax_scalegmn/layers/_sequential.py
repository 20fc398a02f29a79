"""From a list of layers, in Python, as text or as JSON, to an architecture with its function and PyTorch's names."""

import ast
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jax_scalegmn import _bounded, inference
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.layers import _blocks
from jax_scalegmn.layers._blocks import Layer
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
    every = _blocks.listed(layers)
    _bounded.check(
        "layers", sum(1 for _ in _blocks.walk(every)), "the number of layers, those inside of others included,"
    )
    shape = tuple(int(size) for size in input_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"input_shape is {_bounded.short(shape)}; expected sizes >= 1, those of one example.")
    for layer in _blocks.walk(every):
        _check_sizes(layer)
    return _sequential(every, shape)


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
    shown = _bounded.short(text)
    _bounded.check("metadata_bytes", _BYTES_OF_A_LETTER * len(text), "the memory that the expression takes, in bytes,")
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or _name(call) != "sequential":
            raise ValueError(f"{shown} is not a call of sequential; expected one like {_EXAMPLE!r}.")
        arguments = _arguments(call, ("layers", "input_shape"))
        return _read(arguments["layers"], arguments["input_shape"], list[Any], {Any: _entry})
    except (SyntaxError, MemoryError, RecursionError, OverflowError) as error:
        cause = _bounded.one_line(error, 300)
        raise ValueError(f"{shown} is no Python expression ({cause}); expected one like {_EXAMPLE!r}.") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{shown}: {_bounded.one_line(error, 300)}; expected a call like {_EXAMPLE!r}.") from error


def as_json(layers: Sequence[Layer | str], input_shape: Sequence[int]) -> dict[str, Any]:
    """The arguments of `sequential` as plain JSON values, for files; `from_json` reads them.

    Args:
      layers: The layers.
      input_shape: The shape of one example.

    >>> from jax_scalegmn import layers
    >>> layers.as_json([layers.Flatten()], (1, 2, 2))
    {'input_shape': [1, 2, 2], 'layers': [{'type': 'Flatten', 'order': 'channels_first'}]}
    """
    return {"input_shape": list(input_shape), "layers": [_as_json(layer) for layer in _blocks.listed(layers)]}


def from_json(description: Any) -> Architecture:
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
        _bounded.check_nesting(description, "the description")
        if not isinstance(description, Mapping) or not {"layers", "input_shape"} <= description.keys():
            raise ValueError("it has no layers or input_shape")
        return _read(description["layers"], description["input_shape"], tuple[Layer, ...], {})
    except ValueError as error:
        raise ValueError(
            f"This describes no list of layers ({_bounded.one_line(error)}): expected the JSON of layers.as_json, got "
            f"{_bounded.short(description)}."
        ) from error


# --- private ------------------------------------------------------------------------------------------------------


_BYTES_OF_A_LETTER = 64  # of a Python expression, once it is parsed
_LARGEST = 2**31 - 1  # of a size, as JAX has it
_LONGEST_NAME = 200


def _as_json(layer: Layer) -> dict[str, Any]:
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = [_as_json(item) if isinstance(item, get_args(Layer)) else item for item in value]
    return {"type": type(layer).__name__, **fields}


def _check_sizes(layer: Layer) -> None:
    """Checks the whole numbers of a layer, which may be from a file."""
    for field, least in (
        ("features", 1),
        ("kernel_size", 1),
        ("stride", 1),
        ("window", 1),
        ("groups", 1),
        ("padding", 0),
        ("width", 1),
        ("outputs", 1),
        ("expansion", 1),
    ):
        sizes = getattr(layer, field, None)
        for size in () if sizes is None else sizes if isinstance(sizes, tuple) else (sizes,):
            if not least <= size <= _LARGEST:
                raise ValueError(
                    f"{_bounded.short(layer)}: {field} is {_bounded.short(sizes)}; expected {least} to {_LARGEST}."
                )


@functools.lru_cache(maxsize=256)
def _sequential(layers: tuple[Layer, ...], input_shape: tuple[int, ...]) -> Architecture:
    shapes, _ = _blocks.arranged(layers, input_shape)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    if not params:
        raise ValueError("The layers hold no tensors; expected a Dense or a Conv at least.")

    def function(params: Params, x: Any) -> Any:
        return _blocks.compute(layers, {name: jnp.asarray(params[name]) for name in shapes}, jnp.asarray(x))

    function.__name__ = "sequential"
    arch = inference.infer(function, params, jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)).arch
    kinds = "-".join(f"{type(layer).__name__}{getattr(layer, 'features', '')}" for layer in layers)
    kinds = kinds if len(kinds) <= _LONGEST_NAME else f"{kinds[:_LONGEST_NAME]}..."
    return dataclasses.replace(arch, name=f"sequential {kinds}")


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
        kind = _KINDS.get(_name(node))
        if kind is None:
            raise ValueError(f"{_text(node)} is no layer; expected one of {', '.join(_KINDS)}.")
        try:
            fields = [field.name for field in dataclasses.fields(kind)]
            return _bounded.decode(kind, _arguments(node, fields), _text(node), special={Layer | str: _entry})
        except TypeError as error:
            raise ValueError(f"{_text(node)} does not fit: {_bounded.one_line(error, 300)}.") from error
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{_text(node)} is no literal; expected numbers, words and layers.") from error


def _read(layers: Any, input_shape: Any, kind: Any, special: Mapping[Any, Any]) -> Architecture:
    """The architecture of arguments that were read, checked field by field."""
    every = _bounded.decode(kind, layers, "layers", special=special)
    return sequential(every, _bounded.decode(tuple[int, ...], input_shape, "input_shape"))


def _entry(value: Any, where: str) -> Any:
    if not isinstance(value, (str, *get_args(Layer))):
        raise ValueError(f"{where} is {_bounded.short(value)}; expected one of {', '.join(_KINDS)}.")
    return value


def _arguments(call: ast.Call, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
      TypeError: As a call does.
    """
    if any(option.arg is None for option in call.keywords):
        raise ValueError(f"{_text(call)} unpacks a mapping; expected options by name.")
    if len(call.args) > len(names):
        raise TypeError(f"{_name(call)} takes {len(names)} arguments, got {len(call.args)}")
    given = dict(zip(names, call.args, strict=False))
    for option in call.keywords:
        if option.arg in given or option.arg not in names:
            raise TypeError(
                f"{_name(call)} got {_bounded.short(option.arg)}, unknown or twice; it has {', '.join(names)}"
            )
        given[str(option.arg)] = option.value
    return {name: _value(node) for name, node in given.items()}


def _text(node: ast.expr) -> str:
    return _bounded.short(ast.unparse(node))
