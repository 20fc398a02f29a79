"""Differentiable matching: group elements found by gradient steps, on the weights or on a loss between two networks.

Weight matching asks the weights alone, and ends where no single layer's assignment improves. Here the objective is
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
from jaxtyping import Array, Bool, Int

from jax_scalegmn import architecture, merge, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import _relaxation, _weights
from jax_scalegmn.matching._weights import Matching
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Key, Params

# Where the segment between two networks is judged when its points are drawn at random: a midpoint rule on [0, 1].
TIMES = (0.125, 0.375, 0.625, 0.875)


def sinkhorn_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    key: Key | None = None,
    *,
    loss_fn: Callable[[Any], Array] | None = None,
    start: Element | None = None,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    epsilon: float = 1.0,
    confidence: float = 1e-3,
    num_iterations: int = 20,
    assign: Assign | None = None,
) -> Matching:
    """The best of the elements along a gradient descent on soft permutations and signs (arXiv 2212.12042).

    Adam moves the logits of all hidden layers at once (`relaxation.soften`); after every step they are hardened, the
    element is judged by the objective itself, and the best one is returned: never worse than `start`.

    With `loss_fn` None the objective is the squared distance in the balanced gauge, as
    |target|^2 + |params|^2 - 2 <target, act(Q, params)>. For a hard Q this is |target - act(Q, params)|^2; for a soft
    one it is linear in each layer's matrix and gains nothing by staying soft, while |target - act|^2 would, because
    soft matrices shrink a network. With `loss_fn` the objective is the loss on the segment between target and the moved
    network: at its midpoint, or, with a key, at one uniform point of it in every step, judged by the mean over `TIMES`
    (C_Mid and C_Rnd of the paper).

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      key: consumed by the random points of the segment; without it the loss is taken at the midpoint.
      loss_fn: of params, a scalar; None for the distance of the weights, without data.
      start: an element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`. Layers that the objective does not touch keep it.
      num_steps: of Adam.
      learning_rate: of Adam, on the logits.
      epsilon: the entropy's weight: the matrices are those of logits / epsilon, harder for smaller ones.
      confidence: how large the logits of the start's places are at first, in units of epsilon; the others are 0. Near 0
        the search begins undecided, and `start` is but the result to beat; from 5 on it begins in its neighborhood.
      num_iterations: of Sinkhorn, in every step.
      assign: the assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them hardened to one element.

    Raises:
      ValueError: if a network or the start does not fit the architecture, on a key without a loss, on a number of steps
        or iterations < 1, or on a learning rate, epsilon or confidence that is no finite number > 0.
    """
    _check_counts(num_steps=num_steps, num_iterations=num_iterations)
    _check_positive(learning_rate=learning_rate, epsilon=epsilon, confidence=confidence)
    if key is not None and loss_fn is None:
        raise ValueError("key draws the points at which the loss is taken; expected a loss_fn with it, or neither.")
    pair = _pair(arch, params, target, start)
    objective = _distance(pair) if loss_fn is None else _segment_loss(pair, loss_fn)
    times = jnp.full((1,), 0.5) if key is None else jnp.asarray(TIMES)
    tx = optax.apply_if_finite(optax.adam(learning_rate), num_steps)

    def soft_objective(logits: dict[str, Array], t: Array) -> Array:
        sharp = {name: x / epsilon for name, x in logits.items()}
        soft = _relaxation.soften(pair.arch, sharp, num_iterations=num_iterations)
        return objective(_relaxation.act(pair.arch, soft, pair.source), t)

    def judge(element: Element) -> Array:
        moved = symmetry.act(pair.arch, element, pair.source)
        return _or_infinity(jax.lax.map(lambda t: objective(moved, t), times).mean())

    def step(state: tuple[Any, Any, _Track, Array], index: Array) -> tuple[Any, None]:
        logits, opt_state, track, lowest = state
        t = times[0] if key is None else jax.random.uniform(jax.random.fold_in(key, index))
        updates, opt_state = tx.update(jax.grad(soft_objective)(logits, t), opt_state)
        logits = optax.apply_updates(logits, updates)
        element = _relaxation.harden(pair.arch, logits, assign=assign)
        value = judge(element)
        return (logits, opt_state, _follow(track, element, value < lowest), jnp.minimum(value, lowest)), None

    logits = jax.tree.map(lambda x: confidence * epsilon * x, _relaxation.logits_of(pair.arch, pair.start))
    begin = (logits, tx.init(logits), _Track(pair.start, pair.start, jnp.asarray(0)), judge(pair.start))
    (_, _, track, _), _ = jax.lax.scan(step, begin, jnp.arange(num_steps))
    return _matching(arch, pair, track.best, track, num_steps, params, target)


def straight_through_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    loss_fn: Callable[[Any, Any], Array],
    batches: Any,
    *,
    start: Element | None = None,
    tx: optax.GradientTransformation | None = None,
    max_sweeps: int = 1,
    assign: Assign | None = None,
) -> Matching:
    """The element that lowers the loss at the midpoint of two networks, by straight-through steps (arXiv 2209.04836).

    Algorithm 3: a free copy of the weights is projected onto the orbit of `params`, by weight matching of `params` to
    it; the loss is taken at the midpoint of target and the projection; its gradient passes through the projection
    unchanged to the free copy, which an optimizer moves. The copy begins at the matched params, where the projection is
    `start`, and every projection begins with the element before.

    Losses of different batches do not compare. So a step's element takes the best one's place where its loss is lower
    on that step's batch, on which both are evaluated; in the end `start`, the best and the last element are evaluated
    on all batches, and the one of the lowest mean is returned: never worse than `start` on them.

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      loss_fn: (params, batch) -> a scalar.
      batches: a pytree whose arrays have a leading axis [steps]; one step for each.
      start: the element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`.
      tx: the optimizer of the free copy; None for Adam with a rate of 0.01.
      max_sweeps: of weight matching in every projection.
      assign: the assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them had one element.

    Raises:
      ValueError: if a network or the start does not fit the architecture, on batches that disagree on the number of
        steps or hold none, or on max_sweeps < 1.
    """
    _check_counts(max_sweeps=max_sweeps)
    num_steps = _count(batches)
    pair = _pair(arch, params, target, start)
    tx = optax.apply_if_finite(optax.adam(0.01) if tx is None else tx, num_steps)

    def midpoint_loss(moved: Params, batch: Any) -> Array:
        return _segment_loss(pair, lambda point: loss_fn(point, batch))(moved, jnp.asarray(0.5))

    def of_element(element: Element, batch: Any) -> Array:
        return _or_infinity(midpoint_loss(symmetry.act(pair.arch, element, pair.source), batch))

    def step(state: tuple[Any, Any, _Track], batch: Any) -> tuple[Any, None]:
        free, opt_state, track = state
        found = _weights.weight_matching(
            pair.arch, pair.source, free, start=track.last, max_sweeps=max_sweeps, assign=assign
        )
        # The gradient at the projection is the free copy's: the projection itself has none.
        loss, grad = jax.value_and_grad(midpoint_loss)(symmetry.act(pair.arch, found.element, pair.source), batch)
        updates, opt_state = tx.update(grad, opt_state, free)
        track = _follow(track, found.element, _or_infinity(loss) < of_element(track.best, batch))
        return (optax.apply_updates(free, updates), opt_state, track), None

    free = symmetry.act(pair.arch, pair.start, pair.source)
    begin = (free, tx.init(free), _Track(pair.start, pair.start, jnp.asarray(0)))
    (_, _, track), _ = jax.lax.scan(step, begin, batches)
    finalists = stacks.stack(pair.start, track.best, track.last)

    def mean_loss(index: Array) -> Array:
        one = stacks.member(finalists, index)
        return jax.lax.map(lambda batch: of_element(one, batch), batches).mean()

    # One after the other: convolutions with a batch of kernels are slow.
    winner = jnp.argmin(jax.lax.map(mean_loss, jnp.arange(3)))
    best = stacks.member(finalists, winner)
    return _matching(arch, pair, best, track, num_steps, params, target)


# --- private ------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Both networks in their balanced gauges, where permutations and signs are all that is left to find.

    Attributes:
      arch: the architecture with these groups alone.
      source, goal: params and target, balanced, in float32 at least.
      to: the element that balanced params.
      back: the element that takes a network next to `goal` to one next to the target.
      start: in these gauges: permutations and signs.
    """

    arch: Architecture
    source: Params
    goal: Params
    to: Element
    back: Element
    start: Element


