"""REPAIR: a merged network whose neurons vary on data as those of the networks that it was merged from.

The mean of two aligned networks has neurons whose pre-activations vary less than those of either, and the more so the
deeper their layer is. REPAIR (Jordan et al. 2023, arXiv 2211.08403) shifts and rescales every channel until its
mean and its standard deviation are the average ones of the end points, and folds that into the weights: the repaired
network has the same architecture, without anything added.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import architecture, network, stacks
from jax_scalegmn.architecture import Architecture, Axis, BatchNorm, Conv, Dense, Layer, Norm, Place, Residual
from jax_scalegmn.merge import _paths
from jax_scalegmn.network import Unit, moments
from jax_scalegmn.network.moments import Moments
from jax_scalegmn.types import Params

Path: TypeAlias = tuple[str, ...]

# What batch normalizations store, in Flax and in PyTorch.
_VARIANCE_OF = {"mean": "var", "running_mean": "running_var"}


class Goal(NamedTuple):
    """The mean and standard deviation that the pre-activations of one layer's channels should have."""

    mean: Float[Array, "*networks channels"]
    std: Float[Array, "*networks channels"]


@stacks.any_container("merged", "networks", returns=True)
def repair(
    arch: Architecture,
    merged: Params,
    networks: Params,
    x: Float[Array, "examples ..."],
    *,
    weights: Float[Array, " networks"] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Gives every hidden channel of a merged network the mean and standard deviation of the end points on data.

    mean = sum_i w_i mean_i and std = sum_i w_i std_i of the end points i, over examples and positions, of each layer's
    pre-activations (REPAIR, Jordan et al. 2023, arXiv 2211.08403). Layer after layer, each with those before it
    repaired already: kernel' = g kernel, bias' = g (bias - mean) + goal, g = goal's std / std. Where a normalization
    follows a Dense or a Conv, its scale and bias are corrected instead of kernel and bias; the statistics that a
    batch normalization stores become those of the data first.

    Unchanged are: the last layer, whose outputs are not neurons; the scale of channels that do not vary on the data
    (g = 1); means where there is no bias: there g is the ratio of the second moments, mean^2 + std^2, because the
    standard deviation alone could enlarge the mean. A residual sum is corrected through its two sides.

    Of the user's own function (`infer`) the values right after the last parameter that acts on them are corrected,
    through the parameters that multiply them and the bias that is added to them, as far as there are any. A parameter
    that acts on one of several branches, as the slopes of a PReLU do, is left as it is. `uncorrected` says which
    values are left.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 8, 1), "tanh")
    >>> stack = sg.stacks.stack(*(sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0))))
    >>> x = jax.random.normal(jax.random.key(1), (64, 2))
    >>> merged = sg.merge.average(stack)
    >>> repaired = sg.merge.repair(arch, merged, stack, x)
    >>> def std(params):
    ...     return (x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]).std(0)
    >>> bool(jax.numpy.allclose(std(repaired), jax.vmap(std)(stack).mean(0), rtol=1e-4))
    True

    Args:
      arch: The architecture of all the networks; it has to describe how they compute (`arch.layers`, or `infer`).
      merged: The network to repair.
      networks: The end points, aligned to each other as they were for merging, with a leading axis [networks].
      x: The data, [examples, ...] with examples as `network.apply` takes one; without labels, a few hundred examples
        are enough.
      weights: The weights of the end points, as in `merge.average`; None for equal ones.
      batch_size: None computes all the data at once, in a single pass through the layers. A number limits the memory to
        that many examples at a time, and needs as many passes over the data as there are layers.

    Returns:
      The repaired params.

    Raises:
      ValueError: If networks, weights or data do not fit, or if the architecture does not say how to compute its
        function.
    """
    _check(arch, merged, x, name="merged")
    number = architecture.check_stack(arch, networks, name="networks")
    if weights is not None:
        stacks.check_weights(weights, number)
    if arch.function is not None:
        return _repaired_traced(arch, merged, networks, x, weights, batch_size)
    return _repaired(arch, merged, networks, x, weights, batch_size=batch_size)


def uncorrected(arch: Architecture) -> dict[str, str]:
    """What `repair` cannot correct in networks of an architecture, and why.

    Args:
      arch: The architecture; it has to describe how it computes (`arch.layers`, or `infer`).

    Returns:
      By hidden neuron layer a sentence; {} if the mean and standard deviation of all of them are restored. Channels
      that do not vary on the data are left as they are in any case.

    Raises:
      ValueError: If the architecture does not say how to compute its function.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> arch = sg.infer(lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"], params, jnp.ones((5, 3))).arch
    >>> sg.merge.uncorrected(arch)
    {'up': 'its mean: it has no bias, so that its second moment is restored instead'}
    """
    shifted: dict[str, bool] = {}  # by layer with a size that can be set: whether all of its means can be moved
    used_twice: set[str] = set()
    if arch.function is not None:
        for place in arch.function.places:
            if place.is_correctable:
                shifted[place.neurons] = shifted.get(place.neurons, True) and place.shift is not None
            elif place.gains:
                used_twice.add(place.neurons)
    else:
        assert arch.input_rank  # it raises for an architecture without a function
        last = _last(arch.layers)
        own = {parameter.path: parameter.neuron_axes[-1].neurons for parameter in arch.parameters}
        for path, layer in _units(arch.layers):
            if path not in last:
                neurons = own[*path, "scale" if isinstance(layer, Norm) else "kernel"]
                shifted[neurons] = shifted.get(neurons, True) and (*path, "bias") in own
    left = {}
    for hidden in arch.hidden:
        if hidden.name in used_twice:
            left[hidden.name] = "its mean and standard deviation: its parameters act in other places, too"
        elif hidden.name not in shifted:
            left[hidden.name] = "its mean and standard deviation: no parameters set them alone"
        elif not shifted[hidden.name]:
            left[hidden.name] = "its mean: it has no bias, so that its second moment is restored instead"
    return left


@stacks.any_container("params", returns=True)
def reset_batch_norm(
    arch: Architecture, params: Params, x: Float[Array, "examples ..."], *, batch_size: int | None = None
) -> dict[str, Any]:
    """Recomputes the stored means and variances of all batch normalizations on data.

    Each is recomputed with those before it reset already. A merged network needs at least this: averaged variances are
    not the variances of averages (Jordan et al. 2023, arXiv 2211.08403, section 3).

    Of the user's own function (`infer`) the batch normalizations are found by what they store: vectors named "mean" and
    "var", or "running_mean" and "running_var", of which the first is subtracted from a value.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.vgg(((3,),), 2, input_channels=1, norm="batch")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> reset = sg.merge.reset_batch_norm(arch, params, jax.random.normal(jax.random.key(1), (16, 4, 4, 1)))
    >>> bool((reset["BatchNorm_0"]["mean"] != params["BatchNorm_0"]["mean"]).all())
    True

    Args:
      arch: The architecture; it has to describe how it computes. Without batch normalizations nothing changes.
      params: The network.
      x: The data, [examples, ...] with examples as `network.apply` takes one.
      batch_size: As in `repair`; the statistics are those of all the data in any case.

    Returns:
      The params with the new statistics.

    Raises:
      ValueError: If params or x do not fit, if the architecture does not say how to compute its function, or if a
        function of your own uses such statistics otherwise.
    """
    _check(arch, params, x, name="params")
    if arch.function is not None:
        return _reset_traced(arch, params, x, batch_size)
    return _reset(arch, params, x, batch_size=batch_size)


# --- private ------------------------------------------------------------------------------------------------------


def _check(arch: Architecture, params: Params, x: Array, *, name: str) -> None:
    network.check_examples(arch, x)
    architecture.check_params(arch, params, name=name)


@functools.partial(jax.jit, static_argnames="batch_size")  # compiled once for each architecture
def _repaired(
    arch: Architecture, merged: Params, networks: Params, x: Array, weights: Array | None, *, batch_size: int | None
) -> dict[str, Any]:
    """REPAIR of a network of layers."""
    last = _last(arch.layers)
    hidden = {path: layer for path, layer in _units(arch.layers) if path not in last}

    def statistics(params: Params) -> dict[Path, Goal]:
        measured = _measured(arch, params, x, hidden, batch_size, entering=False)
        return {path: Goal(mean, jnp.sqrt(var)) for path, (mean, var) in measured.items()}

    # One network after the other: their activations need not fit into memory together.
    each = jax.lax.map(statistics, networks)
    # A single layer has no hidden channels.
    goals = _paths.average(each, weights) if each else {}
    return _corrected_network(arch, merged, x, goals, batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _reset(arch: Architecture, params: Params, x: Array, *, batch_size: int | None) -> dict[str, Any]:
    """The batch statistics of a network of layers."""
    return _corrected_network(arch, params, x, {}, batch_size)


def _measured(
    arch: Architecture,
    params: Params,
    x: Array,
    layers: Mapping[Path, Unit],
    batch_size: int | None,
    *,
    entering: bool,
) -> dict[Path, Moments]:
    """The moments of those layers' outputs; with `entering`, for batch normalizations those of their inputs."""

    def visit(
        path: Path, layer: Unit | Residual, params: Params, x: Array, measured: dict[Path, Moments]
    ) -> tuple[Array, dict[Path, Moments]]:
        before = network.preactivation(layer, params, x)
        if path in layers:
            own = moments.over_examples(x if entering and isinstance(layer, BatchNorm) else before)
            measured = measured | {path: own}
        return network.activate(layer.activation, before), measured

    def of_example(x: Array) -> dict[Path, Moments]:
        none: dict[Any, Any] = {}
        return network.forward(arch, params, x, visit, none)[1]

    return _over_batches(of_example, x, batch_size)


def _over_batches(of_example: Callable[[Array], Any], x: Array, batch_size: int | None) -> Any:
    """The moments over all examples, by key, of what `of_example` computes inside `jax.vmap` over `EXAMPLES`."""
    of_batch = jax.vmap(of_example, axis_name=moments.EXAMPLES, out_axes=None)
    if batch_size is None:
        return of_batch(x)
    stacks = moments.batches(x, batch_size)
    parts = [jax.lax.map(of_batch, stack) for stack in stacks]
    counts = jnp.concatenate([jnp.full(len(stack), stack.shape[1], float) for stack in stacks])
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return {path: moments.pooled(part, counts) for path, part in whole.items()}


def _corrected_network(
    arch: Architecture, params: Params, x: Array, goals: Mapping[Path, Goal], batch_size: int | None
) -> dict[str, Any]:
    """The network with the data's statistics in its batch normalizations, and the goals in the layers that have one."""
    # All batch normalizations, those of the outputs too, for what they store.
    layers = {path: layer for path, layer in _units(arch.layers) if path in goals or isinstance(layer, BatchNorm)}
    if batch_size is None:
        return _corrected_in_one_pass(arch, params, x, layers, goals)

    def correct(index: Array, params: Params) -> dict[str, Any]:
        measured = _measured(arch, params, x, layers, batch_size, entering=True)
        changed = {}
        for place, (path, layer) in enumerate(layers.items()):
            own = _at(params, path)
            for name, value in _corrected(layer, own, measured[path], goals.get(path)).items():
                # Later layers were measured before this one was corrected: their turn comes in a later pass.
                changed[*path, name] = jnp.where(index == place, value, own[name])
        return network.replace_variables(params, changed)

    begin = architecture.pack(arch, [jnp.asarray(value) for value in architecture.unpack(arch, params)])
    return jax.lax.fori_loop(0, len(layers), correct, begin)


def _corrected_in_one_pass(
    arch: Architecture, params: Params, x: Array, layers: Mapping[Path, Unit], goals: Mapping[Path, Goal]
) -> dict[str, Any]:
    def visit(
        path: Path, layer: Unit | Residual, params: Params, x: Array, changed: dict[Path, Array]
    ) -> tuple[Array, dict[Path, Array]]:
        if path in layers:
            before = x if isinstance(layer, BatchNorm) else network.preactivation(layer, params, x)
            values = _corrected(layers[path], params, moments.over_examples(before), goals.get(path))
            params, changed = {**params, **values}, changed | {(*path, name): value for name, value in values.items()}
        return network.layer_output(layer, params, x), changed

    def of_example(x: Array) -> dict[Path, Array]:
        none: dict[Any, Any] = {}
        return network.forward(arch, params, x, visit, none)[1]

    changed = jax.vmap(of_example, axis_name=moments.EXAMPLES, out_axes=None)(x)
    return network.replace_variables(params, changed)


def _corrected(layer: Unit, params: Params, measured: Moments, goal: Goal | None) -> dict[str, Array]:
    """The arrays of one layer that change, given the moments of its outputs (for a BatchNorm, of its inputs)."""
    values: dict[str, Array] = {}
    alive = moments.varies(measured)
    if isinstance(layer, BatchNorm):
        values = measured._asdict()
        # With those statistics stored, its outputs have this mean and variance.
        shrink = measured.var / (measured.var + layer.epsilon)
        measured = Moments(params["bias"], jnp.square(params["scale"]) * shrink)
        alive &= measured.var > 0
    if goal is not None:
        gain = _gain(measured, alive, goal, shifted="bias" in params)
        name = "scale" if isinstance(layer, Norm) else "kernel"
        values[name] = params[name] * gain
        if "bias" in params:
            values["bias"] = (params["bias"] - measured.mean) * gain + goal.mean
    return {name: value.astype(params[name].dtype) for name, value in values.items()}


def _gain(measured: Moments, alive: Array, goal: Goal, *, shifted: bool) -> Array:
    """The factor to the goal's standard deviation, or, where the mean cannot be moved, to its second moment."""
    if shifted:
        return jnp.where(alive, goal.std * jax.lax.rsqrt(jnp.where(alive, measured.var, 1)), 1.0)
    own = measured.var + jnp.square(measured.mean)
    wanted = jnp.square(goal.std) + jnp.square(goal.mean)
    return jnp.where(alive, jnp.sqrt(wanted / jnp.where(alive, own, 1)), 1.0)


def _repaired_traced(
    arch: Architecture,
    merged: Params,
    networks: Params,
    x: Array,
    weights: Array | None,
    batch_size: int | None,
) -> dict[str, Any]:
    """REPAIR of a network with a function of its own: one place after the other, those before it repaired already."""
    assert arch.function is not None
    places = arch.function.places
    numbers = [number for number, place in enumerate(places) if place.is_correctable]

    def measured(params: Params) -> dict[int, Moments]:
        def of_example(x: Array) -> dict[int, Moments]:
            values = network.at_places(arch, params, x)
            return {number: moments.over_examples(value) for number, value in values.items()}

        return _over_batches(of_example, x, batch_size)

    def statistics(params: Params) -> dict[int, Goal]:
        return {number: Goal(mean, jnp.sqrt(var)) for number, (mean, var) in measured(params).items()}

    begin = [jnp.asarray(value) for value in architecture.unpack(arch, merged)]
    if not numbers:
        return architecture.pack(arch, begin)
    goals = _paths.average(jax.lax.map(statistics, networks), weights)

    def correct(turn: Array, values: list[Array]) -> list[Array]:
        now = measured(architecture.pack(arch, values))
        new = list(values)
        for index, number in enumerate(numbers):
            corrected = _corrected_place(arch, places[number], values, now[number], goals[number])
            for which, value in corrected.items():
                new[which] = jnp.where(turn == index, value, new[which])
        return new

    return architecture.pack(arch, jax.lax.fori_loop(0, len(numbers), correct, begin))


def _reset_traced(arch: Architecture, params: Params, x: Array, batch_size: int | None) -> dict[str, Any]:
    """The network with a function of its own and the data's statistics, one normalization after the other."""
    assert arch.function is not None
    places, stored = arch.function.centered, _stored_statistics(arch)

    def measured(values: list[Array]) -> dict[int, Moments]:
        def of_example(x: Array) -> dict[int, Moments]:
            found = network.at_means(arch, architecture.pack(arch, values), x)
            return {number: moments.over_examples(found[number]) for number in stored}

        return _over_batches(of_example, x, batch_size)

    def reset(turn: Array, values: list[Array]) -> list[Array]:
        now, new = measured(values), list(values)
        for index, (number, var) in enumerate(stored.items()):
            mean = places[number].shift
            assert mean is not None
            moved = values[mean] + now[number].mean.reshape(values[mean].shape)
            for which, value in ((mean, moved), (var, now[number].var.reshape(values[var].shape))):
                new[which] = jnp.where(turn == index, value.astype(values[which].dtype), new[which])
        return new

    begin = [jnp.asarray(value) for value in architecture.unpack(arch, params)]
    return architecture.pack(arch, jax.lax.fori_loop(0, len(stored), reset, begin) if stored else begin)


def _stored_statistics(arch: Architecture) -> dict[int, int]:
    """By the number of the place where a batch normalization subtracts its mean, the index of its variance."""
    assert arch.function is not None
    index_of = {(parameter.path, parameter.start): index for index, parameter in enumerate(arch.parameters)}
    var_of = {}
    for (path, start), index in index_of.items():
        module, dot, name = path[-1].rpartition(".")
        variance = (*path[:-1], f"{module}{dot}{_VARIANCE_OF.get(name, '')}"), start
        if name in _VARIANCE_OF and variance in index_of:
            var_of[index] = index_of[variance]
    stored = {
        n: var_of[p.shift] for n, p in enumerate(arch.function.centered) if p.shift is not None and p.shift in var_of
    }
    for mean in var_of:
        uses = sum(arch.function.centered[number].shift == mean for number in stored)
        if uses != 1:
            raise ValueError(
                f"{arch.name!r} subtracts the mean params{arch.parameters[mean]} from {uses} values; expected one, as "
                "a batch normalization does, (x - mean) / sqrt(var + epsilon). Write it so, or set the statistics in "
                "your function's training mode."
            )
    return stored


def _corrected_place(
    arch: Architecture, place: Place, values: list[Array], measured: Moments, goal: Goal
) -> dict[int, Array]:
    """The parameters that change for one place to have the goal, by their index."""
    gain = _gain(measured, moments.varies(measured), goal, shifted=place.shift is not None)
    corrected: dict[int, Array] = {}
    for index, power in place.gains:
        value = values[index]
        for factor in _spread(arch, index, place.neurons, gain**power):
            value = value * factor
        corrected[index] = value.astype(values[index].dtype)
    if place.shift is not None:
        (shift,) = _spread(arch, place.shift, place.neurons, goal.mean - gain * measured.mean)
        corrected[place.shift] = (corrected[place.shift] + shift).astype(values[place.shift].dtype)
    return corrected


def _spread(arch: Architecture, index: int, neurons: str, numbers: Array) -> Iterator[Array]:
    """A number for each neuron, for every axis of a parameter that indexes the layer, of the parameter's rank."""
    axes = arch.parameters[index].axes
    for position, axis in enumerate(axes):
        if isinstance(axis, Axis) and axis.neurons == neurons:
            yield jnp.expand_dims(jnp.tile(numbers, axis.repeat), [i for i in range(len(axes)) if i != position])


def _units(layers: tuple[Layer, ...], at: Path = ()) -> Iterator[tuple[Path, Unit]]:
    """The layers with params, except those before a normalization, which would undo any correction."""
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        if isinstance(layer, Residual):
            path = at if layer.name is None else (*at, layer.name)
            yield from _units(layer.branch, path)
            yield from _units(layer.shortcut, path)
        elif isinstance(layer, Norm) or (isinstance(layer, Dense | Conv) and not isinstance(following, Norm)):
            yield (*at, layer.name), layer


def _last(layers: tuple[Layer, ...], at: Path = ()) -> set[Path]:
    """The layers that compute the network's outputs: the last one, or the last ones of both sides of a sum."""
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
