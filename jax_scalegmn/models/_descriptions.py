"""What a model is, without running it: its JSON, the shapes of its variables, its size."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from jax_scalegmn import _bounded, architecture
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import graph
from jax_scalegmn.models._alignment import Frame, Matcher
from jax_scalegmn.models._heads import Autoencoder, Decoder, Editor, Encoder
from jax_scalegmn.models._lean import LeanGMN
from jax_scalegmn.models._scalegmn import ScaleGMN
from jax_scalegmn.models.graph import Bucket, Readable
from jax_scalegmn.types import Params


def as_json(model: nn.Module) -> dict[str, Any]:
    """A model's configuration as plain JSON values, for checkpoints; `from_json` reads it.

    Args:
      model: A `ScaleGMN`, `LeanGMN`, `Encoder`, `Editor`, `Decoder`, `Autoencoder`, `Matcher` or `Frame`.

    Returns:
      Nested dicts of strings, numbers, booleans and lists.

    >>> import jax_scalegmn as sg
    >>> sg.models.as_json(sg.Decoder(sg.siren((2, 4, 1)), hidden=(8,)))["hidden"]
    (8,)
    """
    fields = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(model)
        if f.name not in ("parent", "name") and not (f.name in _ADDED and getattr(model, f.name) == f.default)
    }
    return {"type": type(model).__name__, **{name: _to_json(field) for name, field in fields.items()}}


def from_json(description: Any) -> nn.Module:
    """The model that `as_json` described.

    Args:
      description: The JSON values.

    Returns:
      A module that equals the described one.

    Raises:
      ValueError: If the description is not one of a model of this package; the message names the field, like
        `gmn.num_layers`.

    >>> import jax_scalegmn as sg
    >>> model = sg.autoencoder(sg.siren((2, 4, 1)), features=8)
    >>> sg.models.from_json(sg.models.as_json(model)) == model
    True
    """
    try:
        _bounded.check_nesting(description, "the description")
        special = {Architecture: _architecture, Readable: _readable}
        model: nn.Module = _bounded.decode(_ANY, description, "", special=special, check=_check_sizes)
        return model
    except ValueError as error:
        raise ValueError(
            f"This is no description of a model ({_bounded.one_line(error)}): expected the JSON of models.as_json, got "
            f"{_bounded.short(description)}. The checkpoint is foreign or of another version."
        ) from error


def abstract_variables(model: nn.Module) -> Any:
    """The shapes of a model's variables, from its own description; nothing is computed.

    Args:
      model: A `ScaleGMN`, `LeanGMN`, `Encoder`, `Editor`, `Autoencoder`, `Matcher` or `Frame`.

    Returns:
      The variables with a `jax.ShapeDtypeStruct` in place of every array.

    Raises:
      ValueError: For a Decoder alone, whose input is not part of its description.

    >>> import jax_scalegmn as sg
    >>> model = sg.autoencoder(sg.siren((2, 4, 1)), features=8, num_layers=1)
    >>> sg.models.abstract_variables(model)["params"]["decoder"]["output"]["bias"].shape
    (17,)
    """
    arch: Readable = model.arch
    if isinstance(model, Decoder):
        raise ValueError("A Decoder alone does not know its input; describe the Autoencoder.")
    member = arch.members[0] if isinstance(arch, Bucket) else arch
    bucket = arch if isinstance(arch, Bucket) else None

    def init(params: Params) -> Any:
        reads_graphs = isinstance(model, (ScaleGMN, LeanGMN))
        if not (reads_graphs or bucket):
            return model.init(jax.random.key(0), params, method="embed" if isinstance(model, Matcher) else None)
        built = graph.from_params(member, params, bucket=bucket)
        return model.init(jax.random.key(0), built, method=None if reads_graphs else "read")

    return jax.eval_shape(init, architecture.abstract_params(member))


def num_parameters(model: nn.Module, example: Any) -> int:
    """How many numbers a model of networks like `example` learns; nothing is computed.

    Args:
      model: A linen module of params.
      example: One network, or its shapes, that the model can read.

    Returns:
      The number of entries of all its variables.

    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.baselines.StatisticsEncoder(arch, hidden=8, latent=3)
    >>> sg.models.num_parameters(model, sg.architecture.abstract_params(arch))
    275
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