class _Track(NamedTuple):
    """What a search has seen: the best and the last element, and for how many steps the last has stood."""

    best: Element
    last: Element
    unchanged: Int[Array, ""]


def _pair(arch: Architecture, params: Params, target: Params, start: Element | None) -> _Pair:
    source, goal = (
        architecture.pack(arch, stacks.at_least_float32(architecture.unpack(arch, p, name=n)))
        for n, p in (("params", params), ("target", target))
    )
    to, theirs = symmetry.balance(arch, source), symmetry.balance(arch, goal)
    source, goal = symmetry.act(arch, to, source), symmetry.act(arch, theirs, goal)
    inner = architecture.restrict(arch, Scaling.SIGN)
    if start is None:
        start = _weights.weight_matching(inner, source, goal).element
    else:
        symmetry.check(arch, start)
    signed = {neurons.name for neurons in inner.hidden if neurons.scaling is Scaling.SIGN}
    scale = {name: jnp.where((s < 0) & (name in signed), -1.0, 1.0) for name, s in start.scale.items()}
    permutation = jax.tree.map(lambda order: jnp.asarray(order, jnp.int32), start.permutation)
    return _Pair(inner, source, goal, to, symmetry.inverse(arch, theirs), Element(permutation, scale))


def _distance(pair: _Pair) -> Callable[[Params, Array], Array]:
    """(moved, t) -> |goal - moved|^2 / (|goal|^2 + |source|^2) for moved in the orbit; the same at all times t."""
    size = optax.tree.vdot(pair.goal, pair.goal) + optax.tree.vdot(pair.source, pair.source)
    return lambda moved, t: 1 - 2 * optax.tree.vdot(pair.goal, moved) / jnp.where(size > 0, size, 1)


