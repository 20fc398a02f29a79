"""The loss between networks: along a path, its barrier with an interval, and over the plane of three."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jax_scalegmn import merge, stacks
from jax_scalegmn.types import Interpolate, Key

__all__ = ["Barrier", "Interval", "Path", "Plane", "barrier", "bootstrap", "height", "interval", "path", "plane"]


class Path(NamedTuple):
    """Metrics along a path from a (t = 0) to b (t = 1).

    Attributes:
      ts: the times.
      metrics: what `metric_fn` gives at each, every array with a leading axis [points].
    """

    ts: Float[Array, "*networks points"]
    metrics: Any


class Barrier(NamedTuple):
    """The loss along a path from a (t = 0) to b (t = 1).

    Attributes:
      ts: the times.
      losses: the loss at each.
      height: the maximum over t of the loss above the chord between the end points' losses (Frankle et al. 2020,
        arXiv 1912.05671, section 2); never below 0, its value at the end points.
    """

    ts: Float[Array, "*networks points"]
    losses: Float[Array, "*networks points"]
    height: Float[Array, "*networks"]


class Interval(NamedTuple):
    """A barrier's height on one data set, and where it lies on others like it.

    Attributes:
      height: on all examples.
      low: the lower end of the confidence interval.
      high: the upper end.
    """

    height: Float[Array, "*networks"]
    low: Float[Array, "*networks"]
    high: Float[Array, "*networks"]


class Plane(NamedTuple):
    """The loss over the plane through three networks, in coordinates of an orthonormal basis with its origin at a.

    Attributes:
      xs: coordinates along b - a, in units of the distance between networks.
      ys: coordinates along what of c - a is orthogonal to it.
      losses: the loss at (xs[j], ys[i]) in row i and column j.
      corners: the coordinates (x, y) of a, b and c.
    """

    xs: Float[Array, "*networks points"]
    ys: Float[Array, "*networks points"]
    losses: Float[Array, "*networks points points"]
    corners: Float[Array, "*networks 3 2"]


def path(
    metric_fn: Callable[[Any], Any],
    a: Any,
    b: Any,
    *,
    interpolate: Interpolate = merge.lerp,
    num_points: int = 25,
    batch_size: int | None = None,
) -> Path:
    """What `metric_fn` gives at `num_points` equidistant times of a path.

    Args:
      metric_fn: of one point of the path (params, or whatever `interpolate` gives) to any pytree of arrays: loss and
        accuracy, or one loss for each example.
      a, b: the end points.
      interpolate: `merge.lerp`, `merge.slerp` or another of that form.
      num_points: at least 2.
      batch_size: how many points are computed at once, to bound the memory; None for all.

    Raises:
      ValueError: on fewer than 2 points, or a batch size below 1.
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path has at least its 2 end points.")
    ts = jnp.linspace(0.0, 1.0, num_points)
    return Path(ts, _map(lambda t: metric_fn(interpolate(a, b, t)), ts, batch_size))


def barrier(
    loss_fn: Callable[[Any], Array],
    a: Any,
    b: Any,
    *,
    interpolate: Interpolate = merge.lerp,
    num_points: int = 25,
    batch_size: int | None = None,
) -> Barrier:
    """The loss at `num_points` equidistant times of a path, and its height above the chord.

    Args:
      loss_fn: of one point of the path: params, or whatever `interpolate` gives.
      a, b: the end points.
      interpolate: `merge.lerp`, `merge.slerp` or another of that form.
      num_points: at least 2.
      batch_size: as in `path`.

    Raises:
      ValueError: on fewer than 2 points, or a batch size below 1.
    """
    ts, losses = path(loss_fn, a, b, interpolate=interpolate, num_points=num_points, batch_size=batch_size)
    return Barrier(ts, losses, height(losses))


def height(losses: Float[Array, " points"]) -> Float[Array, ""]:
    """The maximum of losses at equidistant times above the chord between the first and the last.

    Frankle et al. 2020, arXiv 1912.05671, section 2, for paths whose ends differ in loss. Of an accuracy take the
    negative.

    Raises:
      ValueError: if losses are no vector of 2 or more.
    """
    if losses.ndim != 1 or len(losses) < 2:
        raise ValueError(f"losses have shape {losses.shape}; expected [points] with at least the 2 end points.")
    ts = jnp.linspace(0.0, 1.0, len(losses))
    return (losses - ((1 - ts) * losses[0] + ts * losses[-1])).max()


