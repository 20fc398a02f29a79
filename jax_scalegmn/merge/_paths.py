"""Merging: from two or more networks to one, on params or on any other pytree (embeddings too).

Networks merge where they lie in one copy of their orbits. Four ways there:
- pairwise: `matching.align` one to the other; the end points stay exact, N networks need N^2 alignments for all pairs;
- mean frame: `matching.align_all` brings N networks to one evolving mean; exact, some N alignments a round;
- decoded: merge the canonical networks of an autoencoder; no alignment, end points as good as its reconstructions;
- canonical frame: `matching.align_to` each network to its own decoded one, then merge the originals; the end points
  stay exact and N networks need N alignments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jax_scalegmn import stacks
from jax_scalegmn.types import Interpolate


class Soup(NamedTuple):
    """What `greedy_soup` made.

    Attributes:
      params: the mean of the networks that were taken.
      taken: which of the stack those are.
      scores: of the networks one by one.
      score: of `params`; never below the best of `scores`.
    """

    params: Any
    taken: Bool[Array, "*batch networks"]
    scores: Float[Array, "*batch networks"]
    score: Float[Array, "*batch"]


def lerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """(1 - t) a + t b, leaf by leaf.

    Raises:
      ValueError: if a and b differ in structure or shapes.
    """
    stacks.check_alike(a, b)
    return jax.tree.map(lambda x, y: (1 - t) * x + t * y, a, b)


def slerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """Along the great circle from a to b, all leaves as one vector (Shoemake 1985).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b with w the angle between a and b; `lerp` where they are parallel
    or one of them is 0.

    Raises:
      ValueError: if a and b differ in structure or shapes.
    """
    stacks.check_alike(a, b)
    dot, aa, bb = (optax.tree.vdot(*pair) for pair in ((a, b), (a, a), (b, b)))
    some = aa * bb > 0  # guarded inside the root: its derivative at 0 is infinite
    cosine = jnp.where(some, dot / jnp.sqrt(jnp.where(some, aa * bb, 1)), 1)
    straight = jnp.abs(cosine) > 1 - 1e-6
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    left = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    right = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return jax.tree.map(lambda x, y: left * x + right * y, a, b)


def average(stack: Any, weights: Float[Array, " networks"] | None = None) -> Any:
    """The (weighted) mean of N networks, every array with a leading axis [networks].

    Args:
      stack: the networks.
      weights: divided by their sum; None for equal ones.

    Raises:
      ValueError: if the networks are not counted alike by all arrays, if the weights are not one for each network, or
        (where their values are at hand) if they are not finite or their sum is 0.
    """
    models = stacks.count(stack)
    weights = jnp.ones(models) if weights is None else jnp.asarray(weights)
    if weights.shape != (models,):
        raise ValueError(f"weights have shape {weights.shape}; expected ({models},), one for each network.")
    if not isinstance(weights, jax.core.Tracer):
        total = float(np.asarray(weights, np.float64).sum())
        # Relative: 0.1 + 0.2 - 0.3 is a rounding error.
        if not np.isfinite(total) or abs(total) <= 1e-6 * float(jnp.abs(weights).sum()):
            raise ValueError(f"weights are {weights} with sum {total}; expected finite ones whose sum is not 0.")
    weights = weights / weights.sum()

    def mean(leaf: Array) -> Array:
        # Half precision is summed in float32; the result has the networks' dtype, whatever that of the weights.
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        total = jnp.tensordot(weights.astype(dtype), leaf.astype(dtype), 1, precision="highest")
        return total.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else total

    return jax.tree.map(lambda leaf: mean(jnp.asarray(leaf)), stack)


def piecewise(stack: Any, t: Float[Array, ""] | float, *, interpolate: Interpolate = lerp) -> Any:
    """The point at time t of the path that runs through N networks in turn, in equal times.

    At t = i / (N - 1) stands network i. Beyond [0, 1] the first and the last piece go on. With two networks it is
    `interpolate` itself.

    Args:
      stack: the networks, every array with a leading axis [networks].
      t: in [0, 1].
      interpolate: `lerp`, `slerp` or another of that form, for each piece.

    Raises:
      ValueError: on fewer than 2 networks, or as `average` on their number.
    """
    models = stacks.count(stack, least=2)
    place = jnp.asarray(t) * (models - 1)
    piece = jnp.clip(jnp.floor(place).astype(int), 0, models - 2)
    a, b = (stacks.member(stack, index) for index in (piece, piece + 1))
    return interpolate(a, b, place - piece)


def soup(
    stack: Any,
    ts: Float[Array, " points"],
    weights: Float[Array, " points"] | None = None,
    *,
    interpolate: Interpolate = lerp,
) -> Any:
    """The (weighted) mean of the networks at several times of the path `piecewise` through N networks.

    Of two networks and `lerp` that is one more point of their segment; of curved paths and of more networks it is a
    point that lies on no path.

    Args:
      stack: the networks, every array with a leading axis [networks].
      ts: the times, in [0, 1].
      weights: of the times, as in `average`; None for equal ones.
      interpolate: as in `piecewise`.

    Raises:
      ValueError: as `piecewise` and `average`, or on times that are no vector of at least one.
    """
    if jnp.ndim(ts) != 1 or not jnp.size(ts):
        raise ValueError(
            f"ts have shape {jnp.shape(ts)}; expected [points] with at least one, like jnp.linspace(0, 1, 5)."
        )
    return average(jax.vmap(lambda t: piecewise(stack, t, interpolate=interpolate))(jnp.asarray(ts)), weights)


def greedy_soup(score_fn: Callable[[Any], Array], stack: Any) -> Soup:
    """The mean of those networks that do not lower its score (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    The networks are sorted by their own scores, the best first, ties in the order of the stack. Each is added to the
    mean of those taken so far, and stays if the score is at least what it was. A network or mean whose score is NaN is
    never added.

    Args:
      score_fn: of one network, on held-out data: a scalar, the larger the better (a negative loss, an accuracy).
        It runs 2 N times, one network at a time.
      stack: the networks in one frame, every array with a leading axis [networks].

    Raises:
      ValueError: if the networks are not counted alike by all arrays, if a score is no scalar, or (where the values are
        at hand) if all scores are NaN.
    """
    stacks.count(stack)
    shape = jax.eval_shape(score_fn, stacks.member(stack, 0)).shape
    if shape != ():
        raise ValueError(f"score_fn gives shape {shape}; expected a scalar, like a mean over the held-out examples.")
    scores = jax.lax.map(score_fn, stack)
    if not isinstance(scores, jax.core.Tracer) and np.isnan(scores).all():
        raise ValueError("All scores are NaN; expected one number for each network at least. Check data and networks.")
    # NaN sorts last.
    order = jnp.argsort(-scores, stable=True)
    first = stacks.member(stack, order[0])

    def add(state: tuple[Any, Array, Array], index: Array) -> tuple[tuple[Any, Array, Array], None]:
        mean, taken, score = state
        # A running mean: weights of 0 would not keep a diverged network's NaN out.
        share = 1 / (taken.sum() + 1)
        wider = jax.tree.map(lambda m, x: (m + share * (x - m)).astype(m.dtype), mean, stacks.member(stack, index))
        new = score_fn(wider)
        better = new >= score  # False for NaN
        state = jax.tree.map(lambda a, b: jnp.where(better, a, b), (wider, taken.at[index].set(True), new), state)
        return state, None

    begin = (first, jnp.zeros(scores.shape, bool).at[order[0]].set(True), scores[order[0]])
    (params, taken, score), _ = jax.lax.scan(add, begin, order[1:])
    return Soup(params, taken, scores, score)