def _segment_loss(pair: _Pair, loss_fn: Callable[[Any], Array]) -> Callable[[Params, Array], Array]:
    """(moved, t) -> the loss between goal (t = 0) and moved (t = 1), in the gauge of the target as it came."""

    def loss(moved: Params, t: Array) -> Array:
        return loss_fn(symmetry.act(pair.arch, pair.back, merge.lerp(pair.goal, moved, t)))

    return loss


def _follow(track: _Track, element: Element, better: Bool[Array, ""]) -> _Track:
    same = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(track.last), jax.tree.leaves(element), strict=True)]
    # The constant serves networks without hidden layers.
    unchanged = jnp.where(jnp.stack([jnp.asarray(True), *same]).all(), track.unchanged + 1, 0)
    # Solvers differ in their integers.
    element = jax.tree.map(lambda old, new: new.astype(old.dtype), track.last, element)
    best = jax.tree.map(lambda old, new: jnp.where(better, new, old), track.best, element)
    return _Track(best, element, unchanged)


def _or_infinity(loss: Array) -> Array:
    """Losses that compare: a network whose loss is not a number is the worst."""
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


def _matching(
    arch: Architecture, pair: _Pair, best: Element, track: _Track, num_steps: int, params: Params, target: Params
) -> Matching:
    element = symmetry.compose(arch, pair.back, symmetry.compose(arch, best, pair.to))
    similarity = _weights.similarity(arch, symmetry.act(arch, element, params), target)
    return Matching(element, similarity, jnp.asarray(num_steps), track.unchanged >= max(1, num_steps // 10))


def _count(batches: Any) -> int:
    """The steps that the batches are for."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"The arrays of batches have leading axes {sorted(counts)}; expected one and the same number of steps >= 1 "
            "on all. Stack the batches: jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)."
        )
    return int(next(iter(counts))[0])


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected a number >= 1.")


def _check_positive(**knobs: float) -> None:
    for name, value in knobs.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; expected a finite number > 0.")
