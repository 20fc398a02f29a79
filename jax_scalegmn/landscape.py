"""The loss between two networks: along a path, and its barrier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import merge
from jax_scalegmn.types import Interpolate, Key


class Barrier(NamedTuple):
    """The loss along a path from a (t = 0) to b (t = 1).

    Attributes:
      ts: the times.
      losses: the loss at each.
      height: the maximum over t of the loss above the chord between the end points' losses (Frankle et al. 2020,
        arXiv 1912.05671, section 2); never below 0, its value at the end points.
    """

    ts: Float[Array, "*models points"]
    losses: Float[Array, "*models points"]
    height: Float[Array, "*models"]


def barrier(
    loss_fn: Callable[[Any], Array], a: Any, b: Any, *, interpolate: Interpolate = merge.lerp, num_points: int = 25
) -> Barrier:
    """The loss at `num_points` equidistant times of a path.

    Args:
      loss_fn: of one point of the path: params, or whatever `interpolate` gives.
      a, b: the end points.
      interpolate: `merge.lerp`, `merge.slerp` or another of that form.
      num_points: at least 2.

    Raises:
      ValueError: on fewer than 2 points.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path has at least its 2 end points.")
    ts = jnp.linspace(0.0, 1.0, num_points)
    losses = jax.vmap(lambda t: loss_fn(interpolate(a, b, t)))(ts)
    chord = (1 - ts) * losses[0] + ts * losses[-1]
    return Barrier(ts, losses, (losses - chord).max())


def bootstrap(
    values: Float[Array, " samples"], key: Key, *, level: float = 0.95, resamples: int = 2000
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The percentile bootstrap confidence interval of the mean (Efron 1979).

    Args:
      values: independent samples.
      key: consumed.
      level: of confidence, in (0, 1).
      resamples: means that are drawn.

    Returns:
      The lower and the upper end.

    Raises:
      ValueError: if there are no values or the level is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number inside (0, 1), like 0.95.")
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values have shape {values.shape}; expected [samples] with at least one.")
    rows = jax.random.randint(key, (resamples, values.size), 0, values.size)
    tails = jnp.asarray([(1 - level) / 2, (1 + level) / 2])
    low, high = jnp.quantile(values[rows].mean(-1), tails)
    return low, high
