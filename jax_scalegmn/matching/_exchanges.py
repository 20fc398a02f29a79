"""The objective of `search_matching`, of one element and of all elements that one exchange of two neurons makes."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Dense
from jax_scalegmn.matching import _functions, _thin
from jax_scalegmn.matching._functions import Distance
from jax_scalegmn.symmetry import BalancedPair, Element
from jax_scalegmn.types import Params

# (element, layer, neuron, partners [partners], signs [signs, 2]) -> the objectives [partners, signs].
Exchanged: TypeAlias = Callable[[Element, str, Array, Array, Any], Float[Array, "partners signs"]]


class Objective(NamedTuple):
    """What is searched, of elements between the balanced networks.

    Attributes:
      loss: The objective of an element.
      exchanged: The objectives of all elements that one exchange with a neuron makes of an element.
      ends: By the name of an end point a number that is finite if the network can be searched with.
    """

    loss: Callable[[Element], Float[Array, ""]]
    exchanged: Exchanged
    ends: dict[str, Float[Array, ""]]


def objective(
    pair: BalancedPair,
    x: Array | None,
    points: Float[Array, " points"],
    distance: Distance,
    loss_fn: Callable[[Any], Array] | None,
    apply_fn: Callable[[Any, Array], Array] | None,
) -> Objective:
    """The objective on the segment between the goal and the moved source, at the points of it."""
    ends = _functions.ends(pair, x, loss_fn, apply_fn)
    if loss_fn is not None:
        return Objective(*_one_by_one(pair, points, _functions.segment_loss(pair, loss_fn)), ends)
    first, last = _functions.end_outputs(pair, x, apply_fn)
    if apply_fn is None and (layers := _chain(pair.arch)):
        points = points.astype(first.dtype)
        expected = jax.vmap(lambda t: (1 - t) * first + t * last)(points)
        return Objective(*_in_a_chain(pair, layers, jnp.asarray(x), points, expected, distance), ends)
    loss, _ = _one_by_one(pair, points, _functions.segment_distance(pair, x, distance, apply_fn))
    between = (first, last)
    return Objective(loss, _by_changes(pair, x, points.astype(first.dtype), between, distance, apply_fn), ends)


def exchange(element: Element, name: str, i: Array, j: Array, signs: Float[Array, "2"]) -> Element:
    """The element with what is at the places i and j of a layer exchanged, times one sign each; i = j takes the first.

    Args:
      element: The element.
      name: The layer.
      i: A place.
      j: Another, or the same.
      signs: The factor of what comes to place i, and of what comes to place j.
    """
    order, scale = element.permutation[name], element.scale[name]
    signs = jnp.asarray(signs, scale.dtype)
    new_order = order.at[j].set(order[i]).at[i].set(order[j])
    new_scale = scale.at[j].set(signs[1] * scale[i]).at[i].set(signs[0] * scale[j])
    return Element(element.permutation | {name: new_order}, element.scale | {name: new_scale})


# --- private ------------------------------------------------------------------------------------------------------


def _one_by_one(
    pair: BalancedPair, points: Float[Array, " points"], at: Callable[[Params, Array], Array]
) -> tuple[Callable[[Element], Array], Exchanged]:
    """Each element by itself, by whole forward passes: the mean over the points of the segment."""

    mean = _functions.over(at, points)

    def loss(element: Element) -> Array:
        return _or_infinity(mean(symmetry.act(pair.arch, element, pair.source)))

    def exchanged(element: Element, name: str, i: Array, partners: Array, signs: Any) -> Array:
        def of(j: Array, both: Array) -> Array:
            return loss(exchange(element, name, i, j, both))

        return jax.vmap(lambda j: jax.vmap(lambda both: of(j, both))(jnp.asarray(signs)))(partners)

    return loss, exchanged


def _by_changes(
    pair: BalancedPair,
    x: Array | None,
    points: Float[Array, " points"],
    ends: tuple[Array, Array],
    distance: Distance,
    apply_fn: Callable[[Any, Array], Array] | None,
) -> Exchanged:
    """By the function's program, of which each exchange computes again what it changes."""
    program = jax.make_jaxpr(lambda params: _functions.outputs(pair, params, x, apply_fn))(pair.goal)

    def exchanged(element: Element, name: str, i: Array, partners: Array, signs: Any) -> Array:
        moved = symmetry.act(pair.arch, element, pair.source)

        def at(t: Array) -> Array:
            merged = stacks.lerp(pair.goal, moved, t)
            expected = (1 - t) * ends[0] + t * ends[1]

            def of(j: Array, both: Array) -> Array:
                places = _thin.Places(
                    pair.arch.neuron_layer(name).width, jnp.stack([i, j]), jnp.stack([jnp.asarray(True), i != j])
                )
                changed = _exchanged_leaves(pair, moved, exchange(element, name, i, j, both), name, places, both, t)
                inputs = [
                    _thin.Value(leaf, changed.get(path)) for path, leaf in architecture.flatten(_sorted(merged)).items()
                ]
                (result,) = _thin.evaluate(program.jaxpr, program.consts, inputs, places)
                return distance(places.whole(result), expected)

            return jax.vmap(lambda j: jax.vmap(lambda both: of(j, both))(jnp.asarray(signs)))(partners)

        return _or_infinity(jax.vmap(at)(points).mean(0))

    return exchanged


