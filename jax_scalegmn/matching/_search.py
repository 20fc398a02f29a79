"""Search matching: exchanges neurons two at a time while the function of the merged network improves.

Weight matching minimizes the distance of two networks' weights. That is not what a merge is for: many elements with a
larger distance merge much better. Here the objective is what the merged network computes, and the search is local, over
the whole group of permutations and signs, in the norm-balanced gauge, which settles positive scales.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jax_scalegmn import network, stacks, symmetry
from jax_scalegmn.architecture import Architecture, NeuronLayer
from jax_scalegmn.matching import (
    _activations,
    _differentiable,
    _exchanges,
    _functions,
    _scales,
    _weights,
    relaxation,
)
from jax_scalegmn.matching._exchanges import Objective
from jax_scalegmn.matching._functions import Distance, squared_error
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.symmetry import BalancedPair, Element
from jax_scalegmn.types import Key, Params

_T = TypeVar("_T")


@stacks.any_container("params", "target", calls=("loss_fn", "apply_fn"))
def search_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    x: ArrayLike | None,
    key: Key,
    *,
    distance: Distance = squared_error,
    loss_fn: Callable[[Any], Array] | None = None,
    apply_fn: Callable[[Any, Array], Array] | None = None,
    start: Element | Matching | None = None,
    times: Sequence[float] | Float[Array, " points"] = (0.25, 0.5, 0.75),
    candidates: int = 64,
    max_sweeps: int = 10,
    temperature: float = 0.0,
    kicks: int = 0,
    gradient_steps: int = 0,
    scale_steps: int = 0,
) -> Matching:
    """Finds an element by local search on what the merged network computes; labels are not needed.

    The objective is the mean over t in `times` of distance(f(lerp(target, moved, t)), (1 - t) f(target) + t f(params))
    on the inputs x: the merged network against the interpolated outputs of the two. With `loss_fn` it is the mean of
    loss_fn(lerp(target, moved, t)). One step takes one neuron and exchanges it with others of its layer, with every
    sign that they can have; the exchange that lowers the objective most is made (2-opt). A sweep takes every hidden
    neuron once, and in layers of up to `candidates` exchanges a step tries every pair once. In wider layers the
    partners of a neuron are those whose activations on x promise most, with noise so that they vary. The result is
    never worse than the start.

    The exchanges of a step differ in one layer. Everything before it is computed once, at the layer itself only the two
    neurons are, and their change is added to what the next layer reads: an exchange costs the layers after that. So it
    is in any function, `apply_fn` too, as far as its operations go neuron by neuron; a residual stream changes from its
    next block on. With `loss_fn` each exchange is a whole forward pass, apart from what is before the layer.

    With `gradient_steps` the search is preceded by as many steps of `sinkhorn_matching` on its own objective, at the
    points `times`, and begins at the best element that they saw, or at the start if none was better. Far from a good
    element, and in wide layers, where exchanges are many and each gains little, the two reach what neither does alone.

    With `kicks=n` the search goes on n times from the best element so far: three to six neurons of one layer change
    places at random, the search runs from there, and what it finds is kept if it is better (iterated local search,
    Lourenço et al. 2003). A kick costs about as much as a search, and most find nothing better.

    Positive scales are settled by the norm-balanced gauge, as in `matching.weight_matching`. With `scale_steps` the
    search ends with as many gradient steps on them, as `fit_scales` makes them, and begins in the start's own scales
    where those are better. Neurons that are silent on x cannot be told from each other.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((1, 3, 1), "tanh")
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> x, identity = jax.numpy.linspace(-1, 1, 8)[:, None], sg.symmetry.identity(arch)
    >>> found = sg.matching.search_matching(arch, params, target, x, jax.random.key(1), start=identity)
    >>> bool(found.loss <= found.start_loss)
    True

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      x: The inputs on which functions are compared, [examples, ...] as `network.apply` takes one; None with `loss_fn`.
      key: Draws the order of the neurons, and their partners in wide layers; it is consumed.
      distance: (outputs, expected outputs) -> a scalar: `squared_error`, or `cross_entropy` for classifiers.
      loss_fn: Maps params to a scalar, in place of `distance`: a loss with labels, say.
      apply_fn: (params, x) -> outputs of the whole batch; None for `network.apply`.
      start: The element to begin with, or the matching that holds it: `symmetry.identity`, or the result of another
        matcher. Without `scale_steps` its positive scales are replaced by the balanced gauge's. None:
        `matching.weight_matching`.
      times: The points of the segment between target (0) and the moved network (1). (0.5,) costs a third, but the path
        bulges next to its middle.
      candidates: The most exchanges that a step tries, and has in memory.
      max_sweeps: The most sweeps; the search ends when a sweep changes nothing.
      temperature: Simulated annealing: every step draws an exchange from the Boltzmann distribution of this
        temperature, in units of the start's objective, falling linearly to 0 in the last sweep. 0 takes the best.
      kicks: The number of times that the search goes on from its result with some neurons moved; 0 for none.
      gradient_steps: The number of steps on soft elements before the search; 0 for none. They need ott-jax:
        `pip install "jax-scalegmn[sinkhorn]"`.
      scale_steps: The number of gradient steps on positive scales after the search; 0 for none.

    Returns:
      The matching, with its `loss`, the start's `start_loss` and the number of `evaluations` of the objective, of which
      a gradient step makes two, one of a soft element and one of a hard one, and a step on scales one.

    Raises:
      ImportError: With gradient steps, if ott-jax is not installed.
      ValueError: If networks, start or inputs do not fit the architecture, on options out of their range, on
        `scale_steps` for an architecture without positive scales, without x and `loss_fn`, or (where values are known)
        if an end point or the start has no finite loss.
    """
    _check_options(
        times,
        candidates=candidates,
        max_sweeps=max_sweeps,
        temperature=temperature,
        kicks=kicks,
        gradient_steps=gradient_steps,
        scale_steps=scale_steps,
    )
    if scale_steps:
        _scales.check_sizes(arch, "scale_steps")
    _functions.check_data(arch, x, loss_fn, apply_fn)
    begin = start.element if isinstance(start, Matching) else start
    _differentiable._check_networks(arch, params, target, begin)
    options = _Options(distance, candidates, max_sweeps, temperature, kicks, gradient_steps, scale_steps)
    given = (arch, params, target, None if x is None else jnp.asarray(x), key, begin, jnp.asarray(times, float))
    return _functions.solved(_solve, _solved, *given, options=options, loss_fn=loss_fn, apply_fn=apply_fn)


# --- private ------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """What a compiled search depends on, apart from arrays; as in `search_matching`."""

    distance: Distance
    candidates: int
    max_sweeps: int
    temperature: float
    kicks: int
    gradient_steps: int
    scale_steps: int


def _solve(
    arch: Architecture,
    params: Params,
    target: Params,
    x: Array | None,
    key: Key,
    begin: Element | None,
    points: Array,
    options: _Options,
    loss_fn: Callable[[Params], Array] | None = None,
    apply_fn: Callable[[Params, Any], Any] | None = None,
) -> tuple[Matching, dict[str, Array]]:
    """The matching, and the losses at both ends."""
    pair, first = _differentiable._begin(arch, params, target, begin)
    make_at = functools.partial(_functions.at_point, x=x, distance=options.distance, loss_fn=loss_fn, apply_fn=apply_fn)
    if options.scale_steps and begin is not None:
        pair = _better_gauge(pair, _scales.with_scales_of(arch, pair, begin), first, points, make_at)
    objective = _exchanges.objective(pair, x, points, options.distance, loss_fn, apply_fn)
    start_loss = objective.loss(first)
    if options.gradient_steps:
        key, step_key = jax.random.split(key)
        first = _descended(pair, objective, make_at(pair), points, step_key, first, options.gradient_steps)
    best = _search(pair, objective, x, key, first, start_loss, options)
    element, loss = pair.between_given(best.best), best.best_loss
    if options.scale_steps:
        element, loss = _scaled(arch, pair, make_at(pair), points, best, options.scale_steps)
    similarity = _weights.similarity(arch, symmetry.act(arch, element, params), target)
    found = Matching(
        element,
        similarity,
        best.sweeps,
        ~best.changed,
        loss,
        start_loss,
        best.evaluations + 2 * options.gradient_steps + options.scale_steps,
    )
    return found, objective.ends


_solved = jax.jit(_solve, static_argnames="options")


def _scaled(
    arch: Architecture,
    pair: BalancedPair,
    at_point: _functions.AtPoint,
    points: Float[Array, " points"],
    best: "_State",
    num_steps: int,
) -> tuple[Element, Float[Array, ""]]:
    """What was found, between the networks as given, with positive scales fitted where they are better."""
    objective = _scales.Objective(_functions.over(at_point, points))
    fitted = _scales.fit(arch, pair, objective, best.best, num_steps=num_steps)
    better = fitted.loss < best.best_loss
    element = _chosen(better, fitted.element, pair.between_given(best.best))
    return element, jnp.minimum(fitted.loss, best.best_loss)


def _better_gauge(
    pair: BalancedPair,
    other: BalancedPair,
    element: Element,
    points: Float[Array, " points"],
    make_at: Callable[[BalancedPair], _functions.AtPoint],
) -> BalancedPair:
    """Of two pairs that differ in their goals' gauges the one in which an element has the lower objective."""

    def loss(pair: BalancedPair) -> Array:
        moved = symmetry.act(pair.arch, element, pair.source)
        return _functions.over(make_at(pair), points)(moved)

    better = loss(other) < loss(pair)
    goal, from_goal = _chosen(better, (other.goal, other.from_goal), (pair.goal, pair.from_goal))
    return pair._replace(goal=goal, from_goal=from_goal)


