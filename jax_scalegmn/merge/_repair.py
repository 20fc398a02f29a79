"""REPAIR: a merged network whose neurons vary on data as those of the networks that it was merged from.

The mean of two aligned networks has neurons whose pre-activations vary less than those of either, and the more so the
deeper they stand. REPAIR (Jordan et al. 2023, arXiv 2211.08403) shifts and rescales every channel until its
mean and its standard deviation are the average ones of the end points, and folds that into the weights: the repaired
network is one of the same architecture, without anything added.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import architecture, network, stacks
from jax_scalegmn.architecture import Architecture, BatchNorm, Conv, Dense, Layer, Norm, Residual
from jax_scalegmn.merge import _paths
from jax_scalegmn.network import Unit, moments
from jax_scalegmn.network.moments import Moments
from jax_scalegmn.types import Params

Path: TypeAlias = tuple[str, ...]


class Goal(NamedTuple):
    """What the pre-activations of one layer's channels shall have."""

    mean: Float[Array, "*networks channels"]
    std: Float[Array, "*networks channels"]


def repair(
    arch: Architecture,
    merged: Params,
    networks: Params,
    x: Float[Array, "examples ..."],
    *,
    weights: Float[Array, " networks"] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The merged network with every hidden channel's mean and standard deviation on data those of the end points.

    mean = sum_i w_i mean_i and std = sum_i w_i std_i of the end points i, over examples and positions, of what each
    layer gives in front of its activation (arXiv 2211.08403). Layer after layer, each with those before it
    repaired already: kernel' = g kernel, bias' = g (bias - mean) + goal, g = goal's std / std. Where a normalization
    follows a Dense or a Conv, its scale and bias are corrected in the place of kernel and bias; the statistics that a
    batch normalization stores become those of the data first.

    Left as they are: the last layer, whose outputs are no neurons; the g of channels that do not vary on the data (1);
    means where there is no bias (the channel is rescaled alone). A residual sum is corrected through its two sides.

    Args:
      arch: of all the networks, with layers to compute.
      merged: the network to repair.
      networks: the end points, aligned to each other as they were for merging, with a leading axis [networks].
      x: the data, as `network.apply` takes one; unlabeled, a few hundred examples do.
      weights: of the end points, as in `merge.average`.
      batch_size: None computes all the data at once, in a single walk through the layers. A number bounds the memory to
        that many examples at a time, and costs as many passes over the data as there are layers.

    Raises:
      ValueError: if networks, weights or data do not fit, or if the architecture's function is not described by layers.
    """
    _check(arch, merged, x, name="merged")
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(networks)):
        architecture.check_stack(arch, networks, name="networks")
    stacks.count(networks)
    last = _last(arch.layers)
    hidden = {path: layer for path, layer in _units(arch.layers) if path not in last}

    def statistics(one: Params) -> dict[Path, Goal]:
        found = _measured(arch, one, x, hidden, batch_size, entering=False)
        return {path: Goal(mean, jnp.sqrt(var)) for path, (mean, var) in found.items()}

    # One network after the other: their activations need not fit into memory together.
    found = jax.lax.map(statistics, networks)
    # A single layer has no hidden channels.
    return _mended(arch, merged, x, _paths.average(found, weights) if found else {}, batch_size)


def reset_batch_norm(
    arch: Architecture, params: Params, x: Float[Array, "examples ..."], *, batch_size: int | None = None
) -> dict[str, Any]:
    """The network whose batch normalizations store the statistics of data, each with those before it reset already.

    What a merged network needs at the least: averaged variances are not the variances of averages.

    Args:
      arch: the architecture, with layers to compute. Without batch normalizations nothing changes.
      params: the network.
      x: the data, as `network.apply` takes one.
      batch_size: as in `repair`; the statistics are those of all the data in any case.

    Raises:
      ValueError: if params or x do not fit, or if the architecture's function is not described by layers.
    """
    _check(arch, params, x, name="params")
    return _mended(arch, params, x, {}, batch_size)


# --- private ------------------------------------------------------------------------------------------------------


def _check(arch: Architecture, params: Params, x: Array, *, name: str) -> None:
    network.check_examples(arch, x)
    architecture.unpack(arch, params, name=name)


class _Watched(network.Hook):
    """Calls `watch` with what every layer with params is given and gives, and goes on with the params it returns."""

    def __init__(self, watch: Callable[[Path, Unit, Params, Array], Params]) -> None:
        self.watch = watch

    def compute(self, path: Path, layer: Unit, params: Params, x: Array) -> Array:
        return network.compute(layer, self.watch(path, layer, params, x), x)


def _measured(
    arch: Architecture,
    params: Params,
    x: Array,
    layers: Mapping[Path, Unit],
    batch_size: int | None,
    *,
    entering: bool,
) -> dict[Path, Moments]:
    """The moments of what those layers give; with `entering`, of batch normalizations what they are given."""

    def of_example(x: Array) -> dict[Path, Moments]:
        found: dict[Path, Moments] = {}

        def watch(path: Path, layer: Unit, params: Params, x: Array) -> Params:
            if path in layers:
                given = entering and isinstance(layer, BatchNorm)
                found[path] = moments.over_examples(x if given else network.compute(layer, params, x))
            return params

        network.apply_with(arch, params, x, _Watched(watch))
        return found

    of_batch = jax.vmap(of_example, axis_name=moments.EXAMPLES, out_axes=None)
    if batch_size is None:
        return of_batch(x)
    stacks = moments.batches(x, batch_size)
    parts = [jax.lax.map(of_batch, stack) for stack in stacks]
    counts = jnp.concatenate([jnp.full(len(stack), stack.shape[1], float) for stack in stacks])
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return {path: moments.pooled(part, counts) for path, part in whole.items()}


def _mended(
    arch: Architecture, params: Params, x: Array, goals: Mapping[Path, Goal], batch_size: int | None
) -> dict[str, Any]:
    """The network with the data's statistics in its batch normalizations, and the goals in the layers that have one."""
    # All batch normalizations, those of the outputs too, for what they store.
    layers = {path: layer for path, layer in _units(arch.layers) if path in goals or isinstance(layer, BatchNorm)}
    if batch_size is None:
        return _mended_at_once(arch, params, x, layers, goals)

    def mend(index: Array, params: Params) -> dict[str, Any]:
        found = _measured(arch, params, x, layers, batch_size, entering=True)
        changed = {}
        for place, (path, layer) in enumerate(layers.items()):
            own = _at(params, path)
            for name, value in _corrected(layer, own, found[path], goals.get(path)).items():
                # What stands behind this layer was measured with it as it was: its turn comes in a later pass.
                changed[*path, name] = jnp.where(index == place, value, own[name])
        return network.replace_variables(params, changed)

    begin = architecture.pack(arch, [jnp.asarray(value) for value in architecture.unpack(arch, params)])
    return jax.lax.fori_loop(0, len(layers), mend, begin)


def _mended_at_once(
    arch: Architecture, params: Params, x: Array, layers: Mapping[Path, Unit], goals: Mapping[Path, Goal]
) -> dict[str, Any]:
    def of_example(x: Array) -> dict[Path, Array]:
        changed: dict[Path, Array] = {}

        def watch(path: Path, layer: Unit, params: Params, x: Array) -> Params:
            if path not in layers:
                return params
            out = x if isinstance(layer, BatchNorm) else network.compute(layer, params, x)
            values = _corrected(layer, params, moments.over_examples(out), goals.get(path))
            changed.update({(*path, name): value for name, value in values.items()})
            return {**params, **values}

        network.apply_with(arch, params, x, _Watched(watch))
        return changed

    changed = jax.vmap(of_example, axis_name=moments.EXAMPLES, out_axes=None)(x)
    return network.replace_variables(params, changed)


def _corrected(layer: Unit, params: Params, found: Moments, goal: Goal | None) -> dict[str, Array]:
    """The arrays of one layer that change, given the moments of what it gives; of a BatchNorm: what it is given."""
    values: dict[str, Array] = {}
    # A constant's variance is that of its roundings.
    alive = found.var > jnp.square(8 * jnp.finfo(found.var.dtype).eps * found.mean)
    if isinstance(layer, BatchNorm):
        values = found._asdict()
        # With those statistics stored it gives channels with this mean and variance.
        shrink = found.var / (found.var + layer.epsilon)
        found = Moments(params["bias"], jnp.square(params["scale"]) * shrink)
        alive &= found.var > 0
    if goal is not None:
        gain = jnp.where(alive, goal.std * jax.lax.rsqrt(jnp.where(alive, found.var, 1)), 1.0)
        name = "scale" if isinstance(layer, Norm) else "kernel"
        values[name] = params[name] * gain
        if "bias" in params:
            values["bias"] = (params["bias"] - found.mean) * gain + goal.mean
    return {name: value.astype(params[name].dtype) for name, value in values.items()}


def _units(layers: tuple[Layer, ...], at: Path = ()) -> Iterator[tuple[Path, Unit]]:
    """The layers with params, but those that a normalization follows, which takes any correction off again."""
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer, Residual):
            path = at if layer.name is None else (*at, layer.name)
            yield from _units(layer.branch, path)
            yield from _units(layer.shortcut, path)
        elif isinstance(layer, Norm) or (isinstance(layer, Dense | Conv) and not isinstance(following, Norm)):
            yield (*at, layer.name), layer


def _last(layers: tuple[Layer, ...], at: Path = ()) -> set[Path]:
    """The layers that give the network's outputs: the last one, or the last ones of both sides of a sum."""
    units = [layer for layer in layers if isinstance(layer, Unit | Residual)]
    if not units:
        return set()
    end = units[-1]
    if isinstance(end, Residual):
        path = at if end.name is None else (*at, end.name)
        return _last(end.branch, path) | _last(end.shortcut, path)
    return {(*at, end.name)}


def _at(params: Params, path: Path) -> Params:
    for key in path:
        params = params[key]
    return params
