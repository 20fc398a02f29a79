"""Training: a step for any loss of one network, epochs as one compiled scan, early stopping.

step = make_step(losses.inr_reconstruction(model, size=(8, 8)), tx)
for state, metrics in fit(step, state, data, batch_size=64, num_epochs=10): ...
"""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jax_scalegmn import distributed, models
from jax_scalegmn.types import Key, LossFn, Metrics


class State(NamedTuple):
    """All that training continues from: with the same data, it determines the next step bit for bit.

    Attributes:
      variables: The model's variables.
      opt_state: The optimizer's state.
      key: Never changes; the order and the dropout of a step follow from it and from the number of the step.
      step: The number of updates made so far.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> tx = sg.training.make_optimizer()
    >>> variables = {"w": jnp.zeros(3)}
    >>> state = sg.training.State(variables, tx.init(variables), jax.random.key(0), jnp.asarray(0))
    >>> int(state.step)
    0
    """

    variables: Any
    opt_state: Any
    key: Key
    step: Array


# (state, batch) -> (the next state, metrics)
Step: TypeAlias = Callable[[State, Any], tuple[State, Metrics]]

_ADAM_RATIO = 0.4  # with Muon: the learning rate of AdamW in units of Muon's


def make_optimizer(
    *,
    learning_rate: float = 1e-3,
    warmup_steps: int = 1000,
    decay_steps: int | None = None,
    weight_decay: float = 0.01,
    clip_norm: float = 10.0,
    optimizer: str = "adamw",
) -> optax.GradientTransformation:
    """AdamW after clipping of the global norm, with a linear warm-up (published: 1e-3, 1000 steps, 0.01, 10).

    Muon, whose steps of matrices are orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon), needs about
    half of AdamW's passes to train the autoencoder of digits (documentation, "Performance").

    Args:
      learning_rate: The rate after the warm-up; step t has learning_rate * min(1, (t + 1) / warmup_steps).
      warmup_steps: The number of steps of the warm-up; 0 for no warm-up.
      decay_steps: The step at which a cosine decay to 0 ends; None for a constant rate, as published.
      weight_decay: Decoupled, on all parameters; with Muon on matrices alone.
      clip_norm: The largest norm of the gradient of all parameters together.
      optimizer: "adamw"; or "muon" for matrices, with AdamW at 0.4 times the rate for all other parameters. Try a rate
        of 1e-2.

    Returns:
      The optax transformation.

    Raises:
      ValueError: If the optimizer is another one.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> tx = sg.training.make_optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
    >>> updates.round(3).tolist() == jnp.full(2, -0.1).round(3).tolist()
    True
    """
    after: optax.Schedule = optax.constant_schedule(learning_rate)
    if decay_steps is not None:
        after = optax.cosine_decay_schedule(learning_rate, max(1, decay_steps - warmup_steps))
    schedule = after
    if warmup_steps > 0:
        rise = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
        schedule = optax.join_schedules([rise, after], [warmup_steps])
    return clipped(optimizer, schedule, weight_decay, clip_norm)


