"""Many trainings that differ only in numbers, as one program: vmapped on a device, shared out over an axis "trial".

for epoch in population(init, make_loss, trials, data, batch_size=64, num_epochs=10): ...
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jax_scalegmn import distributed
from jax_scalegmn.training._loop import State, _purpose, clipped, make_step
from jax_scalegmn.types import Key, LossFn, Metrics


class Trials(NamedTuple):
    """The numbers in which the trainings of a population differ; a single number is that of every trial.

    Attributes:
      learning_rate: The rate after the warm-up.
      weight_decay: Decoupled, on all parameters.
      clip_norm: The largest norm of a gradient.
      warmup_steps: The number of steps of the warm-up; 0 for no warm-up.
      orbit_weight: The weight of the orbit-distance term, for losses that have one.
      seed: Draws the variables, and the order and the dropout of every step.

    >>> import jax_scalegmn as sg
    >>> sg.training.Trials(learning_rate=[1e-3, 1e-2], seed=1).rows().seed.tolist()
    [1, 1]
    """

    learning_rate: Any = 1e-3
    weight_decay: Any = 0.01
    clip_norm: Any = 10.0
    warmup_steps: Any = 1000
    orbit_weight: Any = 0.0
    seed: Any = 0

    def rows(self) -> "Trials":
        """The same trials, every attribute an array [trials].

        Returns:
          float32 arrays, of warmup_steps and seed int32 ones.

        Raises:
          ValueError: If lengths differ, a number is not finite, or a count or a seed is negative or no whole number.
        """
        values = {name: np.asarray(value) for name, value in self._asdict().items()}
        lengths = {name: value.shape for name, value in values.items() if value.shape != ()}
        if len(set(lengths.values())) > 1 or any(len(shape) != 1 or shape[0] == 0 for shape in lengths.values()):
            raise ValueError(f"trials has the shapes {lengths}; expected vectors of one length, one entry per trial.")
        count = next(iter(lengths.values()), (1,))
        for name, value in values.items():
            whole = name in ("warmup_steps", "seed")
            if value.dtype.kind not in ("iu" if whole else "iuf") or not np.isfinite(value).all() or value.min() < 0:
                wanted = "whole numbers >= 0" if whole else "finite numbers >= 0"
                raise ValueError(f"trials.{name} is {value.tolist()}; expected {wanted}.")
            values[name] = np.broadcast_to(value.astype(np.int32 if whole else np.float32), count)
        return Trials(**values)


class PopulationEpoch(NamedTuple):
    """What `population` yields after an epoch; every array has a leading axis [trials].

    Attributes:
      state: The states. That of a diverged trial is the last one before it diverged.
      metrics: The mean metrics of the epoch; NaN for diverged trials.
      selection: The means of the selection loss and its metrics after the epoch; NaN for diverged trials. Empty
        without selection data.
      diverged: The step at which loss, gradient or variables were not finite for the first time; -1 for never.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.training.PopulationEpoch(None, {"loss": jnp.ones(2)}, {}, jnp.array([-1, 7])).diverged.tolist()
    [-1, 7]
    """

    state: Any
    metrics: Metrics
    selection: Metrics
    diverged: Int[Array, " trials"]


# The numbers of one trial, as scalars -> its loss.
MakeLoss = Callable[[Trials], LossFn]


def population(
    init: Callable[[Key], Any],
    make_loss: MakeLoss,
    trials: Trials,
    data: Any,
    *,
    batch_size: int,
    num_epochs: int,
    decay_steps: int | None = None,
    optimizer: str = "adamw",
    micro_batch: int | None = None,
    selection: tuple[MakeLoss, Any] | None = None,
    selection_batch: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[PopulationEpoch]:
    """Trains many models at once that differ only in numbers: one program, compiled once, for all trials and epochs.

    Each trial is trained as `fit` would train it alone, with the optimizer of `make_optimizer` and a state that begins
    with its seed; all read the same data. A trial whose loss, gradient or variables are no longer finite keeps its
    last state, is reported, and changes no number of the others.

    Args:
      init: A key -> the variables, like `lambda key: model.init(key, params)`.
      make_loss: The numbers of one trial, scalars inside of the program, -> the loss of one network, like
        `lambda trial: losses.inr_reconstruction(model, size=size, orbit_weight=trial.orbit_weight)`.
      trials: The numbers of the trials.
      data: A pytree whose arrays have a leading axis [networks].
      batch_size: The number of networks in a step of every trial.
      num_epochs: The number of epochs.
      decay_steps: The step at which a cosine decay of the learning rates to 0 ends; None for constant rates.
      optimizer: "adamw" or "muon", as of `make_optimizer`.
      micro_batch: The number of networks of a trial that are differentiated at a time; must divide the batch.
      selection: The loss without randomness, made like that of training, and the data on which it is measured after
        every epoch, inside of the same program; None for no measurement.
      selection_batch: The number of networks of a trial measured at a time.
      mesh: A mesh with an axis "trial", over whose devices the trials are shared out, without communication. Where
        they do not divide the trials, copies of the last one fill up and are dropped again. None: one device.

    Yields:
      A `PopulationEpoch` after every epoch. Its state's buffers are deleted once the next epoch runs.

    Raises:
      ValueError: If the data hold less than a batch, the mesh has no axis "trial", the optimizer is another one, or
        the trials are no such numbers.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> def make_loss(trial):
    ...     return lambda variables, row, key: ((variables - row) ** 2, {})
    >>> trials = sg.training.Trials(learning_rate=[0.1, 0.2], warmup_steps=0, weight_decay=0.0)
    >>> epochs = sg.training.population(
    ...     lambda key: jnp.zeros(()), make_loss, trials, jnp.asarray([2.0, 2.0]), batch_size=2, num_epochs=3
    ... )
    >>> [[round(float(loss), 2) for loss in epoch.metrics["loss"]] for epoch in epochs]
    [[4.0, 4.0], [3.61, 3.24], [3.24, 2.56]]
    """
    count = len(jax.tree.leaves(data)[0])
    if count < batch_size:
        raise ValueError(f"The data hold {count} networks, fewer than one batch of {batch_size}. Lower batch_size.")
    if mesh is not None and "trial" not in mesh.axis_names:
        raise ValueError(f"The mesh has the axes {mesh.axis_names}; expected an axis 'trial'. Name it so.")
    rows = trials.rows()
    kept = len(rows.seed)
    rows = rows if mesh is None else _filled_up(rows, mesh.shape["trial"])
    make_selection, measured = (None, ()) if selection is None else selection
    one = functools.partial(
        _epoch,
        init=init,
        make_loss=make_loss,
        make_selection=make_selection,
        settings=_Settings(count, batch_size, micro_batch, selection_batch, decay_steps, optimizer),
    )
    program = _program(one, mesh)
    carried = _empty(init, rows, optimizer)
    rows, carried, shared = _placed(rows, carried, (data, measured), mesh)
    for index in range(num_epochs):
        carried, key, metrics, selected = program(np.int32(index), carried, rows, shared)
        state = State(carried.variables, carried.opt_state, key, carried.step)
        result = PopulationEpoch(state, metrics, selected, carried.diverged)
        yield result if kept == len(carried.step) else jax.tree.map(lambda leaf: leaf[:kept], result)


# --- private ------------------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What all trials share."""

    networks: int
    batch_size: int
    micro_batch: int | None
    selection_batch: int
    decay_steps: int | None
    optimizer: str