def interval(
    losses: Float[Array, "points examples"], key: Key, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """A barrier with its percentile bootstrap interval over the examples that the loss is a mean of (Efron 1979).

    Every resample draws examples with replacement, the same ones for all points, and has a barrier of its own. A height
    is a maximum, never below 0, that noise of the points raises: an interval that begins above 0 does not show by
    itself that there is a barrier, one that ends near 0 shows that there is none to speak of.

    Args:
      losses: of each example at equidistant times of a path: `path(...).metrics` of a loss that is not averaged.
      key: consumed.
      level: of confidence, in (0, 1).
      resamples: barriers that are drawn.

    Raises:
      ValueError: on fewer than 2 points or no examples, or if the level is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number inside (0, 1), like 0.95.")
    if losses.ndim != 2 or losses.shape[0] < 2 or not losses.shape[1]:
        raise ValueError(
            f"losses have shape {losses.shape}; expected [points, examples] with 2 points and one example at least."
        )

    def resampled(key: Key) -> Array:
        rows = jax.random.randint(key, losses.shape[1:], 0, losses.shape[1])
        return height(losses[:, rows].mean(-1))

    # One after another: all at once would be resamples times the memory of the losses.
    heights = jax.lax.map(resampled, jax.random.split(key, resamples))
    low, high = jnp.quantile(heights, jnp.asarray([(1 - level) / 2, (1 + level) / 2]))
    return Interval(height(losses.mean(-1)), low, high)


def plane(
    loss_fn: Callable[[Any], Array],
    a: Any,
    b: Any,
    c: Any,
    *,
    num_points: int = 21,
    margin: float = 0.2,
    batch_size: int | None = None,
) -> Plane:
    """The loss over a grid in the plane through three networks (Garipov et al. 2018, arXiv 1802.10026, appendix).

    With u = b - a and v = (c - a) - <c - a, u> / |u|^2 u, the point (x, y) is a + x u / |u| + y v / |v|.

    Args:
      loss_fn: of params.
      a, b, c: three networks, not on one line.
      num_points: along each side of the grid, at least 2.
      margin: how far the grid goes beyond the networks on every side, in parts of their extent there.
      batch_size: how many points are computed at once, to bound the memory; None for all.

    Raises:
      ValueError: if the networks differ in structure or shapes, on fewer than 2 points, a negative margin or a batch
        size below 1, or (where the values are at hand) if they lie on one line.
    """
    if num_points < 2 or margin < 0:
        raise ValueError(
            f"num_points is {num_points} and margin {margin}; expected 2 points or more, and no less than 0."
        )
    stacks.check_alike(a, b)
    stacks.check_alike(a, c, names=("a", "c"))
    first, second = (jax.tree.map(jnp.subtract, other, a) for other in (b, c))
    across, u = _normalized(first)
    along = optax.tree.vdot(second, u)
    up, v = _normalized(jax.tree.map(lambda x, y: x - along * y, second, u))
    _check_plane(across, up, jnp.sqrt(optax.tree.vdot((a, b, c), (a, b, c))))

    zero = jnp.zeros_like(across)
    corners = jnp.stack([jnp.stack(corner) for corner in ((zero, zero), (across, zero), (along, up))])
    low, high = corners.min(0), corners.max(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    xs, ys = (jnp.linspace(low[axis], high[axis], num_points) for axis in (0, 1))

    def loss(place: Float[Array, "2"]) -> Array:
        return loss_fn(jax.tree.map(lambda p, e, f: p + place[0] * e + place[1] * f, a, u, v))

    grid = jnp.stack(jnp.meshgrid(xs, ys), -1).reshape(-1, 2)
    return Plane(xs, ys, _map(loss, grid, batch_size).reshape(num_points, num_points), corners)


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


# --- private ------------------------------------------------------------------------------------------------------


def _map(fn: Callable[[Array], Any], points: Array, batch_size: int | None) -> Any:
    """`fn` at every point, all at once or so many."""
    if batch_size is None:
        return jax.vmap(fn)(points)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more points at once, or None for all.")
    return jax.lax.map(fn, points, batch_size=batch_size)


def _normalized(tree: Any) -> tuple[Array, Any]:
    """The length of a vector, and the vector of length 1; zeros stay."""
    square = optax.tree.vdot(tree, tree)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return length, jax.tree.map(lambda leaf: leaf / jnp.where(length > 0, length, 1), tree)


def _check_plane(across: Array, up: Array, size: Array) -> None:
    # A difference of a few roundings has no direction.
    if stacks.is_concrete(up) and not min(across, up) > 8 * jnp.finfo(up.dtype).eps * size:
        raise ValueError(
            f"a, b and c lie on one line: b is {across} away from a, and c {up} from their line. Expected three "
            "networks that span a plane; for two use landscape.path."
        )