def _exchanged_leaves(
    pair: BalancedPair,
    moved: Params,
    element: Element,
    name: str,
    places: _thin.Places,
    signs: Float[Array, "2"],
    t: Array,
) -> dict[tuple[str, ...], _thin.Thin | Array]:
    """What of the merged params is other once two neurons of a layer are exchanged: `element` says by what."""
    arch, (i, j) = pair.arch, places.at
    # What comes to place i, and to place j; where they are one, the first counts.
    comes = places._replace(at=jnp.stack([j, i]))
    factors = jnp.stack([signs[0], jnp.where(i == j, signs[0], signs[1])])
    goal, before = architecture.flatten(pair.goal), architecture.flatten(moved)
    changed: dict[tuple[str, ...], _thin.Thin | Array] = {}
    for parameter in arch.parameters:
        position = next((k for k, a in enumerate(parameter.axes) if isinstance(a, Axis) and a.neurons == name), None)
        if position is None:
            continue
        path, axis = parameter.path, parameter.axes[position]
        assert isinstance(axis, Axis)
        if parameter.start:  # a block: the whole array counts as changed
            after = architecture.flatten(symmetry.act(arch, element, pair.source))[path]
            changed[path] = stacks.lerp(goal[path], after, t)
            continue
        following = itertools.takewhile(parameter.joined.__contains__, itertools.count(position + 1))
        inner = math.prod(arch.shape(parameter)[k] for k in following)
        layout = _thin.Layout(position - sum(k < position for k in parameter.joined), axis.repeat, inner)
        entries = comes.entries(before[path], layout)
        if axis.shows_sign:
            each = jnp.broadcast_to(factors[:, None], (axis.repeat, 2, inner)).astype(entries.dtype)
            entries = entries * each.reshape(-1, *(1,) * (entries.ndim - layout.axis - 1))
        changed[path] = _thin.Thin(stacks.lerp(places.entries(goal[path], layout), entries, t), layout)
    return changed


def _sorted(params: Params) -> Params:
    """Nested mappings in the order in which JAX flattens them."""
    if not isinstance(params, Mapping):
        return params
    return {key: _sorted(params[key]) for key in sorted(params)}


def _chain(arch: Architecture) -> list[Dense]:
    """The layers, if all are dense, each feeds the next, and nothing is added between them; else []."""
    layers = [layer for layer in arch.layers or () if isinstance(layer, Dense)]
    if len(layers) != len(arch.layers or ()):
        return []
    names = [neurons.name for neurons in arch.neuron_layers]
    axes = {parameter.path: parameter.axes for parameter in arch.parameters}
    kernels = [axes.get((layer.name, "kernel"), ()) for layer in layers]
    fed = [tuple(axis.neurons for axis in kernel if isinstance(axis, Axis)) for kernel in kernels]
    plain = all(layer.activation is not None and layer.offset == 0 for layer in layers[:-1])
    return layers if plain and fed == list(itertools.pairwise(names)) else []


class _Merged(NamedTuple):
    """One layer's share of both ends in the merged layer, at all points: the merged kernel is their sum."""

    goal: Float[Array, "points inputs outputs"]
    moved: Float[Array, "points inputs outputs"]
    goal_bias: Float[Array, "points one outputs"]
    moved_bias: Float[Array, "points one outputs"]

    def __call__(self, x: Float[Array, "any rows inputs"]) -> Float[Array, "points rows outputs"]:
        return x @ (self.goal + self.moved) + (self.goal_bias + self.moved_bias)