class _Carried(NamedTuple):
    """What an epoch takes from the one before: a state without its key, which follows from the seed."""

    variables: Any
    opt_state: Any
    step: Int[Array, "*trials"]
    diverged: Int[Array, "*trials"]


def _make_optimizer(trial: Trials, name: str, decay_steps: int | None) -> optax.GradientTransformation:
    """`make_optimizer` of numbers that are known inside of a program only."""

    def schedule(step: Array) -> Array:
        rate = jnp.asarray(trial.learning_rate)
        rising = rate * (step + 1) / jnp.maximum(trial.warmup_steps, 1)
        after = rate
        if decay_steps is not None:
            length = jnp.maximum(decay_steps - trial.warmup_steps, 1)
            done = jnp.minimum(step - trial.warmup_steps, length) / length
            after = rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < trial.warmup_steps, rising, after)

    return clipped(name, schedule, trial.weight_decay, trial.clip_norm)


def _first(init: Callable[[Key], Any], trial: Trials, optimizer: str) -> tuple[_Carried, Key]:
    """What `training.init` makes of the trial's seed."""
    init_key, key = jax.random.split(jax.random.key(trial.seed))
    variables = init(init_key)
    opt_state = _make_optimizer(trial, optimizer, None).init(variables)
    return _Carried(variables, opt_state, jnp.int32(0), jnp.int32(-1)), key