def _chosen(condition: Array, yes: _T, no: _T) -> _T:
    """One of two pytrees, when the program runs."""
    chosen: _T = jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
    return chosen


class _State(NamedTuple):
    """The current element and the best one, each with its objective."""

    element: Element
    loss: Float[Array, ""]
    best: Element
    best_loss: Float[Array, ""]
    evaluations: Int[Array, ""]
    sweeps: Int[Array, ""]
    changed: Bool[Array, ""]


def _descended(
    pair: BalancedPair,
    objective: Objective,
    at_point: _functions.AtPoint,
    points: Float[Array, " points"],
    key: Key,
    begin: Element,
    num_steps: int,
) -> Element:
    """The best element that gradient steps on soft ones saw, or the first where none was better."""

    def draw(index: Array) -> Array:
        return jax.random.choice(jax.random.fold_in(key, index), points)

    options = _differentiable._Sinkhorn(num_steps=num_steps)
    found = _differentiable._descend(pair, begin, at_point, points, draw, options).best
    # Compared by the objective of the search: another program of the same numbers rounds otherwise.
    return _chosen(objective.loss(found) < objective.loss(begin), found, begin)


def _search(
    pair: BalancedPair,
    objective: Objective,
    x: Array | None,
    key: Key,
    begin: Element,
    start_loss: Float[Array, ""],
    options: _Options,
) -> _State:
    """The search, and after it those that begin at kicks: the best state; the start's loss is the unit of heat."""
    layers = [_layer(neurons, options.candidates) for neurons in pair.arch.hidden]
    promise = _promise(pair, x) if any(layer.chosen for layer in layers) else {}
    settle = functools.partial(_settle, objective, layers, promise, options, start_loss)
    first_loss = objective.loss(begin) if options.gradient_steps else start_loss
    first = _begun(begin, first_loss, jnp.asarray(1))
    kicked = [layer for layer in layers if layer.width > 2]  # others have no neighbors but those that a search tries
    if not (options.kicks and kicked):
        return settle(first, key)

    def go_on(number: Array, kept: _State) -> _State:
        own, kick_key = jax.random.split(jax.random.fold_in(key, number))
        element = _chosen(number > 0, _kicked(kept.best, kicked, kick_key), kept.best)
        loss = jnp.where(number > 0, objective.loss(element), kept.best_loss)
        begun = _begun(element, loss, kept.evaluations + (number > 0))
        found = settle(begun, jnp.where(number > 0, own, key))  # the first search is the one without kicks
        state = _chosen((number == 0) | (found.best_loss < kept.best_loss), found, kept)
        return state._replace(evaluations=found.evaluations, sweeps=kept.sweeps + found.sweeps)

    return jax.lax.fori_loop(0, options.kicks + 1, go_on, first)


