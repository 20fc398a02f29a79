"""The loss between networks: along a path, its barrier with an interval, and over the plane through three networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jax_scalegmn import stacks
from jax_scalegmn.types import Interpolate, Key

__all__ = ["Barrier", "Interval", "PathMetrics", "Plane", "barrier", "bootstrap", "height", "interval", "path", "plane"]


class PathMetrics(NamedTuple):
    """Metrics along a path from a (t = 0) to b (t = 1).

    Attributes:
      ts: The times, [points].
      metrics: The result of `metric_fn` at each, every array with a leading axis [points].

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.landscape.path(lambda x: x**2, jnp.array(0.0), jnp.array(2.0), num_points=3).metrics.tolist()
    [0.0, 1.0, 4.0]
    """

    ts: Float[Array, "*networks points"]
    metrics: Any


class Barrier(NamedTuple):
    """The loss along a path from a (t = 0) to b (t = 1).

    Attributes:
      ts: The times, [points].
      losses: The loss at each, [points].
      height: The maximum over t of the loss above the chord between the end points' losses (Frankle et al. 2020,
        arXiv 1912.05671, section 2); never below 0, its value at the end points.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.landscape.barrier(lambda x: 1 - x**2, jnp.array(-1.0), jnp.array(1.0), num_points=3).losses.tolist()
    [0.0, 1.0, 0.0]
    """

    ts: Float[Array, "*networks points"]
    losses: Float[Array, "*networks points"]
    height: Float[Array, "*networks"]


class Interval(NamedTuple):
    """A barrier's height on one data set, and its confidence interval over data sets like it.

    Attributes:
      height: The height on all examples.
      low: The lower end of the confidence interval.
      high: The upper end.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> losses = jnp.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]])  # two examples that agree about the barrier
    >>> sg.landscape.interval(losses, jax.random.key(0), resamples=10)
    Interval(height=Array(2., dtype=float32), low=Array(2., dtype=float32), high=Array(2., dtype=float32))
    """

    height: Float[Array, "*networks"]
    low: Float[Array, "*networks"]
    high: Float[Array, "*networks"]


class Plane(NamedTuple):
    """The loss over the plane through three networks, in coordinates of an orthonormal basis with its origin at a.

    Attributes:
      xs: Coordinates along b - a, in units of the distance between networks, [points].
      ys: Coordinates along the part of c - a that is orthogonal to b - a, [points].
      losses: The loss at (xs[j], ys[i]) in row i and column j, [points, points].
      corners: The coordinates (x, y) of a, b and c, [3, 2].

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> corners = jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> sg.landscape.plane(jnp.sum, *corners, num_points=3).corners.tolist()
    [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]
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
    interpolate: Interpolate = stacks.lerp,
    num_points: int = 25,
    batch_size: int | None = None,
) -> PathMetrics:
    """Evaluates `metric_fn` at equidistant times of a path between two networks.

    Args:
      metric_fn: From one point of the path (params, or whatever `interpolate` returns) to any pytree of arrays: loss
        and accuracy, or one loss for each example.
      a: The end point at t = 0.
      b: The end point at t = 1.
      interpolate: `merge.lerp`, `merge.slerp` or another function with that signature.
      num_points: The number of times, at least 2.
      batch_size: How many points are computed at once, to bound the memory; None for all.

    Returns:
      The times and the metrics.

    Raises:
      ValueError: On fewer than 2 points, or a batch size below 1.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    >>> result = sg.landscape.path(lambda p: {"norm": jnp.linalg.norm(p["w"])}, a, b, num_points=5)
    >>> [f"{norm:.2f}" for norm in result.metrics["norm"]]
    ['1.00', '0.79', '0.71', '0.79', '1.00']
    """
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path has at least its 2 end points.")
    ts = jnp.linspace(0.0, 1.0, num_points)
    return PathMetrics(ts, _map(lambda t: metric_fn(interpolate(a, b, t)), ts, batch_size))


def barrier(
    loss_fn: Callable[[Any], Array],
    a: Any,
    b: Any,
    *,
    interpolate: Interpolate = stacks.lerp,
    num_points: int = 25,
    batch_size: int | None = None,
) -> Barrier:
    """Computes the loss at equidistant times of a path between two networks, and its height above the chord.

    Args:
      loss_fn: From one point of the path (params, or whatever `interpolate` returns) to a scalar.
      a: The end point at t = 0.
      b: The end point at t = 1.
      interpolate: `merge.lerp`, `merge.slerp` or another function with that signature.
      num_points: The number of times, at least 2.
      batch_size: How many points are computed at once, to bound the memory; None for all.

    Returns:
      The times, the losses and the height. Under `jax.vmap` the height of a path with a NaN is NaN, and those of others
      are as without it.

    Raises:
      ValueError: On fewer than 2 points, a batch size below 1, or (where values are known) if a loss is NaN.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    >>> sg.landscape.barrier(lambda p: 1 - jnp.square(p["w"]).sum(), a, b).height.item()
    0.5
    """
    ts, losses = path(loss_fn, a, b, interpolate=interpolate, num_points=num_points, batch_size=batch_size)
    return Barrier(ts, losses, height(losses))


