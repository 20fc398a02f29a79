"""Differentiable matching: group elements found by gradient steps, on the weights or on a loss between two networks.

Weight matching asks the weights alone, and ends where no single layer's assignment improves. Here the objective is
free: `sinkhorn_matching` relaxes permutations and signs to matrices and differentiates through them (Peña et al. 2023,
arXiv 2212.12042); `straight_through_matching` keeps them hard and trains a free copy of the weights that decides which
element is taken (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 3). Both work on the whole group: positive scales
are settled by the norm-balanced gauge, in which permutations and signs are searched, as in `matching.weight_matching`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from jax_scalegmn import architecture, assignment, gauge, matching, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.assignment import Assign
from jax_scalegmn.matching import Matching
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Key, Params

# Where the segment between two networks is judged when its points are drawn at random: a midpoint rule on [0, 1].
TIMES = (0.125, 0.375, 0.625, 0.875)


class Soft(NamedTuple):
    """A relaxed group element: one matrix for every hidden layer in place of a permutation with signs.

    Attributes:
      permutation: doubly stochastic; row: neuron of the moved network, column: of the given one.
      signed: the same times a soft sign in [-1, 1] for each entry; `permutation` itself where no sign acts.
    """

    permutation: dict[str, Float[Array, "n n"]]
    signed: dict[str, Float[Array, "n n"]]


def soft_act(arch: Architecture, soft: Soft, params: Params) -> dict[str, dict[str, Array]]:
    """The relaxed action: every neuron axis times the layer's matrix, `signed` where signs touch it (power 1 or -1).

    With matrices that are signed permutations it is `symmetry.act`.

    Raises:
      ValueError: if params do not fit the architecture.
    """
    values = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, Axis) and axis.neurons in soft.permutation:
                # Variances stay positive: what no sign touches is mixed with weights >= 0.
                matrix = (soft.signed if axis.power else soft.permutation)[axis.neurons]
                value = _contract(matrix, position, value)
        values.append(value)
    return architecture.pack(arch, values)


def relax(arch: Architecture, logits: Mapping[str, Float[Array, "n n"]], *, num_iterations: int = 20) -> Soft:
    """The maximum-entropy matrices of the logits: entropic optimal transport by Sinkhorn's iteration.

    Permutations: P = argmax <P, X> + H(P) over doubly stochastic matrices (Mena et al. 2018, arXiv 1802.08665). With
    signs, the same problem over pairs P+ + P- doubly stochastic with <P+ - P-, X>: its solution is P = Sinkhorn(log 2
    cosh X) and P+ - P- = P tanh X. So one matrix of logits carries both, its sign is the neuron's sign, and its limit
    for large logits is the assignment that maximises |X|, by which `matching.weight_matching` chooses signs too.

    Args:
      arch: the architecture; signs are relaxed in its SIGN layers.
      logits: [n, n] for every hidden layer, divided by the entropy's weight already.
      num_iterations: of Sinkhorn. They are differentiated one by one: the implicit gradient needs a linear system that
        is singular for nearly hard matrices, where its solvers fail. Rows sum to 1 exactly, columns in the limit.
    """
    permutation, signed = {}, {}
    for neurons in arch.hidden:
        x = logits[neurons.name]
        if neurons.scaling is Scaling.SIGN:
            permutation[neurons.name] = _doubly_stochastic(jnp.logaddexp(x, -x), num_iterations)
            signed[neurons.name] = permutation[neurons.name] * jnp.tanh(x)
        else:
            permutation[neurons.name] = signed[neurons.name] = _doubly_stochastic(x, num_iterations)
    return Soft(permutation, signed)


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

    Adam moves the logits of all hidden layers at once; after every step they are hardened (an assignment, and the sign
    of the logit at its place, +1 for 0), the element is judged by the objective itself, and the best one is returned:
    never worse than `start`. The objective is, with `loss_fn` None, the squared distance
    |target|^2 + |params|^2 - 2 <target, act(Q, params)>. So written it is that of every hard Q, and linear in each
    layer's matrix, so that nothing is gained by staying soft; |target - soft act|^2 would reward small soft networks.
    With `loss_fn` it is the loss on the segment between target and the moved network: at its midpoint, or, with a key,
    at one uniform point of it in every step, judged by the mean over `TIMES` (C_Mid and C_Rnd of the paper).

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      key: consumed; with it the loss is taken at random points, without it at the midpoint.
      loss_fn: of params, a scalar; None for the distance of the weights, without data.
      start: an element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`. Layers that the objective does not touch keep it.
      num_steps: of Adam.
      learning_rate: of Adam, on the logits.
      epsilon: the entropy's weight: the matrices are those of logits / epsilon, harder for smaller ones.
      confidence: how large the logits of the start's places are at first, in units of epsilon. Near 0 the search begins
        undecided, and `start` is but the result to beat; from 5 on it stays in the neighbourhood of `start`.
      num_iterations: of Sinkhorn, in every step.
      assign: the assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them hardened to one element.

    Raises:
      ValueError: if a network or the start does not fit the architecture, on a key without a loss, or on knobs out of
        their range.
    """
    _check_knobs(num_steps=num_steps, learning_rate=learning_rate, epsilon=epsilon, confidence=confidence)
    _check_knobs(num_iterations=num_iterations)
    if key is not None and loss_fn is None:
        raise ValueError("key draws the points at which the loss is taken; expected a loss_fn with it, or neither.")
    pair = _pair(arch, params, target, start)
    objective = _distance(pair) if loss_fn is None else _segment_loss(pair, loss_fn)
    times = jnp.full((1,), 0.5) if key is None else jnp.asarray(TIMES)
    tx = optax.apply_if_finite(optax.adam(learning_rate), num_steps)

    def soft_objective(logits: dict[str, Array], t: Array) -> Array:
        sharp = {name: x / epsilon for name, x in logits.items()}
        return objective(soft_act(pair.arch, relax(pair.arch, sharp, num_iterations=num_iterations), pair.source), t)

    def judge(element: Element) -> Array:
        moved = symmetry.act(pair.arch, element, pair.source)
        return _or_infinity(jnp.stack([objective(moved, t) for t in times]).mean())

    def step(state: tuple[Any, Any, _Track, Array], index: Array) -> tuple[Any, None]:
        logits, opt_state, track, lowest = state
        t = times[0] if key is None else jax.random.uniform(jax.random.fold_in(key, index))
        updates, opt_state = tx.update(jax.grad(soft_objective)(logits, t), opt_state)
        logits = optax.apply_updates(logits, updates)
        element = _harden(pair.arch, logits, assign)
        value = judge(element)
        return (logits, opt_state, _follow(track, element, value < lowest), jnp.minimum(value, lowest)), None

    logits = _logits_of(pair, confidence * epsilon)
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
    unchanged to the free copy, which an optimiser moves. The copy begins at the matched params, where the projection is
    `start`, and every projection begins with the element before.

    Losses of different batches do not compare. So a step's element takes the best one's place where its loss is lower
    on that step's batch, on which both are evaluated; in the end `start`, the best and the last element are evaluated
    on all batches, and the lowest mean is returned: never worse than `start` on them.

    Args:
      arch: of both networks.
      params: the network to transform.
      target: the network to come close to.
      loss_fn: (params, batch) -> a scalar.
      batches: a pytree whose arrays have a leading axis [steps]; one step for each.
      start: the element to begin with; its positive scales are replaced by the balanced gauge's. None: that of
        `matching.weight_matching`.
      tx: the optimiser of the free copy; None for Adam with a rate of 0.01.
      max_sweeps: of weight matching in every projection.
      assign: the assignment solver; None for `assignment.default` of each layer's width.

    Returns:
      The matching; `sweeps` are the steps, and it is converged if the last tenth of them had one element.

    Raises:
      ValueError: if a network or the start does not fit the architecture, on batches that disagree on the number of
        steps or hold none, or on max_sweeps < 1.
    """
    _check_knobs(max_sweeps=max_sweeps)
    num_steps = _count(batches)
    pair = _pair(arch, params, target, start)
    tx = optax.apply_if_finite(optax.adam(0.01) if tx is None else tx, num_steps)

    def midpoint_loss(moved: Params, batch: Any) -> Array:
        return _segment_loss(pair, lambda point: loss_fn(point, batch))(moved, jnp.asarray(0.5))

    def of_element(element: Element, batch: Any) -> Array:
        return _or_infinity(midpoint_loss(symmetry.act(pair.arch, element, pair.source), batch))

    def step(state: tuple[Any, Any, _Track], batch: Any) -> tuple[Any, None]:
        free, opt_state, track = state
        found = matching.weight_matching(
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
    finalists = jax.tree.map(lambda *leaves: jnp.stack(leaves), pair.start, track.best, track.last)
    losses = jax.lax.map(lambda batch: jax.vmap(lambda element: of_element(element, batch))(finalists), batches)
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(losses.mean(0))], finalists)
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
    unchanged: Array


def _pair(arch: Architecture, params: Params, target: Params, start: Element | None) -> _Pair:
    source, goal = (
        architecture.pack(
            arch,
            [jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32)) for v in architecture.unpack(arch, p, name=n)],
        )
        for n, p in (("params", params), ("target", target))
    )
    to, theirs = gauge.balance(arch, source), gauge.balance(arch, goal)
    source, goal = symmetry.act(arch, to, source), symmetry.act(arch, theirs, goal)
    inner = architecture.restrict(arch, Scaling.SIGN)
    if start is None:
        start = matching.weight_matching(inner, source, goal).element
    else:
        symmetry.check(arch, start)
    signed = {neurons.name for neurons in inner.hidden if neurons.scaling is Scaling.SIGN}
    scale = {name: jnp.where((s < 0) & (name in signed), -1.0, 1.0) for name, s in start.scale.items()}
    permutation = jax.tree.map(lambda order: jnp.asarray(order, jnp.int32), start.permutation)
    return _Pair(inner, source, goal, to, symmetry.inverse(arch, theirs), Element(permutation, scale))


def _distance(pair: _Pair) -> Callable[[Params, Array], Array]:
    """(moved, t) -> |goal - moved|^2 / (|goal|^2 + |source|^2) for moved in the orbit; the same at all times t."""
    size = _inner(pair.goal, pair.goal) + _inner(pair.source, pair.source)
    return lambda moved, t: 1 - 2 * _inner(pair.goal, moved) / jnp.where(size > 0, size, 1)


def _segment_loss(pair: _Pair, loss_fn: Callable[[Any], Array]) -> Callable[[Params, Array], Array]:
    """(moved, t) -> the loss between goal (t = 0) and moved (t = 1), in the gauge of the target as it came."""

    def loss(moved: Params, t: Array) -> Array:
        point = jax.tree.map(lambda a, b: (1 - t) * a + t * b, pair.goal, moved)
        return loss_fn(symmetry.act(pair.arch, pair.back, point))

    return loss


def _inner(a: Params, b: Params) -> Array:
    return jnp.stack([jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]).sum()


def _contract(matrix: Array, position: int, value: Array) -> Array:
    """The matrix along one axis, on which the layer may stand several times."""
    moved = jnp.moveaxis(value, position, 0)
    blocks = moved.reshape(-1, len(matrix), *moved.shape[1:])
    mixed = jnp.einsum("ij,rj...->ri...", matrix, blocks, precision="highest")
    return jnp.moveaxis(mixed.reshape(moved.shape), 0, position)


def _doubly_stochastic(x: Float[Array, "n n"], num_iterations: int) -> Float[Array, "n n"]:
    solve = sinkhorn.Sinkhorn(
        min_iterations=num_iterations,
        max_iterations=num_iterations,
        inner_iterations=num_iterations,
        implicit_diff=None,
    )
    # Its marginals are 1 / n.
    return len(x) * solve(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=-x, epsilon=1.0))).matrix


def _logits_of(pair: _Pair, size: float) -> dict[str, Array]:
    """Logits that harden to the start."""
    return {
        neurons.name: size
        * jax.nn.one_hot(pair.start.permutation[neurons.name], neurons.width)
        * pair.start.scale[neurons.name][:, None]
        for neurons in pair.arch.hidden
    }


def _harden(arch: Architecture, logits: Mapping[str, Array], assign: Assign | None) -> Element:
    permutation, scale = {}, {}
    for neurons in arch.hidden:
        x, signed = logits[neurons.name], neurons.scaling is Scaling.SIGN
        solve = assignment.default(neurons.width) if assign is None else assign
        order = solve(jnp.abs(x) if signed else x).astype(jnp.int32)
        places = jnp.take_along_axis(x, order[:, None], 1)[:, 0]
        permutation[neurons.name], scale[neurons.name] = order, jnp.where((places < 0) & signed, -1.0, 1.0)
    return Element(permutation, scale)


def _follow(track: _Track, element: Element, better: Array) -> _Track:
    same = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(track.last), jax.tree.leaves(element), strict=True)]
    # The constant serves networks without hidden layers.
    unchanged = jnp.where(jnp.stack([jnp.asarray(True), *same]).all(), track.unchanged + 1, 0)
    best = jax.tree.map(lambda old, new: jnp.where(better, new, old), track.best, element)
    return _Track(best, element, unchanged)


def _or_infinity(loss: Array) -> Array:
    """Losses that compare: a network whose loss is not a number is the worst."""
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


def _matching(
    arch: Architecture, pair: _Pair, best: Element, track: _Track, num_steps: int, params: Params, target: Params
) -> Matching:
    element = symmetry.compose(arch, pair.back, symmetry.compose(arch, best, pair.to))
    similarity = matching.similarity(arch, symmetry.act(arch, element, params), target)
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


def _check_knobs(**knobs: float) -> None:
    for name, value in knobs.items():
        if name in ("num_steps", "num_iterations", "max_sweeps"):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected a number >= 1.")
        elif not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; expected a finite number > 0.")