def _begun(element: Element, loss: Float[Array, ""], evaluations: Int[Array, ""]) -> _State:
    return _State(element, loss, element, loss, evaluations, jnp.asarray(0), jnp.asarray(True))


def _kicked(element: Element, layers: Sequence["_Layer"], key: Key) -> Element:
    """The element with some neurons of one of these layers moved, each to the place of the next."""
    layer_key, count_key, key = jax.random.split(key, 3)
    chosen = jax.random.randint(layer_key, (), 0, len(layers))
    count = jax.random.randint(count_key, (), _KICK[0], _KICK[1] + 1)
    permutation, scale = dict(element.permutation), dict(element.scale)
    for index, layer in enumerate(layers):
        order, rank = jax.random.permutation(jax.random.fold_in(key, index), layer.width), jnp.arange(layer.width)
        size = jnp.where(chosen == index, jnp.minimum(count, layer.width), 1)
        source = rank.at[order].set(jnp.where(rank < size, order[(rank + 1) % size], order))
        permutation[layer.name] = permutation[layer.name][source]
        scale[layer.name] = scale[layer.name][source]
    return Element(permutation, scale)


_KICK = (3, 6)  # the fewest and the most neurons that a kick moves; a search tries all exchanges of two


def _settle(
    objective: Objective,
    layers: Sequence["_Layer"],
    promise: dict[str, Float[Array, "n n"]],
    options: _Options,
    start_loss: Float[Array, ""],
    begun: _State,
    key: Key,
) -> _State:
    """Sweeps until one changes nothing: the last state."""
    max_sweeps, temperature = options.max_sweeps, options.temperature

    # In what order neurons are taken; drawn at once, since a random generator takes long to compile.
    draws = jax.random.uniform(key, (max_sweeps, sum(layer.width for layer in layers)))

    def sweep(state: _State) -> _State:
        cooling = 1 - (state.sweeps + 1) / max_sweeps
        heat = temperature * start_loss * cooling if temperature > 0 else None
        before, number, at = state.element, state.sweeps, 0
        for layer in layers:
            order = jnp.argsort(draws[number, at : at + layer.width])
            own = jax.random.fold_in(jax.random.fold_in(key, number), at) if layer.chosen or temperature > 0 else None
            state = _sweep_layer(objective, layer, state, order, own, heat, promise.get(layer.name))
            at += layer.width
        _, unchanged = _weights.compared(before, state.element)
        return state._replace(sweeps=number + 1, changed=~unchanged)

    def unfinished(state: _State) -> Array:
        return (state.sweeps < max_sweeps) & (state.changed | (temperature > 0))

    return jax.lax.while_loop(unfinished, sweep, begun)


