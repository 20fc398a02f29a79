"""What a model is, without running it: its JSON, the shapes of its variables, its size."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from jax_scalegmn import architecture
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import graph
from jax_scalegmn.models._alignment import Frame, Matcher
from jax_scalegmn.models._heads import Autoencoder, Decoder, Editor, Encoder, Readout
from jax_scalegmn.models._layers import IO, Canonical
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
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")}
    return {"type": type(model).__name__, **{name: _to_json(field) for name, field in fields.items()}}


def from_json(description: Mapping[str, Any]) -> nn.Module:
    """The model that `as_json` described.

    Args:
      description: The JSON values.

    Returns:
      A module that equals the described one.

    Raises:
      ValueError: If the description is not one of a model of this package.

    >>> import jax_scalegmn as sg
    >>> model = sg.autoencoder(sg.siren((2, 4, 1)), features=8)
    >>> sg.models.from_json(sg.models.as_json(model)) == model
    True
    """
    kinds = {kind.__name__: kind for kind in _KINDS}
    enums = {"canonical": Canonical, "io": IO, "readout": Readout}
    fields: dict[str, Any] = {}
    try:
        for name, given in description.items():
            if name == "arch" and "members" in given:
                members = tuple(architecture.from_json(member) for member in given["members"])
                fields[name] = Bucket(members, given["multiple"])
            elif name == "arch":
                fields[name] = architecture.from_json(given)
            elif isinstance(given, Mapping):
                fields[name] = from_json(given)
            elif name in enums:
                fields[name] = enums[name](given)
            else:
                fields[name] = tuple(given) if isinstance(given, list) else given
        return kinds[fields.pop("type")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is no description of a model ({error!r}): expected the JSON of models.as_json for one of "
            f"{sorted(kinds)}, got {str(description)[:200]!r}. The checkpoint is foreign or of another version."
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

_KINDS = (ScaleGMN, LeanGMN, Encoder, Editor, Decoder, Autoencoder, Matcher, Frame)


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
