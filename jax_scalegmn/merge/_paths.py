"""Merging: from two or more networks to one, on params or on any other pytree (embeddings too).

Networks merge well only in one frame, that is with their neurons in one order, sign and scale. Four ways there:

- pairwise: `matching.align` one to the other; the end points stay exact, N networks need N^2 alignments for all pairs;
- mean frame: `matching.align_all` brings N networks to one evolving mean; exact, about N alignments a round;
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
from jax_scalegmn.stacks import average, lerp
from jax_scalegmn.types import Interpolate


class Soup(NamedTuple):
    """The result of `greedy_soup`.

    Attributes:
      params: The mean of the networks that were taken.
      taken: Which networks of the stack those are.
      scores: The score of each network by itself.
      score: The score of `params`; never below the best of `scores`.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> soup = sg.merge.greedy_soup(lambda params: -abs(params["bias"] - 2), {"bias": jnp.array([1.0, 3.0, 9.0])})
    >>> float(soup.params["bias"]), soup.taken.tolist()
    (2.0, [True, True, False])
    """

    params: Any
    taken: Bool[Array, "*batch networks"]
    scores: Float[Array, "*batch networks"]
    score: Float[Array, "*batch"]


@stacks.any_container("a", "b", returns=True)
def slerp(a: Any, b: Any, t: Float[Array, ""] | float) -> Any:
    """Interpolates along the great circle from a to b, all arrays as one vector (Shoemake 1985).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b with w the angle between a and b; `lerp` where they are parallel
    or one of them is 0.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> middle = sg.merge.slerp({"bias": jnp.array([1.0, 0.0])}, {"bias": jnp.array([0.0, 1.0])}, 0.5)
    >>> middle["bias"].round(4).tolist() == jnp.sqrt(jnp.array([0.5, 0.5])).round(4).tolist()
    True

    Args:
      a: The network at t = 0.
      b: The network at t = 1.
      t: The share of the angle; it may be outside [0, 1].

    Returns:
      The network at t, with dtypes and counters as in `lerp`. The angle is that of the floating-point arrays.

    Raises:
      ValueError: If a and b differ in structure or shapes.
    """
    stacks.check_alike(a, b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    floats = [stacks.at_least_float32(pair) for pair in pairs if all(map(stacks.is_floating, pair))]
    x, y = [pair[0] for pair in floats], [pair[1] for pair in floats]
    dot, aa, bb = (optax.tree.vdot(*pair) for pair in ((x, y), (x, x), (y, y)))
    some = aa * bb > 0  # guarded inside the root: its derivative at 0 is infinite
    cosine = jnp.where(some, dot / jnp.sqrt(jnp.where(some, aa * bb, 1)), 1)
    straight = jnp.abs(cosine) > 1 - 1e-6
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    left = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    right = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return stacks.combine(a, b, left, right)


@stacks.any_container("stack", returns=True)
def piecewise(stack: Any, t: Float[Array, ""] | float, *, interpolate: Interpolate = lerp) -> Any:
    """The point at time t of the path that runs through N networks in turn, in equal times.

    It passes network i at t = i / (N - 1). Outside [0, 1] the first and the last piece are continued. With two networks
    it is `interpolate` itself.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> stack = {"bias": jnp.array([[0.0], [2.0], [10.0]])}
    >>> [float(sg.merge.piecewise(stack, t)["bias"][0]) for t in (0.0, 0.25, 0.5, 0.75)]
    [0.0, 1.0, 2.0, 6.0]

    Args:
      stack: The networks, every array with a leading axis [networks].
      t: The time, in [0, 1].
      interpolate: `lerp`, `slerp` or another function with that signature, for each piece.

    Returns:
      The network at t.

    Raises:
      ValueError: On fewer than 2 networks, or if the arrays disagree on their number.
    """
    count = stacks.count(stack, least=2)
    place = jnp.asarray(t) * (count - 1)
    piece = jnp.clip(jnp.floor(place).astype(int), 0, count - 2)
    a, b = (stacks.member(stack, index) for index in (piece, piece + 1))
    return interpolate(a, b, place - piece)


@stacks.any_container("stack", returns=True)
def soup(
    stack: Any,
    ts: Float[Array, " points"],
    weights: Float[Array, " points"] | None = None,
    *,
    interpolate: Interpolate = lerp,
) -> Any:
    """The (weighted) mean of the networks at several times of the path `piecewise` through N networks.

    With two networks and `lerp` that is another point of their segment; with curved paths and with more networks it is
    a point that lies on no path.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> stack = {"bias": jnp.array([[0.0], [2.0], [10.0]])}
    >>> round(float(sg.merge.soup(stack, jnp.array([0.0, 0.5, 0.75]))["bias"][0]), 3)
    2.667

    Args:
      stack: The networks, every array with a leading axis [networks].
      ts: The times, in [0, 1].
      weights: The weights of the times, as in `average`; None for equal ones.
      interpolate: As in `piecewise`.

    Returns:
      The mean.

    Raises:
      ValueError: As `piecewise` and `average`, or if `ts` is not a vector of one time or more.
    """
    if jnp.ndim(ts) != 1 or not jnp.size(ts):
        raise ValueError(
            f"ts have shape {jnp.shape(ts)}; expected [points] with at least one, like jnp.linspace(0, 1, 5)."
        )
    return average(jax.vmap(lambda t: piecewise(stack, t, interpolate=interpolate))(jnp.asarray(ts)), weights)


@stacks.any_container("stack", fields=("params",), calls=("score_fn",))
def greedy_soup(score_fn: Callable[[Any], Array], stack: Any) -> Soup:
    """The mean of those networks that do not lower its score (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    The networks are sorted by their own scores, the best first, ties in the order of the stack. Each is added to the
    mean of those taken so far, and stays if the score does not fall. A network or mean whose score is NaN is never
    added.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> stack = {"bias": jnp.array([[0.5], [9.0], [2.0]])}
    >>> soup = sg.merge.greedy_soup(lambda params: -((params["bias"][0] - 1.0) ** 2), stack)
    >>> soup.taken.tolist(), float(soup.params["bias"][0])
    ([True, False, True], 1.25)

    Args:
      score_fn: Maps one network to a scalar on held-out data, the larger the better (a negative loss, an accuracy).
        It runs 2 N times, one network at a time.
      stack: The networks in one frame, every array with a leading axis [networks].

    Returns:
      The mean, with the scores.

    Raises:
      ValueError: If the arrays disagree on the number of networks, if a score is not a scalar, or (where the values are
        known) if all scores are NaN.
    """
    stacks.count(stack)
    shape = jax.eval_shape(score_fn, stacks.member(stack, 0)).shape
    if shape != ():
        raise ValueError(f"score_fn returns shape {shape}; expected a scalar, like a mean over the held-out examples.")
    scores = jax.lax.map(score_fn, stack)
    if stacks.is_concrete(scores) and np.isnan(scores).all():
        raise ValueError("All scores are NaN; expected a number for at least one network. Check data and networks.")
    # NaN sorts last.
    order = jnp.argsort(-scores, stable=True)
    first = stacks.member(stack, order[0])

    def narrow(mean: Any) -> Any:
        return jax.tree.map(lambda m, x: m.astype(x.dtype), mean, first)

    def add(state: tuple[Any, Array, Array], index: Array) -> tuple[tuple[Any, Array, Array], None]:
        mean, taken, score = state  # the mean at least in float32
        # A running mean: weights of 0 would not keep a diverged network's NaN out.
        share = 1 / (taken.sum() + 1)
        wider = jax.tree.map(
            lambda m, x: (m + share * (x - m)).astype(m.dtype) if stacks.is_floating(m) else m,
            mean,
            stacks.member(stack, index),
        )
        new = score_fn(narrow(wider))
        better = new >= score  # False for NaN
        state = jax.tree.map(lambda a, b: jnp.where(better, a, b), (wider, taken.at[index].set(True), new), state)
        return state, None

    begin = (stacks.at_least_float32(first), jnp.zeros(scores.shape, bool).at[order[0]].set(True), scores[order[0]])
    (params, taken, score), _ = jax.lax.scan(add, begin, order[1:])
    return Soup(narrow(params), taken, scores, score)