class _Layer(NamedTuple):
    """How a layer is swept.

    Attributes:
      name: Its name.
      width: The number of its neurons.
      signs: The factors that the first and the second of two exchanged neurons get, one row for each exchange.
      offsets: The partners of neuron i are i + these, so that a sweep has every pair once.
      chosen: The number of partners that are chosen among all instead; 0 if none are.
    """

    name: str
    width: int
    signs: Float[np.ndarray, "signs 2"]
    offsets: Int[np.ndarray, " partners"]
    chosen: int


def _layer(neurons: NeuronLayer, candidates: int) -> _Layer:
    signed = neurons.scaling.has_signs
    signs = _SIGNS if signed else _SIGNS[:1]
    # With signs a neuron is its own partner too: its sign flips.
    offsets = np.arange(0 if signed else 1, neurons.width // 2 + 1)
    most = max(1, candidates // len(signs))
    return _Layer(neurons.name, neurons.width, signs, offsets, most if len(offsets) > most else 0)


_SIGNS = np.asarray([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)


def _sweep_layer(
    objective: Objective,
    layer: _Layer,
    state: _State,
    order: Int[Array, " n"],
    key: Key | None,
    heat: Array | None,
    promise: Float[Array, "n n"] | None,
) -> _State:
    """One step for every neuron of a layer, in this order. The key draws partners and, with a heat, steps."""
    if not len(layer.offsets):
        return state

    def step(state: _State, inputs: tuple[Array, Any]) -> tuple[_State, None]:
        i, key = inputs
        if layer.chosen:
            partners = _most_promising(promise, state.element.permutation[layer.name], i, layer.chosen, key)
        else:
            partners = (i + layer.offsets) % layer.width
        losses = objective.exchanged(state.element, layer.name, i, partners, layer.signs).reshape(-1)
        compared = jnp.concatenate([state.loss[None], losses])  # to stay, or one exchange
        if heat is not None:
            compared = compared - heat * jax.random.gumbel(jax.random.fold_in(key, 1), compared.shape)
        best = jnp.argmin(compared) - 1  # -1 to stay; of those that tie the first
        taken, best = best >= 0, jnp.maximum(best, 0)
        partner, signs = partners[best // len(layer.signs)], jnp.asarray(layer.signs)[best % len(layer.signs)]
        moved = _exchanges.exchange(state.element, layer.name, i, partner, signs)
        element = _chosen(taken, moved, state.element)
        state = state._replace(
            element=element,
            loss=jnp.where(taken, losses[best], state.loss),
            evaluations=state.evaluations + len(losses),
        )
        return _with_best(state, heat is not None), None

    keys = None if key is None else jax.random.split(key, layer.width)
    return jax.lax.scan(step, state, (order, keys))[0]


def _with_best(state: _State, heated: bool) -> _State:
    """The best element is the current one, except while a heat takes worse ones too."""
    if not heated:
        return state._replace(best=state.element, best_loss=state.loss)
    best = _chosen(state.loss < state.best_loss, state.element, state.best)
    return state._replace(best=best, best_loss=jnp.minimum(state.loss, state.best_loss))


def _promise(pair: BalancedPair, x: Array | None) -> dict[str, Float[Array, "n n"]]:
    """By layer the correlations of the target's neurons with params' neurons on x; {} where they are not known."""
    if x is None or not (pair.arch.layers or pair.arch.function):
        return {}
    values = jax.eval_shape(lambda one: network.activations(pair.arch, pair.source, one), x[0])
    if not all(values.values()):
        return {}
    return _activations.correlations(pair.arch, pair.source, pair.goal, x)


def _most_promising(
    promise: Float[Array, "n n"] | None, order: Int[Array, " n"], i: Array, count: int, key: Key
) -> Int[Array, " partners"]:
    """The partners of neuron i by the gain of correlation, with noise; without correlations they are drawn."""
    noise = jax.random.gumbel(key, order.shape)
    if promise is None:
        return jax.lax.top_k(noise, count)[1]
    matched = promise[:, order]  # [target's neuron, place]
    gain = matched[i] + matched[:, i] - matched[i, i] - jnp.diagonal(matched)
    return jax.lax.top_k(gain + _NOISE * noise, count)[1]


_NOISE = 0.1  # of the gain, in units of a correlation


def _check_options(
    times: Any,
    *,
    candidates: int,
    max_sweeps: int,
    temperature: float,
    kicks: int,
    gradient_steps: int,
    scale_steps: int,
) -> None:
    _functions.check_times(times)
    if candidates < 1 or max_sweeps < 1:
        raise ValueError(f"candidates is {candidates}, max_sweeps {max_sweeps}; expected numbers >= 1.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number >= 0; 0 for no annealing.")
    for name, number in (("kicks", kicks), ("gradient_steps", gradient_steps), ("scale_steps", scale_steps)):
        if number < 0:
            raise ValueError(f"{name} is {number}; expected a number >= 0; 0 for none.")
    if gradient_steps:
        relaxation.sinkhorn_solver(1)  # says at once that ott-jax is missing