def clipped(name: str, rate: optax.Schedule, weight_decay: Any, clip_norm: Any) -> optax.GradientTransformation:
    """The optimizer of a name at a learning rate, after clipping of the global norm; numbers may be traced."""
    match name:
        case "adamw":
            update = optax.adamw(rate, weight_decay=weight_decay)
        case "muon":
            update = optax.contrib.muon(
                rate,
                weight_decay=weight_decay,
                adam_learning_rate=lambda step: _ADAM_RATIO * rate(step),
                muon_weight_dimension_numbers=_as_matrices,
            )
        case _:
            raise ValueError(f"optimizer is {name!r}; expected 'adamw' or 'muon'.")
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def init(
    model: Any,
    tx: optax.GradientTransformation,
    example: Any,
    key: Key,
    *,
    method: str | None = None,
    variables: Any = None,
) -> State:
    """The state before the first step.

    Args:
      model: A linen module.
      tx: The optimizer.
      example: One network or graph that the model reads.
      key: Draws the variables, and later the order and the dropout of every step.
      method: The name of the method that reads the example; None for `__call__`.
      variables: The variables to start from, of another training for instance; None to draw them.

    Returns:
      The state at step 0.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> from flax import linen as nn
    >>> state = sg.training.init(nn.Dense(2), sg.training.make_optimizer(), jnp.ones(3), jax.random.key(0))
    >>> int(state.step), state.variables["params"]["kernel"].shape
    (0, (3, 2))
    """

    init_key, key = jax.random.split(key)
    variables = models.init(model, init_key, example, method=method) if variables is None else variables
    return State(variables, jax.jit(tx.init)(variables), key, jnp.asarray(0))


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, micro_batch: int | None = None, mesh: Mesh | None = None
) -> Step:
    """One update of an optimizer on the mean loss over a batch.

    Args:
      loss_fn: Written for one network; it gets a key of its own.
      tx: The optimizer.
      micro_batch: The number of networks that a device differentiates at a time, for less memory and fuller caches
        with the same result; must divide its share of the batch. None: all at once.
      mesh: A mesh with an axis "data" (`distributed.mesh`), over whose devices every batch is shared out; one
        all-reduce a step. State and data must be stored on all of them: `distributed.replicate`, or the same mesh in
        `fit`. None: one device.

    Returns:
      (state, batch) -> (state, metrics): the means of the loss's metrics, with loss and grad_norm. It raises
      ValueError where the batch cannot be shared out.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import jax_scalegmn as sg
    >>> def loss_fn(variables, row, key):
    ...     return (variables["w"] - row) ** 2, {}
    >>> tx = optax.sgd(0.25)
    >>> variables = {"w": jnp.zeros(())}
    >>> state = sg.training.State(variables, tx.init(variables), jax.random.key(0), jnp.asarray(0))
    >>> state, metrics = sg.training.make_step(loss_fn, tx)(state, jnp.asarray([1.0, 3.0]))
    >>> float(metrics["loss"]), float(state.variables["w"])
    (5.0, 1.0)
    """
    gradient = _make_gradient(loss_fn, micro_batch)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(_purpose(state.key, "loss"), state.step), size)
        compute = gradient if mesh is None else _over_devices(gradient, mesh, size)
        grad, metrics = compute(state.variables, batch, keys)
        updates, opt_state = tx.update(grad, state.opt_state, state.variables)
        variables = optax.apply_updates(state.variables, updates)
        metrics |= {"grad_norm": optax.tree.norm(grad)}
        return State(variables, opt_state, state.key, state.step + 1), metrics

    return step


def make_evaluation(
    loss_fn: LossFn, *, batch_size: int = 64, mesh: Mesh | None = None
) -> Callable[[Any, Any], Metrics]:
    """A compiled function for the means of a loss and its metrics over many networks.

    Args:
      loss_fn: Written for one network, without randomness: every network gets the same key.
      batch_size: The number of networks that are computed at a time, on each device.
      mesh: A mesh with an axis "data" (`distributed.mesh`), over whose devices the networks are shared out, with one
        all-reduce in all. None: one device.

    Returns:
      (variables, data) -> the means of the loss's metrics, with loss; data has a leading axis [networks]. With a mesh
      data may be the `distributed.Rows` of `distributed.shard_rows`, which are not shared out anew in each call.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> evaluate = sg.training.make_evaluation(lambda variables, row, key: ((variables - row) ** 2, {}))
    >>> float(evaluate(jnp.asarray(1.0), jnp.asarray([1.0, 3.0]))["loss"])
    2.0
    """

    def each(variables: Any, data: Any) -> Metrics:
        losses, metrics = jax.lax.map(
            lambda row: loss_fn(variables, row, jax.random.key(0)), data, batch_size=batch_size
        )
        return metrics | {"loss": losses}

    if mesh is not None:
        return _evaluation_over_devices(each, mesh)
    return jax.jit(
        lambda variables, data: {name: value.mean() for name, value in each(variables, data).items()},
    )