def _epoch(
    index: Array,
    carried: _Carried,
    trial: Trials,
    shared: tuple[Any, Any],
    *,
    init: Callable[[Key], Any],
    make_loss: MakeLoss,
    make_selection: MakeLoss | None,
    settings: _Settings,
) -> tuple[_Carried, Key, Metrics, Metrics]:
    """One epoch of one trial; the first one begins with new variables."""
    data, measured = shared
    carried = jax.lax.cond(index == 0, lambda: _first(init, trial, settings.optimizer)[0], lambda: carried)
    _, key = jax.random.split(jax.random.key(trial.seed))
    steps = settings.networks // settings.batch_size
    step = make_step(
        make_loss(trial),
        _make_optimizer(trial, settings.optimizer, settings.decay_steps),
        micro_batch=settings.micro_batch,
    )
    order = jax.random.permutation(jax.random.fold_in(_purpose(key, "order"), index), settings.networks)

    def body(carried: _Carried, rows: Array) -> tuple[_Carried, Metrics]:
        state = State(carried.variables, carried.opt_state, key, carried.step)
        after, metrics = step(state, jax.tree.map(lambda leaf: leaf[rows], data))
        numbers = jnp.stack([metrics["loss"], metrics["grad_norm"], optax.tree.norm(after.variables)])
        finite = jnp.isfinite(numbers).all()
        diverged = jnp.where((carried.diverged < 0) & ~finite, carried.step, carried.diverged)
        updated = _Carried(after.variables, after.opt_state, after.step, diverged)
        before = carried._replace(diverged=diverged)
        return jax.tree.map(functools.partial(jnp.where, diverged < 0), updated, before), metrics

    carried, metrics = jax.lax.scan(body, carried, order[: steps * settings.batch_size].reshape(steps, -1))
    means = {name: values.mean(0) for name, values in metrics.items()}
    selected = {} if make_selection is None else _measure(make_selection(trial), carried.variables, measured, settings)
    means, selected = jax.tree.map(lambda value: jnp.where(carried.diverged < 0, value, jnp.nan), (means, selected))
    return carried, key, means, selected


def _measure(loss_fn: LossFn, variables: Any, data: Any, settings: _Settings) -> Metrics:
    """What `make_evaluation` computes."""
    losses, metrics = jax.lax.map(
        lambda row: loss_fn(variables, row, jax.random.key(0)), data, batch_size=settings.selection_batch
    )
    return {name: value.mean() for name, value in metrics.items()} | {"loss": losses.mean()}


def _program(one: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """The compiled function of (number of the epoch, carried, trials, shared data)."""
    many = jax.vmap(one, in_axes=(None, 0, 0, None))
    if mesh is not None:
        each, whole = PartitionSpec("trial"), PartitionSpec()
        many = jax.shard_map(many, mesh=mesh, in_specs=(whole, each, each, whole), out_specs=each, check_vma=False)
    return jax.jit(many, donate_argnums=1)


def _filled_up(rows: Trials, devices: int) -> Trials:
    """The trials, with copies of the last one, so that devices divide their number."""
    count = len(rows.seed)
    chosen = np.minimum(np.arange(-(-count // devices) * devices), count - 1)
    return Trials(*(value[chosen] for value in rows))


def _empty(init: Callable[[Key], Any], rows: Trials, optimizer: str) -> _Carried:
    """Zeros in place of the first states: the program makes those itself, so that nothing else is compiled."""
    shapes = jax.eval_shape(jax.vmap(lambda trial: _first(init, trial, optimizer)[0]), rows)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _placed(rows: Trials, carried: _Carried, shared: Any, mesh: Mesh | None) -> tuple[Trials, _Carried, Any]:
    """Trials and states on the device that trains them, data on all."""
    if mesh is None:
        return (*jax.tree.map(jnp.asarray, (rows, carried)), jax.tree.map(jnp.asarray, shared))
    each = NamedSharding(mesh, PartitionSpec("trial"))
    return (*jax.device_put((rows, carried), each), distributed.replicate(shared, mesh))