def match_size(make: Callable[[int], nn.Module], example: Any, target: int) -> int:
    """The width at which a model's number of parameters is closest to the target; nothing is computed.

    Args:
      make: width -> model; a wider one has more parameters.
      example: One network, or its shapes, that the models can read.
      target: The number of parameters.

    Returns:
      The width, at least 1; the smaller of two that are equally close.

    Raises:
      ValueError: If the target is not positive, or is out of reach since a wider model has no more parameters.

    >>> import functools
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> make = lambda width: sg.models.baselines.StatisticsEncoder(arch, width, latent=3)
    >>> sg.models.match_size(make, sg.architecture.abstract_params(arch), target=1000)
    29
    """
    if target < 1:
        raise ValueError(f"target is {target}; expected a number of parameters >= 1.")
    count = functools.cache(lambda width: num_parameters(make(width), example))
    low, high = 1, 2
    guess = _root(count(1), count(2), count(3), target)
    if count(guess) < target <= count(guess + 1):
        low, high = guess, guess + 1
    while count(high) < target:
        if count(high) <= count(low):
            raise ValueError(
                f"The model has {count(low)} parameters at width {low} and {count(high)} at width {high}, so that no "
                f"width leads to {target}. Let make(width) use its width."
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return low if target - count(low) <= count(high) - target else high


# --- private ------------------------------------------------------------------------------------------------------

_ANY = ScaleGMN | LeanGMN | Encoder | Editor | Decoder | Autoencoder | Matcher | Frame
_ADDED = ("edges_at_once",)  # options left out at their defaults, so that checkpoints of before them still fit
_LARGEST = 2**16  # of a width
_BYTES_OF_AN_EDGE = 16  # of a network's graph, at least


def _architecture(value: Any, where: str) -> Architecture:
    try:
        arch = architecture.from_json(value)
    except ValueError as error:
        raise ValueError(f"{where}: {_bounded.one_line(error, 600)}") from error
    size = _BYTES_OF_AN_EDGE * arch.num_parameters
    _bounded.check("tensor_bytes", size, f"the size of the graph of {where}, in bytes,")
    return arch


def _readable(value: Any, where: str) -> Readable:
    if not (isinstance(value, Mapping) and "members" in value):
        return _architecture(value, where)
    bucket: Bucket = _bounded.decode(Bucket, value, where, special={Architecture: _architecture}, check=_check_sizes)
    return bucket


def _check_sizes(made: Any, where: str) -> None:
    """Checks the whole numbers of a model, and its dropout and dtype."""
    inside = f"{where}." if where else ""
    for field in (f.name for f in dataclasses.fields(made)):
        value = getattr(made, field) if field not in ("parent", "name") else None
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and not 1 <= number <= _LARGEST:
                expected = f"whole numbers from 1 to {_LARGEST}"
                raise ValueError(f"{inside}{field} is {_bounded.short(value)}; expected {expected}.")
    for field in ("num_layers", "message_layers", "update_layers", "num_iterations"):
        _bounded.check("layers", getattr(made, field, 1), f"{inside}{field}")
    if not 0 <= getattr(made, "dropout", 0) < 1:
        raise ValueError(f"{inside}dropout is {made.dropout}; expected a number from 0 to 1.")
    if getattr(made, "dtype", None) not in (None, "float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"{inside}dtype is {made.dtype!r}; expected a dtype of floating-point numbers.")


def _root(at_1: int, at_2: int, at_3: int, target: int) -> int:
    """The largest width >= 1 at which a polynomial of degree 2 stays below the target: what most models grow by."""
    curvature = at_1 - 2 * at_2 + at_3
    slope = at_2 - at_1 - 3 * curvature / 2
    rest = at_1 - curvature / 2 - slope - target
    discriminant = slope**2 - 2 * curvature * rest
    if curvature <= 0 or discriminant < 0:
        return max(1, math.ceil(-rest / slope) - 1) if slope > 0 else 1
    return max(1, math.ceil((math.sqrt(discriminant) - slope) / curvature) - 1)


def _to_json(field: Any) -> Any:
    if isinstance(field, nn.Module):
        return as_json(field)
    if isinstance(field, Bucket):
        return {"members": [member.as_json() for member in field.members], "multiple": field.multiple}
    if isinstance(field, Architecture):
        return field.as_json()
    return field.value if isinstance(field, enum.Enum) else field
