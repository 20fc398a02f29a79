"""Evaluates the user's own function, with a look at the values inside of its program."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import architecture, stacks
from jax_scalegmn.architecture import Architecture, Place, TracedFunction
from jax_scalegmn.network import _patches
from jax_scalegmn.types import Params


def output(arch: Architecture, params: Params, x: Any, *, by_patches: bool = False) -> Any:
    """What the function returns for inputs as it was traced with, or for one example of them without the batch axis.

    With `by_patches` its convolutions are computed by products of matrices.
    """
    architecture.unpack(arch, params)
    function = _function(arch)
    call = _patches.by_patches(function.call) if by_patches else function.call
    if not _is_example(arch, function, x):
        return call(params, x)
    outputs = call(params, x[None])
    for leaf in jax.tree.leaves(outputs):
        if jnp.shape(leaf)[:1] != (1,):
            raise ValueError(
                f"{arch.name!r} returns an array of shape {jnp.shape(leaf)} for a batch of one example; expected a "
                "leading batch axis, as its inputs have. Let the function return one output per example."
            )
    return jax.tree.map(lambda leaf: leaf[0], outputs)


def values(arch: Architecture, params: Params, x: Float[Array, "..."], places: Sequence[Place]) -> list[Array]:
    """The pre-activations at these places on one example, each [*positions, neurons]."""
    widths = [arch.neuron_layer(place.neurons).width for place in places]
    alone, seen = _seen(arch, params, x, {place.at for place in places})
    return [_neurons(seen[place.at], place, width, alone) for place, width in zip(places, widths, strict=True)]


def activations(arch: Architecture, params: Params, x: Float[Array, "..."]) -> dict[str, tuple[Array, ...]]:
    """The pre-activations of every hidden neuron layer, those of a residual stream after its sums."""
    function = _function(arch)
    places = [place for place in function.places if place.at not in function.replaced]
    places = sorted((*places, *function.sums), key=lambda place: place.at)
    found: dict[str, tuple[Array, ...]] = {neurons.name: () for neurons in arch.hidden}
    for place, value in zip(places, values(arch, params, x, places), strict=True):
        if place.gains and place.neurons in found:
            found[place.neurons] = (*found[place.neurons], value)
    return found


def check_examples(arch: Architecture, x: Any, *, name: str) -> None:
    """Checks the shape of a batch of inputs."""
    function = _function(arch)
    shapes = [shape for shape, _ in function.inputs]
    one = len(shapes) == 1 and hasattr(x, "shape")
    if one and jnp.ndim(x) and len(x) and jnp.ndim(x) - 1 in (len(shapes[0]), len(shapes[0]) - 1):
        example = jnp.shape(x)[1:]
        kind = jnp.dtype(function.inputs[0][1])
        params = architecture.abstract_params(arch, kind if jnp.issubdtype(kind, jnp.floating) else jnp.dtype(float))
        try:
            jax.eval_shape(lambda p, x: output(arch, p, x), params, jax.ShapeDtypeStruct(example, jnp.result_type(x)))
        except Exception as error:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}; {arch.name!r}, traced with inputs {shapes[0]}, fails on one example "
                f"{example} with {error!r}. Pass [examples, ...]."
            ) from error
        return
    what = f"has shape {jnp.shape(x)}" if hasattr(x, "shape") else f"is a {type(x).__name__}"
    raise ValueError(
        f"{name} {what}; {arch.name!r} was traced with inputs {shapes}; expected one array of one "
        "example or more, [examples, ...]. Let the function take one array, and pass x[None] for one example."
    )


@stacks.any_container("params")
def at_places(arch: Architecture, params: Params, x: Float[Array, "..."]) -> Mapping[int, Array]:
    """The pre-activations of the user's own function that REPAIR corrects, on one example.

    Args:
      arch: An architecture of `infer`, which holds the function.
      params: The network.
      x: The example, without the batch axis of the inputs that the function was traced with.

    Returns:
      The values by the number of their place in `arch.function.places`, each [*positions, neurons].

    Raises:
      ValueError: If params or x do not fit, or if the function computes other operations on x than when it was traced.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> arch = sg.infer(lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"], params, jnp.ones((5, 3))).arch
    >>> {number: value.tolist() for number, value in sg.network.at_places(arch, params, jnp.ones(3)).items()}
    {0: [3.0, 3.0, 3.0, 3.0]}
    """
    function = _function(arch)
    numbers = [number for number, place in enumerate(function.places) if place.is_correctable]
    found = values(arch, params, x, [function.places[number] for number in numbers])
    return dict(zip(numbers, found, strict=True))


@stacks.any_container("params")
def at_means(arch: Architecture, params: Params, x: Float[Array, "..."]) -> Mapping[int, Array]:
    """What the user's own function has left of a value after it subtracted a vector of its params, on one example.

    So a batch normalization begins: the value is what it normalizes, less its stored mean.

    Args:
      arch: An architecture of `infer`, which holds the function.
      params: The network.
      x: The example, without the batch axis of the inputs that the function was traced with.

    Returns:
      The values by the number of their place in `arch.function.centered`, each [*positions, entries].

    Raises:
      ValueError: As `at_places`.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"mean": 2 * jnp.ones(3), "down": jnp.ones((3, 2))}
    >>> arch = sg.infer(lambda params, x: jnp.tanh(x - params["mean"]) @ params["down"], params, jnp.ones((5, 3))).arch
    >>> {number: value.tolist() for number, value in sg.network.at_means(arch, params, jnp.ones(3)).items()}
    {0: [-1.0, -1.0, -1.0]}
    """
    places = _function(arch).centered
    alone, seen = _seen(arch, params, x, {place.at for place in places})
    sizes = [math.prod(arch.shape(arch.parameters[place.shift])) for place in places if place.shift is not None]
    each = enumerate(zip(places, sizes, strict=True))
    return {number: _neurons(seen[place.at], place, size, alone) for number, (place, size) in each}


# --- private ------------------------------------------------------------------------------------------------------


def _seen(
    arch: Architecture, params: Params, x: Float[Array, "..."], wanted: set[tuple[int, ...]]
) -> tuple[bool, dict[tuple[int, ...], Array]]:
    """Whether x is one example without the batch axis, and the results of the wanted operations."""
    architecture.unpack(arch, params)
    function = _function(arch)
    shape = function.inputs[0][0] if len(function.inputs) == 1 else None
    alone = _is_example(arch, function, x)
    program = jax.make_jaxpr(function.call)(*stacks.abstract((params, x[None] if alone else x)))
    repeats = 1
    if tuple(architecture.operations(program)) != function.operations and alone and shape is not None:
        # A batch of one may be computed by other operations than the batch that was traced.
        repeats = shape[0]
        program = jax.make_jaxpr(function.call)(*stacks.abstract((params, jnp.broadcast_to(x, (repeats, *x.shape)))))
    if tuple(architecture.operations(program)) != function.operations:
        raise ValueError(
            f"{arch.name!r} computes other operations on x of shape {jnp.shape(x)} than on the inputs that it was "
            f"traced with, {shape}. Infer it again with an example of that shape."
        )
    inputs = jnp.broadcast_to(x, (repeats, *x.shape)) if alone else x
    seen: dict[tuple[int, ...], Array] = {}
    _evaluate(program.jaxpr, program.consts, jax.tree.leaves((params, inputs)), (), wanted, seen)
    return alone, seen


def _function(arch: Architecture) -> TracedFunction:
    assert arch.function is not None
    return arch.function


def _is_example(arch: Architecture, function: TracedFunction, x: Any) -> bool:
    """Whether x has one axis less than what the function was traced with: one example without the batch axis."""
    if len(function.inputs) != 1 or not hasattr(x, "ndim"):
        return False
    shape = function.inputs[0][0]
    if x.ndim not in (len(shape), len(shape) - 1):
        raise ValueError(
            f"x has shape {x.shape}; {arch.name!r} was traced with inputs of shape {shape}. Pass inputs as those, or "
            "one example without the leading batch axis."
        )
    return x.ndim == len(shape) - 1


def _neurons(value: Array, place: Place, width: int, alone: bool) -> Array:
    """The neurons of one place along the last axis; of the batch of one example that one."""
    value = jax.lax.slice_in_dim(value, place.start, place.start + width, axis=place.axis)
    value = jnp.moveaxis(value, place.axis, -1)
    return value[0] if alone else value


def _evaluate(
    program: Any,
    consts: Iterable[Any],
    inputs: Iterable[Any],
    at: tuple[int, ...],
    wanted: set[tuple[int, ...]],
    seen: dict[tuple[int, ...], Array],
) -> list[Any]:
    """Computes a program, and puts the results of the `wanted` operations into `seen`."""
    known: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    known |= dict(zip(program.invars, inputs, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for index, eqn in enumerate(program.eqns):
        operands, where = [value(atom) for atom in eqn.invars], (*at, index)
        called = architecture.called_program(eqn)
        if called is not None and any(place[: len(where)] == where for place in wanted):
            inner = getattr(called, "jaxpr", called)
            results = _evaluate(inner, getattr(called, "consts", ()), operands, where, wanted, seen)
        else:
            results = _patches.bind(eqn, operands)
        if where in wanted:
            seen[where] = results[0]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in program.outvars]