def fit(
    step: Step,
    state: State,
    data: Any,
    *,
    batch_size: int,
    num_epochs: int,
    mesh: Mesh | None = None,
    rows: Literal["replicated", "sharded"] = "replicated",
) -> Iterator[tuple[State, Metrics]]:
    """Yields the state and the mean metrics after every epoch; an epoch is one compiled scan, the data on the device.

    Every epoch draws its own order from the state's key; networks that fill no batch wait for another epoch. A state
    from the middle of training continues where it was. The program of an epoch is kept as long as `step` is: another
    `fit` with the very same step, like one of another seed, compiles nothing.

    Args:
      step: The step of `make_step`.
      state: Where to begin. Its buffers, and those of a yielded state, are deleted once the next epoch runs.
      data: A pytree whose arrays have a leading axis [networks].
      batch_size: The number of networks in a step.
      num_epochs: The number of epochs in all, those before `state` included.
      mesh: The mesh of `make_step`, on whose devices, also of several processes, state and data are stored. None: they
        are where they should be.
      rows: With a mesh: "replicated" stores all networks on every device, and trains on the batches of one device;
        "sharded" stores ceil(networks / devices) on each, which draws its share of a batch from its own. Nothing but
        the gradient is communicated in either case.

    Yields:
      (state, metrics) after every epoch.

    Raises:
      ValueError: If the data hold less than a batch, if devices do not divide a batch, or on sharded rows without mesh.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import jax_scalegmn as sg
    >>> def loss_fn(variables, row, key):
    ...     return (variables - row) ** 2, {}
    >>> tx = optax.sgd(0.25)
    >>> state = sg.training.State(jnp.zeros(()), tx.init(jnp.zeros(())), jax.random.key(0), jnp.asarray(0))
    >>> step = sg.training.make_step(loss_fn, tx)
    >>> epochs = sg.training.fit(step, state, jnp.asarray([2.0, 2.0]), batch_size=2, num_epochs=3)
    >>> [float(metrics["loss"]) for _, metrics in epochs]
    [4.0, 1.0, 0.25]
    """
    count = len(jax.tree.leaves(data)[0])
    steps = count // batch_size
    if steps == 0:
        raise ValueError(f"The data hold {count} networks, fewer than one batch of {batch_size}. Lower batch_size.")

    if rows not in ("replicated", "sharded") or (rows == "sharded" and mesh is None):
        raise ValueError(f"rows is {rows!r} and mesh is {mesh}; expected 'replicated', or 'sharded' with a mesh.")
    if mesh is not None:
        _check_batch(batch_size, mesh)
        state = distributed.replicate(state, mesh)
        data = distributed.replicate(data, mesh) if rows == "replicated" else _interleaved(data, count, mesh)
    compiled = _compiled_epoch(step, count, batch_size, mesh if rows == "sharded" else None)
    for _ in range(int(state.step) // steps, num_epochs):
        state, metrics = compiled(state, data)
        yield state, metrics


class Monitor(NamedTuple):
    """Early stopping on an exponentially smoothed validation loss.

    Attributes:
      smoothed: The smoothed loss, infinite before the first validation.
      best: Its lowest value so far.
      since_best: The number of validations since then.

    >>> import jax_scalegmn as sg
    >>> monitor = sg.training.Monitor()
    >>> for loss in (4.0, 2.0, 5.0):
    ...     monitor = monitor.update(loss)
    >>> monitor
    Monitor(smoothed=4.0, best=3.0, since_best=1)
    """

    smoothed: float = math.inf
    best: float = math.inf
    since_best: int = 0

    def update(self, loss: float, *, smoothing: float = 0.5) -> "Monitor":
        """The monitor after one more validation.

        Args:
          loss: The validation loss.
          smoothing: The weight of the smoothed loss so far, from 0 to 1.

        Returns:
          The new monitor; it is an immutable value.

        Raises:
          FloatingPointError: If the loss is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"The validation loss is {loss}: training diverged. Lower the learning rate.")
        smoothed = loss if math.isinf(self.smoothed) else smoothing * self.smoothed + (1 - smoothing) * loss
        if smoothed < self.best:
            return Monitor(smoothed, smoothed, 0)
        return Monitor(smoothed, self.best, self.since_best + 1)


# --- private ------------------------------------------------------------------------------------------------------


# (variables, rows, keys) -> (gradient, metrics)
_Gradient: TypeAlias = Callable[[Any, Any, Key], tuple[Any, Metrics]]


def _make_gradient(loss_fn: LossFn, micro_batch: int | None) -> _Gradient:
    """The gradient of the mean loss over a device's networks, and the mean metrics."""

    def mean_loss(variables: Any, rows: Any, keys: Key) -> tuple[Array, Metrics]:
        if len(keys) == 1:  # without the batch axis the compiler makes up to twice as fast a program
            loss, metrics = loss_fn(variables, *jax.tree.map(lambda leaf: leaf[0], (rows, keys)))
            return loss, metrics | {"loss": loss}
        losses, metrics = jax.vmap(loss_fn, (None, 0, 0))(variables, rows, keys)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()} | {"loss": losses.mean()}

    differentiate = jax.jit(jax.grad(mean_loss, has_aux=True), inline=True)  # its shapes cost no second trace

    def gradient(variables: Any, rows: Any, keys: Key) -> tuple[Any, Metrics]:
        size = len(keys)
        if micro_batch is None or micro_batch >= size:
            return differentiate(variables, rows, keys)
        if size % micro_batch:
            raise ValueError(f"micro_batch is {micro_batch}; expected a divisor of the {size} networks of a device.")
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, micro_batch, *leaf.shape[1:]), (rows, keys))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(variables, *part)), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(differentiate, variables, *first)
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda leaf: leaf * (micro_batch / size), total)

    return gradient