def height(losses: Float[Array, " points"]) -> Float[Array, ""]:
    """The height of a barrier: the maximum of losses at equidistant times above the chord of the first and the last.

    max_t losses(t) - ((1 - t) losses(0) + t losses(1)), for paths whose ends differ in loss (Frankle et al. 2020, arXiv
    1912.05671, section 2). For an accuracy take its negative.

    Args:
      losses: The losses at equidistant times, [points].

    Returns:
      The height, 0 or more. Under `jax.vmap` it is NaN for losses with a NaN, and those of others are as without it.

    Raises:
      ValueError: If losses are not a vector of 2 or more, or (where values are known) one is NaN or one of an end is
        infinite.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.landscape.height(jnp.array([1.0, 4.0, 3.0])).item()
    2.0
    """
    if losses.ndim != 1 or len(losses) < 2:
        raise ValueError(f"losses have shape {losses.shape}; expected [points] with at least the 2 end points.")
    ts = jnp.linspace(0.0, 1.0, len(losses))
    if stacks.is_concrete(losses) and bool(jnp.isnan(losses).any()):
        at = ts[jnp.isnan(losses)]
        raise ValueError(
            f"The loss is NaN at {at.size} of {ts.size} points, the first at t = {float(at[0]):.4g}; expected numbers. "
            "A network diverged, or the data are damaged: check both ends."
        )
    if stacks.is_concrete(losses) and not bool(jnp.isfinite(losses[jnp.asarray([0, -1])]).all()):
        raise ValueError(
            f"The losses of the ends are {losses[0]} and {losses[-1]}; expected finite numbers. A network diverged, or "
            "the data are damaged: check both."
        )
    return (losses - ((1 - ts) * losses[0] + ts * losses[-1])).max()


