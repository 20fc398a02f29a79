"""Reads architectures from JSON, field by field."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_scalegmn import _bounded
from jax_scalegmn.architecture._description import Architecture, Axis, NeuronLayer, Parameter
from jax_scalegmn.architecture._layers import (
    LEAKY_SLOPE,
    SCALING_OF_ACTIVATION,
    Activation,
    AvgPool,
    Conv,
    Flatten,
    GlobalMeanPool,
    Layer,
    MaxPool,
    Residual,
    Scaling,
    walk,
)


def from_json(description: Any) -> Architecture:
    """Reads an architecture from the JSON values that `Architecture.as_json` returns.

    Args:
      description: The mapping of names, lists and numbers.

    Returns:
      The architecture.

    Raises:
      ValueError: If the mapping does not describe an architecture; the message names the field, like
        "layers[3].activation.name".

    >>> import json
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 16, 1))
    >>> sg.architecture.from_json(json.loads(json.dumps(arch.as_json()))) == arch
    True
    """
    try:
        _bounded.check_nesting(description, "the description")
        fields = [name for name in _FIELDS if not isinstance(description, Mapping) or name not in description]
        if fields:
            raise ValueError(f"it has no {', '.join(fields)}")
        name, neurons, parameters, layers = (description[name] for name in _FIELDS)
        for field, entries in (("neurons", neurons), ("layers", layers)):
            _bounded.check("layers", len(entries) if isinstance(entries, list | tuple) else 0, f"the number of {field}")
        arch = Architecture(
            name=_bounded.decode(str, name, "name"),
            neuron_layers=tuple(_neurons(row, at) for row, at in _entries(neurons, "neurons")),
            parameters=tuple(_parameter(row, at) for row, at in _entries(parameters, "parameters")),
            layers=_bounded.decode(tuple[Layer, ...], layers, "layers", check=_check_layer),
        )
        _check_modules(arch)
        _check_ranks(arch.layers, arch.input_rank if arch.layers else 1)
        return arch
    except ValueError as error:
        raise ValueError(
            f"This does not describe an architecture ({_bounded.one_line(error)}): expected the JSON of "
            f"Architecture.as_json, got {_bounded.short(description)}. The file is foreign or damaged."
        ) from error


# --- private ------------------------------------------------------------------------------------------------------

_FIELDS = ("name", "neurons", "parameters", "layers")
_LARGEST = 2**31 - 1  # of a width or size, as JAX has it
_MOST_AXES = 32


def _entries(value: Any, where: str) -> list[tuple[Any, str]]:
    entries = _bounded.decode(list[Any], value, where, special={Any: lambda entry, at: (entry, at)})
    return list(entries)


def _size(value: Any, where: str, *, least: int = 1) -> int:
    size: int = _bounded.decode(int, value, where)
    if not least <= size <= _LARGEST:
        raise ValueError(f"{where} is {_bounded.short(size)}; expected a whole number from {least} to {_LARGEST}.")
    return size


def _neurons(row: Any, where: str) -> NeuronLayer:
    name, width, scaling = _bounded.decode(tuple[str, int, Scaling], row, where)
    return NeuronLayer(name, _size(width, f"{where}[1]"), scaling)


def _parameter(row: Any, where: str) -> Parameter:
    parts = _entries(row, where)
    if not 2 <= len(parts) <= 4:
        raise ValueError(f"{where} has {len(parts)} entries; expected a path, axes, and for blocks where they start.")
    path = _bounded.decode(tuple[str, ...], *parts[0])
    axes = tuple(_axis(axis, at) for axis, at in _entries(*parts[1]))
    if not path or len(axes) > _MOST_AXES:
        raise ValueError(
            f"{where} has {len(path)} keys and {len(axes)} axes; expected keys, and up to {_MOST_AXES} axes."
        )
    start, joined = (
        tuple(_size(entry, at, least=0) for entry, at in _entries(*part))
        for part in (*parts[2:], ((), ""), ((), ""))[:2]
    )
    return Parameter(path, axes, start, joined)


def _axis(value: Any, where: str) -> Axis | int:
    if isinstance(value, int):
        return _size(value, where)
    kinds: dict[int, Any] = {2: tuple[str, int], 4: tuple[str, int, int, bool]}
    kind = kinds.get(len(value) if isinstance(value, list | tuple) else 0, tuple[str, int, int])
    name, power, *rest = _bounded.decode(kind, value, where)
    repeat = _size(rest[0], f"{where}[2]") if rest else 1
    return Axis(name, power, repeat, unsigned=len(rest) > 1 and rest[1])


def _check_layer(made: Any, where: str) -> None:
    """Checks the values of a layer or an activation."""
    if isinstance(made, Activation):
        if made.name not in SCALING_OF_ACTIVATION:
            known = ", ".join(sorted(SCALING_OF_ACTIVATION))
            raise ValueError(f"{where}.name is {_bounded.short(made.name)}; expected one of {known}.")
        if made.frequency == 0:
            raise ValueError(f"{where}.frequency is 0; expected another number.")
        if made.slope != LEAKY_SLOPE and made.name != "leaky_relu":
            raise ValueError(f"{where}.slope is {made.slope}, which {made.name} does not have. Leave it out.")
    for field in ("strides", "window", "groups"):
        sizes = getattr(made, field, ())
        for size in sizes if isinstance(sizes, tuple) else (sizes,):
            _size(size, f"{where}.{field}")
    if getattr(made, "epsilon", 1) <= 0:
        raise ValueError(f"{where}.epsilon is {made.epsilon}; expected a positive number.")
    padding = getattr(made, "padding", "SAME")
    if padding not in ("SAME", "VALID"):
        if isinstance(padding, str):
            raise ValueError(f"{where}.padding is {_bounded.short(padding)}; expected 'SAME', 'VALID' or a number.")
        _size(padding, f"{where}.padding", least=0)


def _check_modules(arch: Architecture) -> None:
    """Checks that every layer with params names some of the parameters."""
    modules = {parameter.path[:-1] for parameter in arch.parameters}
    for at, layer in walk(arch.layers):
        name = getattr(layer, "name", None)
        if name is not None and (*at, name) not in modules:
            raise ValueError(
                f"layers name the module {_bounded.short((*at, name))}, which no parameter is in; expected one of "
                f"{_bounded.short(list(modules))}"
            )


def _check_ranks(layers: Sequence[Layer], rank: int) -> int:
    """Checks that pooling and convolutions get maps; returns the rank of the output."""
    for layer in layers:
        if isinstance(layer, Residual):
            ranks = [_check_ranks(side, rank) for side in (layer.branch, layer.shortcut)]
            if ranks[0] != ranks[1]:
                raise ValueError(f"layers have a residual block of ranks {ranks}; expected one rank")
            rank = ranks[0]
        elif isinstance(layer, Conv | MaxPool | AvgPool | GlobalMeanPool | Flatten):
            if rank != 3:
                raise ValueError(
                    f"layers have a {type(layer).__name__} that gets vectors; expected maps [h, w, channels]"
                )
            rank = 1 if isinstance(layer, GlobalMeanPool | Flatten) else 3
    return rank