def _over_devices(gradient: _Gradient, mesh: Mesh, size: int) -> _Gradient:
    """The gradient of a batch that is shared out over the axis "data" of a mesh."""
    _check_batch(size, mesh)

    def mean_over_devices(variables: Any, rows: Any, keys: Key) -> tuple[Any, Metrics]:
        return jax.lax.pmean(gradient(variables, rows, keys), "data")

    # By hand, so that loops inside the loss end on each device by themselves.
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))
    return jax.shard_map(mean_over_devices, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def _check_batch(size: int, mesh: Mesh) -> None:
    devices = distributed.num_devices(mesh)
    if size % devices:
        raise ValueError(
            f"batch_size is {size} and the mesh has {devices} devices on 'data'; expected a multiple of {devices}, "
            f"like {-(-size // devices) * devices}."
        )


def _evaluation_over_devices(each: Callable[[Any, Any], Metrics], mesh: Mesh) -> Callable[[Any, Any], Metrics]:
    """(variables, data) -> the means of what `each` returns for all networks, padding left out."""
    program = _sums_over_devices(each, mesh)

    def evaluate(variables: Any, data: Any) -> Metrics:
        rows = data if isinstance(data, distributed.Rows) else distributed.shard_rows(data, mesh)
        totals, count = program(distributed.replicate(variables, mesh), *rows)
        return jax.tree.map(lambda total: total / count, totals)

    return evaluate


def _sums_over_devices(each: Callable[[Any, Any], Metrics], mesh: Mesh) -> Callable[..., tuple[Metrics, Array]]:
    """(variables, rows, mask) -> the sums of what `each` returns for the rows that are no padding, and their number."""

    def sums(variables: Any, data: Any, mask: Array) -> tuple[Metrics, Array]:
        def total(values: Array) -> Array:
            return jnp.where(mask, values.reshape(len(mask), -1).mean(1), 0).sum()

        return jax.lax.psum((jax.tree.map(total, each(variables, data)), mask.astype(jnp.float32).sum()), "data")

    whole, shared = PartitionSpec(), PartitionSpec("data")
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(whole, shared, shared), out_specs=whole, check_vma=False))


