"""Differentiable matching: group elements found by gradient steps, on the weights or on a loss between two networks.

Weight matching compares weights alone, and ends where no single layer's assignment improves. Here the objective is
free: `sinkhorn_matching` relaxes permutations and signs to matrices and differentiates through them (Peña et al. 2023,
arXiv 2212.12042); `straight_through_matching` keeps them hard and trains a free copy of the weights that decides which
element is taken (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 3). Both work on the whole group: positive scales
are settled by the norm-balanced gauge, in which permutations and signs are searched, as in `matching.weight_matching`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import _functions, _weights, relaxation
from jax_scalegmn.matching._functions import Distance, squared_error
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import BalancedPair, Element
from jax_scalegmn.types import Key, Params

# Points of the segment between two networks at which elements are judged when the points of training are drawn at
# random: a midpoint rule on [0, 1].
TIMES = (0.125, 0.375, 0.625, 0.875)


@stacks.any_container("params", "target", calls=("loss_fn",))
def sinkhorn_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    key: Key | None = None,
    *,
    loss_fn: Callable[[Any], Array] | None = None,
    x: ArrayLike | None = None,
    distance: Distance = squared_error,
    start: Element | None = None,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    epsilon: float = 1.0,
    confidence: float = 1e-3,
    num_iterations: int = 20,
    assign: Assign | None = None,
) -> Matching:
    """Finds an element by gradient descent on soft permutations and signs (Peña et al. 2023, arXiv 2212.12042).

    Adam moves the logits of all hidden layers at once, which Sinkhorn's iteration turns into doubly stochastic
    matrices. After every step they are hardened to an element, which is judged by the objective itself, and the best
    one is returned: never worse than `start`.

    With `loss_fn` None the objective is the squared distance in the balanced gauge, as
    |target|^2 + |params|^2 - 2 <target, act(Q, params)>. For a hard Q this is |target - act(Q, params)|^2; for a soft
    one it is linear in each layer's matrix and gains nothing by staying soft, while |target - act|^2 would, because
    soft matrices shrink a network. With `loss_fn` the objective is the loss on the segment between target and the moved
    network: at its midpoint, or, with a key, at one uniform point of it in every step, judged by the mean over four
    points (C_Mid and C_Rnd of the paper). With inputs x the loss needs no labels: the distance of what the network at t
    computes to (1 - t) f(target) + t f(params), as in `search_matching`, at random points.

    It needs ott-jax: `pip install "jax-scalegmn[sinkhorn]"`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> start = sg.matching.weight_matching(arch, params, target)
    >>> match = jax.jit(lambda: sg.matching.sinkhorn_matching(arch, params, target, num_steps=5, num_iterations=3))
    >>> bool(match().similarity >= start.similarity - 1e-6)
    True

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      key: Consumed by the random points of the segment; without it `loss_fn` is taken at the midpoint. x needs it.
      loss_fn: Maps params to a scalar; None, without x too, for the distance of the weights, without data.
      x: The inputs on which functions are compared, [examples, ...] as `network.apply` takes one.
      distance: (outputs, expected outputs) -> a scalar: `squared_error`, or `cross_entropy` for classifiers.
      start: An element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`. Layers that the objective does not depend on keep it.
      num_steps: The number of Adam's steps.
      learning_rate: Adam's learning rate, on the logits.
      epsilon: The entropy's weight: the matrices are those of logits / epsilon, harder for smaller ones.
      confidence: How large the logits of the start's places are at first, in units of epsilon; the others are 0. Near 0
        the search begins undecided, and `start` is only the result to beat; from 5 on it begins in its neighborhood.
      num_iterations: The number of Sinkhorn iterations in every step.
      assign: The assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them hardened to one element.

    Raises:
      ImportError: If ott-jax is not installed.
      ValueError: If a network, the start or x does not fit the architecture, on a key without a loss or x, on x with a
        loss or without a key, on a number of steps or iterations < 1, or on a learning rate, epsilon or confidence that
        is not a finite number > 0.
    """
    _check_counts(num_steps=num_steps, num_iterations=num_iterations)
    _check_positive(learning_rate=learning_rate, epsilon=epsilon, confidence=confidence)
    if key is not None and loss_fn is None and x is None:
        raise ValueError("key draws the points at which the loss is taken; expected loss_fn or x with it, or neither.")
    _check_inputs(arch, x, loss_fn, key)
    relaxation.sinkhorn_solver(num_iterations)  # says at once that ott-jax is missing
    _check_networks(arch, params, target, start)
    options = _Sinkhorn(distance, num_steps, learning_rate, epsilon, confidence, num_iterations, assign)
    given = (arch, params, target, key, None if x is None else jnp.asarray(x), start)
    if loss_fn is None:
        return _sinkhorn_compiled(*given, options=options)
    # Functions of the caller may close over data, which a program that is kept would keep in memory.
    return _sinkhorn(*given, options=options, loss_fn=loss_fn)


@stacks.any_container("params", "target", calls=("loss_fn",))
def straight_through_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    loss_fn: Callable[[Any, Any], Array] | None = None,
    batches: Any = None,
    *,
    x: ArrayLike | None = None,
    key: Key | None = None,
    distance: Distance = squared_error,
    num_steps: int | None = None,
    start: Element | None = None,
    tx: optax.GradientTransformation | None = None,
    max_sweeps: int = 1,
    assign: Assign | None = None,
) -> Matching:
    """Finds an element that lowers the loss at the midpoint of two networks, by straight-through gradient steps.

    Algorithm 3 of Ainsworth et al. (2023, arXiv 2209.04836): a free copy of the weights is projected onto the orbit of
    `params`, by weight matching of `params` to it; the loss is taken at the midpoint of target and the projection; its
    gradient passes through the projection unchanged to the free copy, which an optimizer moves. The copy begins at the
    matched params, where the projection is `start`, and every projection begins with the previous element.

    Losses of different batches cannot be compared. So a step's element replaces the best one where its loss is lower
    on that step's batch, on which both are evaluated; in the end `start`, the best and the last element are evaluated
    on all batches, and the one of the lowest mean is returned: never worse than `start` on them.

    With inputs x in place of a loss, labels are not needed: a step takes the distance of what the network at a random
    point t of the segment computes to (1 - t) f(target) + t f(params), as in `search_matching`, on all of x; in the end
    elements are compared by its mean over four points.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> def loss_fn(params, x):
    ...     return (sg.network.apply(arch, params, x) ** 2).mean()
    >>> batches = jax.numpy.ones((4, 2))  # four steps with one example each
    >>> match = jax.jit(lambda: sg.matching.straight_through_matching(arch, params, target, loss_fn, batches))
    >>> int(match().sweeps)
    4

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      loss_fn: Maps (params, batch) to a scalar; None with x.
      batches: A pytree whose arrays have a leading axis [steps]; one step for each. None with x.
      x: The inputs on which functions are compared, [examples, ...] as `network.apply` takes one.
      key: With x: consumed by the random points of the segment.
      distance: With x: (outputs, expected outputs) -> a scalar: `squared_error`, or `cross_entropy` for classifiers.
      num_steps: With x: the number of steps; None for 200.
      start: The element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`.
      tx: The optimizer of the free copy; None for Adam with a learning rate of 0.01.
      max_sweeps: The most sweeps of weight matching in every projection.
      assign: The assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them had one element.

    Raises:
      ValueError: If a network, the start or x does not fit the architecture, unless there are either a loss and batches
        or x and a key, on batches that disagree on the number of steps or are empty, or on a number of steps or sweeps
        < 1.
    """
    _check_counts(max_sweeps=max_sweeps, num_steps=200 if num_steps is None else num_steps)
    _check_inputs(arch, x, loss_fn, key)
    _check_either((loss_fn, batches), (x, key), num_steps)
    _check_networks(arch, params, target, start)
    options = _StraightThrough(distance, num_steps, max_sweeps, assign)
    if loss_fn is None and tx is None:
        return _straight_through_compiled(arch, params, target, None, jnp.asarray(x), key, start, options=options)
    # Functions of the caller may close over data, which a program that is kept would keep in memory.
    return _straight_through(arch, params, target, batches, x, key, start, options=options, loss_fn=loss_fn, tx=tx)


# --- private ------------------------------------------------------------------------------------------------------


class _Sinkhorn(NamedTuple):
    """What a compiled search depends on, apart from arrays; as in `sinkhorn_matching`."""

    distance: Distance = squared_error
    num_steps: int = 200
    learning_rate: float = 0.1
    epsilon: float = 1.0
    confidence: float = 1e-3
    num_iterations: int = 20
    assign: Assign | None = None


def _sinkhorn(
    arch: Architecture,
    params: Params,
    target: Params,
    key: Key | None,
    x: Array | None,
    start: Element | None,
    *,
    options: _Sinkhorn,
    loss_fn: Callable[[Any], Array] | None = None,
) -> Matching:
    pair, begin = _begin(arch, params, target, start)
    if x is not None:
        objective = _functions.segment_distance(pair, x, options.distance)
    else:
        objective = _distance(pair) if loss_fn is None else _functions.segment_loss(pair, loss_fn)
    times = jnp.full((1,), 0.5) if key is None else jnp.asarray(TIMES)

    def draw(index: Array) -> Array:
        return times[0] if key is None else jax.random.uniform(jax.random.fold_in(key, index))

    track = _descend(pair, begin, objective, times, draw, options)
    return _matching(arch, params, target, pair.between_given(track.best), track, options.num_steps)


_sinkhorn_compiled = jax.jit(_sinkhorn, static_argnames="options")


class _StraightThrough(NamedTuple):
    """What a compiled search depends on, apart from arrays; as in `straight_through_matching`."""

    distance: Distance
    num_steps: int | None
    max_sweeps: int
    assign: Assign | None


def _straight_through(
    arch: Architecture,
    params: Params,
    target: Params,
    batches: Any,
    x: ArrayLike | None,
    key: Key | None,
    start: Element | None,
    *,
    options: _StraightThrough,
    loss_fn: Callable[[Any, Any], Array] | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Matching:
    distance, num_steps, max_sweeps, assign = options
    pair, begin = _begin(arch, params, target, start)
    loss_at, batches, finals = _step_losses(pair, loss_fn, batches, x, key, distance, num_steps or 200)
    num_steps = _num_steps(batches)
    tx = optax.apply_if_finite(optax.adam(0.01) if tx is None else tx, num_steps)

    def loss_of(element: Element, batch: Any) -> Array:
        return _nan_to_infinity(loss_at(symmetry.act(pair.arch, element, pair.source), batch))

    def step(state: tuple[Any, Any, _Track], batch: Any) -> tuple[Any, None]:
        free, opt_state, track = state
        projection = _weights.weight_matching(
            pair.arch, pair.source, free, start=track.last, max_sweeps=max_sweeps, assign=assign
        ).element
        # The gradient at the projection is used as the free copy's: the projection itself has none.
        loss, grad = jax.value_and_grad(loss_at)(symmetry.act(pair.arch, projection, pair.source), batch)
        updates, opt_state = tx.update(grad, opt_state, free)
        track = _follow(track, projection, _nan_to_infinity(loss) < loss_of(track.best, batch))
        return (optax.apply_updates(free, updates), opt_state, track), None

    free = symmetry.act(pair.arch, begin, pair.source)
    (_, _, track), _ = jax.lax.scan(step, (free, tx.init(free), _track_from(begin)), batches)
    finalists = stacks.stack(begin, track.best, track.last)

    def mean_loss(index: Array) -> Array:
        element = stacks.member(finalists, index)
        return jax.lax.map(lambda batch: loss_of(element, batch), finals).mean()

    # One after the other: convolutions with a batch of kernels are slow.
    winner = jnp.argmin(jax.lax.map(mean_loss, jnp.arange(3)))
    best = pair.between_given(stacks.member(finalists, winner))
    return _matching(arch, params, target, best, track, num_steps)


_straight_through_compiled = jax.jit(_straight_through, static_argnames="options")


class _Track(NamedTuple):
    """What a search has seen: the best and the last element, and for how many steps the last has not changed."""

    best: Element
    last: Element
    unchanged: Int[Array, ""]


def _descend(
    pair: BalancedPair,
    begin: Element,
    objective: _functions.AtPoint,
    times: Float[Array, " points"],
    draw: Callable[[Array], Array],
    options: _Sinkhorn,
) -> _Track:
    """Gradient steps on soft elements at the points that are drawn; hardened ones are judged by the mean over times."""
    tx = optax.apply_if_finite(optax.adam(options.learning_rate), options.num_steps)

    def soft_objective(logits: dict[str, Array], t: Array) -> Array:
        sharp = {name: x / options.epsilon for name, x in logits.items()}
        soft = relaxation.soften(pair.arch, sharp, num_iterations=options.num_iterations)
        return objective(relaxation.soft_act(pair.arch, soft, pair.source), t)

    def judge(element: Element) -> Array:
        moved = symmetry.act(pair.arch, element, pair.source)
        return _nan_to_infinity(jax.lax.map(lambda t: objective(moved, t), times).mean())

    def step(state: tuple[Any, Any, _Track, Array], index: Array) -> tuple[Any, None]:
        logits, opt_state, track, lowest = state
        updates, opt_state = tx.update(jax.grad(soft_objective)(logits, draw(index)), opt_state)
        logits = optax.apply_updates(logits, updates)
        element = relaxation.harden(pair.arch, logits, assign=options.assign)
        value = judge(element)
        return (logits, opt_state, _follow(track, element, value < lowest), jnp.minimum(value, lowest)), None

    confidence = options.confidence * options.epsilon
    logits = jax.tree.map(lambda x: confidence * x, relaxation.logits_of(pair.arch, begin))
    state = (logits, tx.init(logits), _track_from(begin), judge(begin))
    return jax.lax.scan(step, state, jnp.arange(options.num_steps))[0][2]


def _check_networks(arch: Architecture, params: Params, target: Params, start: Element | None) -> None:
    architecture.check_params(arch, params)
    architecture.check_params(arch, target, name="target")
    if start is not None:
        symmetry.check(arch, start)


def _begin(arch: Architecture, params: Params, target: Params, start: Element | None) -> tuple[BalancedPair, Element]:
    """Both networks in their balanced gauges, and the permutations and signs to begin with there."""
    pair = symmetry.balanced_pair(arch, params, target)
    if start is None:
        start = _weights.weight_matching(pair.arch, pair.source, pair.goal).element
    signed = {neurons.name for neurons in pair.arch.hidden if neurons.scaling.has_signs}
    scale = {name: jnp.where((s < 0) & (name in signed), -1.0, 1.0) for name, s in start.scale.items()}
    permutation = jax.tree.map(lambda order: jnp.asarray(order, jnp.int32), start.permutation)
    return pair, Element(permutation, scale)


def _distance(pair: BalancedPair) -> Callable[[Params, Array], Array]:
    """(moved, t) -> |goal - moved|^2 / (|goal|^2 + |source|^2) for moved in the orbit; the same at all times t."""
    size = optax.tree.vdot(pair.goal, pair.goal) + optax.tree.vdot(pair.source, pair.source)
    return lambda moved, t: 1 - 2 * optax.tree.vdot(pair.goal, moved) / jnp.where(size > 0, size, 1)


def _step_losses(
    pair: BalancedPair,
    loss_fn: Callable[[Any, Any], Array] | None,
    batches: Any,
    x: ArrayLike | None,
    key: Key | None,
    distance: Distance,
    num_steps: int,
) -> tuple[Callable[[Params, Any], Array], Any, Any]:
    """(moved, batch) -> the loss, the batches of the steps, and those on which elements are compared in the end."""
    if key is not None:
        # A batch is a point of the segment.
        return _functions.segment_distance(pair, x, distance), jax.random.uniform(key, (num_steps,)), jnp.asarray(TIMES)
    assert loss_fn is not None  # checked

    def at_midpoint(moved: Params, batch: Any) -> Array:
        return _functions.segment_loss(pair, lambda point: loss_fn(point, batch))(moved, jnp.asarray(0.5))

    return at_midpoint, batches, batches


def _track_from(element: Element) -> _Track:
    return _Track(element, element, jnp.asarray(0))


def _follow(track: _Track, element: Element, better: Bool[Array, ""]) -> _Track:
    """The track after one more step."""
    element, unchanged = _weights.compared(track.last, element)
    best = jax.tree.map(lambda old, new: jnp.where(better, new, old), track.best, element)
    return _Track(best, element, jnp.where(unchanged, track.unchanged + 1, 0))


def _nan_to_infinity(loss: Array) -> Array:
    """Losses that compare: a network whose loss is not a number is the worst."""
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


def _matching(
    arch: Architecture, params: Params, target: Params, element: Element, track: _Track, num_steps: int
) -> Matching:
    similarity = _weights.similarity(arch, symmetry.act(arch, element, params), target)
    settled = track.unchanged >= max(1, num_steps // 10)
    return _weights.marked(Matching(element, similarity, jnp.asarray(num_steps), settled), params, target)


def _num_steps(batches: Any) -> int:
    """The number of steps that the batches are for, checked."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"The arrays of batches have leading axes {sorted(counts)}; expected one and the same number of steps >= 1 "
            "on all. Stack the batches: jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)."
        )
    return int(next(iter(counts))[0])


def _check_inputs(arch: Architecture, x: ArrayLike | None, loss_fn: Any, key: Key | None) -> None:
    """Checks the inputs of an objective without labels, if there are any."""
    if x is None:
        return
    if loss_fn is not None:
        raise ValueError("Got both loss_fn and x; expected one: x is for the objective without labels.")
    if key is None:
        raise ValueError("Got x without a key; expected one: it draws the points at which functions are compared.")
    _functions.check_data(arch, x, None)


def _check_either(with_loss: tuple[Any, Any], without: tuple[Any, Any], num_steps: int | None) -> None:
    """Checks that there is a loss with its batches, or x with its key, and nothing of the other."""
    missing = [[given is None for given in pair] for pair in (with_loss, without)]
    if missing not in ([[False, False], [True, True]], [[True, True], [False, False]]) or (
        num_steps is not None and not all(missing[0])
    ):
        raise ValueError(
            "Got a mixture of loss_fn and batches with x, key and num_steps; expected the first two, or x and key "
            "and, if you like, num_steps."
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected a number >= 1.")


def _check_positive(**knobs: float) -> None:
    for name, value in knobs.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; expected a finite number > 0.")