def interval(
    losses: Float[Array, "points examples"], key: Key, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """A barrier's height with its percentile bootstrap interval over the examples (Efron 1979).

    Every resample draws examples with replacement, the same ones for all points, and has a barrier of its own. A height
    is a maximum, never below 0, that noise of the points raises: an interval that begins above 0 does not show by
    itself that there is a barrier; one that ends near 0 shows that there is none worth mentioning.

    Args:
      losses: The loss of each example at equidistant times of a path: `path(...).metrics` of a loss without the mean.
      key: A random key; it is consumed.
      level: The level of confidence, in (0, 1).
      resamples: How many barriers are drawn.

    Returns:
      The height of the mean loss, and the interval.

    Raises:
      ValueError: On fewer than 2 points or no examples, on a level or `resamples` out of range, or (where values are
        known) if a loss is NaN.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> bump = 1 + 0.5 * jax.random.normal(jax.random.key(0), (40,))  # one height for each of 40 examples
    >>> losses = jnp.stack([jnp.zeros(40), bump, jnp.zeros(40)])
    >>> result = sg.landscape.interval(losses, jax.random.key(1), resamples=200)
    >>> bool(result.low < result.height < result.high)
    True
    """
    _check_draws(level, resamples)
    if losses.ndim != 2 or losses.shape[0] < 2 or not losses.shape[1]:
        raise ValueError(
            f"losses have shape {losses.shape}; expected [points, examples] with 2 points and one example at least."
        )

    def resampled(key: Key) -> Array:
        rows = jax.random.randint(key, losses.shape[1:], 0, losses.shape[1])
        return height(losses[:, rows].mean(-1))

    whole = height(losses.mean(-1))
    # One after another: all at once would take resamples times the memory of the losses.
    heights = jax.lax.map(resampled, jax.random.split(key, resamples))
    return Interval(whole, *_ends(heights, level))


@stacks.any_container("a", "b", "c", calls=("loss_fn",))
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
    """Computes the loss over a grid in the plane through three networks (Garipov et al. 2018, arXiv 1802.10026).

    With u = b - a and v = (c - a) - <c - a, u> / |u|^2 u, the point (x, y) is a + x u / |u| + y v / |v| (appendix).

    Args:
      loss_fn: From params to a scalar.
      a: The network at the origin.
      b: The network that the x axis passes through.
      c: A third network, not on the line through a and b.
      num_points: The number of points along each side of the grid, at least 2.
      margin: How far the grid goes beyond the networks on every side, relative to their extent there.
      batch_size: How many points are computed at once, to bound the memory; None for all.

    Returns:
      The losses and their coordinates. A loss that is NaN, as it may be far away, is NaN there alone.

    Raises:
      ValueError: If the networks differ in structure or shapes, on fewer than 2 points, a negative margin or a batch
        size below 1, or if they lie on one line (checked outside `jax.jit` only).

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> a, b, c = ({"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 4.0]))
    >>> plane = sg.landscape.plane(lambda p: p["w"].sum(), a, b, c, num_points=3, margin=0.0)
    >>> plane.xs.tolist(), plane.ys.tolist()
    ([0.0, 1.0, 2.0], [0.0, 2.0, 4.0])
    >>> plane.losses.tolist()
    [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [4.0, 5.0, 6.0]]
    """
    if num_points < 2 or margin < 0:
        raise ValueError(
            f"num_points is {num_points} and margin {margin}; expected 2 points or more, and no less than 0."
        )
    stacks.check_alike(a, b)
    stacks.check_alike(a, c, names=("a", "c"))
    first, second = (jax.tree.map(_difference, other, a) for other in (b, c))
    across, u = _normalized(first)
    along = optax.tree.vdot(second, u)
    up, v = _normalized(jax.tree.map(lambda x, y: x - along * y, second, u))
    floats = [leaf for leaf in jax.tree.leaves((a, b, c)) if stacks.is_floating(leaf)]
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in floats)
    wide = stacks.at_least_float32(floats)
    _check_plane(across, up, eps * jnp.sqrt(optax.tree.vdot(wide, wide)))

    zero = jnp.zeros_like(across)
    corners = jnp.stack([jnp.stack(corner) for corner in ((zero, zero), (across, zero), (along, up))])
    low, high = corners.min(0), corners.max(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    xs, ys = (jnp.linspace(low[axis], high[axis], num_points) for axis in (0, 1))

    def loss(place: Float[Array, "2"]) -> Array:
        return loss_fn(jax.tree.map(lambda p, e, f: _moved(p, place[0] * e + place[1] * f), a, u, v))

    grid = jnp.stack(jnp.meshgrid(xs, ys), -1).reshape(-1, 2)
    return Plane(xs, ys, _map(loss, grid, batch_size).reshape(num_points, num_points), corners)


def bootstrap(
    values: Float[Array, " samples"], key: Key, *, level: float = 0.95, resamples: int = 2000
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The percentile bootstrap confidence interval of the mean (Efron 1979).

    Unlike `scipy.stats.bootstrap` it runs inside `jax.jit` and `jax.vmap`, with JAX's random keys.

    Args:
      values: Independent samples.
      key: A random key; it is consumed.
      level: The level of confidence, in (0, 1).
      resamples: How many means are drawn.

    Returns:
      The lower and the upper end.

    Raises:
      ValueError: If there are no values, on a level or `resamples` out of range, or (where values are known) if one is
        NaN.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> low, high = sg.landscape.bootstrap(jnp.arange(50.0), jax.random.key(0), resamples=500)
    >>> bool(low < 24.5 < high), bool(high - low < 10)
    (True, True)
    """
    _check_draws(level, resamples)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values have shape {values.shape}; expected [samples] with at least one.")
    if stacks.is_concrete(values) and bool(jnp.isnan(values).any()):
        at = jnp.flatnonzero(jnp.isnan(values))
        raise ValueError(
            f"{at.size} of {values.size} values are NaN, the first at {int(at[0])}; expected numbers. Leave out what "
            "diverged, and say how many that are."
        )
    rows = jax.random.randint(key, (resamples, values.size), 0, values.size)
    return _ends(values[rows].mean(-1), level)


# --- private ------------------------------------------------------------------------------------------------------


def _check_draws(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number inside (0, 1), like 0.95.")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected 1 or more, like 2000.")


def _ends(draws: Float[Array, " resamples"], level: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The ends of the percentile interval of bootstrap draws."""
    low, high = jnp.quantile(draws, jnp.asarray([(1 - level) / 2, (1 + level) / 2]))
    return low, high


def _map(fn: Callable[[Array], Any], points: Array, batch_size: int | None) -> Any:
    """`fn` at every point, `batch_size` of them at once."""
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


def _difference(x: Any, y: Any) -> Array:
    """x - y at least in float32; 0 for arrays that are no floating-point numbers."""
    if not stacks.is_floating(y):
        return jnp.zeros(jnp.shape(y))
    x, y = stacks.at_least_float32((x, y))
    return jnp.subtract(x, y)


def _moved(x: Any, step: Array) -> Array:
    """x + step in the dtype of x; x if it is no floating-point number."""
    x = jnp.asarray(x)
    return (x + step).astype(x.dtype) if stacks.is_floating(x) else x


def _check_plane(across: Array, up: Array, rounding: Array) -> None:
    # A difference of a few rounding errors has no direction.
    if stacks.is_concrete(up) and not min(across, up) > 8 * rounding:
        raise ValueError(
            f"a, b and c lie on one line: b is {across} away from a, and c {up} from their line. Expected three "
            "networks that span a plane; for two use landscape.path."
        )