# The programs of `fit`: step -> (networks, batch size, mesh of sharded rows) -> epoch. Neither keeps its step alive,
# and with it all that the loss closes over, like images.
_EPOCHS: weakref.WeakKeyDictionary[Step, dict[tuple[int, int, Mesh | None], Step]] = weakref.WeakKeyDictionary()


def _compiled_epoch(step: Step, count: int, batch_size: int, mesh: Mesh | None) -> Step:
    """(state, data) -> (state, mean metrics), compiled once for each step and size of data and batches."""
    programs = _EPOCHS.setdefault(step, {})
    if (count, batch_size, mesh) not in programs:
        programs[count, batch_size, mesh] = _make_epoch(weakref.ref(step), count, batch_size, mesh)
    return programs[count, batch_size, mesh]


def _make_epoch(step_ref: Callable[[], Step | None], count: int, batch_size: int, mesh: Mesh | None) -> Step:
    steps = count // batch_size

    def in_order(key: Key) -> Array:
        return jax.random.permutation(key, count)[: steps * batch_size].reshape(steps, batch_size)

    def take(data: Any, rows: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], data)

    draw, batch_of = (in_order, take) if mesh is None else _sharded_batches(count, batch_size, mesh)

    def epoch(state: State, data: Any) -> tuple[State, Metrics]:
        step = step_ref()
        assert step is not None  # `fit` holds it while it runs
        order = draw(jax.random.fold_in(_purpose(state.key, "order"), state.step // steps))
        state, metrics = jax.lax.scan(lambda state, rows: step(state, batch_of(data, rows)), state, order)
        return state, jax.tree.map(lambda values: values.mean(0), metrics)

    return jax.jit(epoch, donate_argnums=0)


def _interleaved(data: Any, count: int, mesh: Mesh) -> Any:
    """Networks shared out like cards, so that every device has as many as every other, or one less.

    The last place of a device that has one less repeats another network, and is never drawn.
    """
    devices = distributed.num_devices(mesh)
    index = np.arange(-(-count // devices) * devices).reshape(-1, devices).T.reshape(-1) % count
    return distributed.shard_rows(distributed.take(distributed.gather(data), index), mesh).tree


def _sharded_batches(
    count: int, batch_size: int, mesh: Mesh
) -> tuple[Callable[[Key], Array], Callable[[Any, Array], Any]]:
    """The order of an epoch, [steps, devices, rows of a device], and a batch of it; each device knows its own rows."""
    devices = distributed.num_devices(mesh)
    share, own, steps = -(-count // devices), batch_size // devices, count // batch_size

    def order_of_device(key: Key) -> Array:
        device = jax.lax.axis_index("data")
        is_padding = jnp.arange(share) * devices + device >= count
        drawn = jax.random.uniform(jax.random.fold_in(key, device), (share,))
        order = jnp.argsort(jnp.where(is_padding, jnp.inf, drawn))
        return order[: steps * own].reshape(steps, 1, own)

    def take(data: Any, rows: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows[0]], data)

    whole, shared = PartitionSpec(), PartitionSpec("data")
    draw = jax.shard_map(
        order_of_device, mesh=mesh, in_specs=whole, out_specs=PartitionSpec(None, "data"), check_vma=False
    )
    return draw, jax.shard_map(take, mesh=mesh, in_specs=(shared, shared), out_specs=shared, check_vma=False)


def _as_matrices(variables: Any) -> Any:
    """For every array which of its axes make matrices: the last two; None for vectors and numbers."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda leaf: matrix if leaf.ndim > 1 else None, variables)


def _purpose(key: Key, name: str) -> Key:
    """Independent keys for the different uses of a key."""
    return jax.random.fold_in(key, {"order": 0, "loss": 1}[name])