def _in_a_chain(
    pair: BalancedPair,
    layers: list[Dense],
    x: Array,
    points: Float[Array, " points"],
    expected: Array,
    distance: Distance,
) -> tuple[Callable[[Element], Array], Exchanged]:
    """All exchanges with a neuron at once: only what they change is computed."""
    place = {neurons.name: index for index, neurons in enumerate(pair.arch.hidden)}
    flipped = {
        parameter.path: axis.shows_sign for parameter in pair.arch.parameters for axis in parameter.neuron_axes[:1]
    }
    t = points[:, None, None]

    def merged(element: Element) -> list[_Merged]:
        moved = symmetry.act(pair.arch, element, pair.source)
        ends = [(pair.goal[layer.name], moved[layer.name]) for layer in layers]
        none = jnp.zeros(1, x.dtype)
        return [
            _Merged((1 - t) * a["kernel"], t * b["kernel"], (1 - t) * a.get("bias", none), t * b.get("bias", none))
            for a, b in ends
        ]

    def output(layer: Dense, z: Array) -> Array:
        return network.activate(layer.activation, z) + layer.offset

    def after(parts: list[_Merged], index: int, z: Array) -> Array:
        """The outputs, from the preactivations of a layer, [points, rows, outputs]."""
        for layer, part in zip(layers[index:], parts[index + 1 :], strict=False):
            z = part(output(layer, z))
        return output(layers[-1], z)

    def loss(element: Element) -> Array:
        parts = merged(element)
        return _or_infinity(jax.vmap(distance)(after(parts, 0, parts[0](x[None])), expected).mean())

    def exchanged(element: Element, name: str, i: Array, partners: Array, signs: Any) -> Array:
        index = place[name]
        parts = merged(element)
        inputs = x[None]
        for layer, part in zip(layers[:index], parts, strict=False):
            inputs = output(layer, part(inputs))
        flips = flipped[layers[index + 1].name, "kernel"]
        z = _next_inputs(parts, index, layers[index], inputs, i, partners, np.asarray(signs), flips=flips)
        rows = z.reshape(len(points), -1, z.shape[-1])
        outputs = after(parts, index + 1, rows).reshape(*z.shape[:4], -1)
        of_points = jax.vmap(jax.vmap(jax.vmap(distance, (0, None)), (0, None)))(outputs, expected)
        return _or_infinity(of_points.mean(0))

    return loss, exchanged


def _next_inputs(
    parts: list[_Merged],
    index: int,
    layer: Dense,
    inputs: Array,
    i: Array,
    partners: Array,
    signs: np.ndarray,
    *,
    flips: bool,
) -> Float[Array, "points partners signs rows out"]:
    """The next layer's preactivations for every exchange of neuron i: those now, and the change of two neurons.

    The next kernel `flips` with the neurons, except after an even activation.
    """
    own, following = parts[index], parts[index + 1]
    goal = inputs @ own.goal + own.goal_bias  # [points, rows, n]
    moved = inputs @ own.moved + own.moved_bias
    activations = network.activate(layer.activation, goal + moved)
    now = following(activations)

    def change(places: Array, others: Array) -> Float[Array, "points places factors rows out"]:
        """Of the neurons at `places` when what is at `others` comes there, with either sign."""
        factors = jnp.asarray(np.unique(signs)[::-1].copy(), goal.dtype)
        z = goal[..., places, None] + moved[..., others, None] * factors  # [points, rows, places, factors]
        outgoing = factors if flips else jnp.ones_like(factors)
        into = following.goal[:, places, None] + following.moved[:, others, None] * outgoing[:, None]
        # Without the barrier the compiler may compute an activation again for every one of its uses.
        values = jax.lax.optimization_barrier(network.activate(layer.activation, z))
        new = jnp.einsum("trpf,tpfo->tpfro", values, into)
        kernel = (following.goal + following.moved)[:, places]
        return new - jnp.einsum("trp,tpo->tpro", activations[..., places], kernel)[:, :, None]

    here = jnp.full_like(partners, i)
    first, second = change(here, partners), change(partners, here)
    second = jnp.where((partners == i)[:, None, None, None], 0, second)
    both = now[:, None, None, None] + first[:, :, :, None] + second[:, :, None]
    return jax.lax.optimization_barrier(both.reshape(*both.shape[:2], -1, *both.shape[4:]))


def _or_infinity(loss: Array) -> Array:
    """Losses that compare: a network whose loss is not a number is the worst."""
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)
