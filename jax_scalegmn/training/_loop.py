"""Training: a step for any loss of one network, epochs as one compiled scan, early stopping.

step = make_step(losses.autoencoder_loss(model, size=(8, 8)), tx)
for state, metrics in fit(step, state, data, batch_size=64, num_epochs=10): ...
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jax_scalegmn.types import Key, LossFn, Metrics


class State(NamedTuple):
    """All that training goes on from: with the same data, the next step follows from it bit for bit.

    Attributes:
      variables: of the model.
      opt_state: of the optimizer.
      key: never changes; order and dropout of a step follow from it and the number of the step.
      step: updates made so far.
    """

    variables: Any
    opt_state: Any
    key: Key
    step: Array


Step: TypeAlias = Callable[[State, Any], tuple[State, Metrics]]


def make_optimizer(
    *,
    learning_rate: float = 1e-3,
    warmup_steps: int = 1000,
    decay_steps: int | None = None,
    weight_decay: float = 0.01,
    clip_norm: float = 10.0,
) -> optax.GradientTransformation:
    """AdamW behind a clipped global norm, with a linear warm-up (published: 1e-3, 1000 steps, 0.01, 10).

    Args:
      learning_rate: after the warm-up; step t has learning_rate * min(1, (t + 1) / warmup_steps).
      warmup_steps: 0 for none.
      decay_steps: a cosine to 0 that ends at this step; None for a constant rate, as published.
      weight_decay: decoupled, on all parameters.
      clip_norm: of the gradient of all parameters together.
    """
    after: optax.Schedule = optax.constant_schedule(learning_rate)
    if decay_steps is not None:
        after = optax.cosine_decay_schedule(learning_rate, max(1, decay_steps - warmup_steps))
    schedule = after
    if warmup_steps > 0:
        rise = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
        schedule = optax.join_schedules([rise, after], [warmup_steps])
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))


def init(model: Any, tx: optax.GradientTransformation, example: Any, key: Key, *, method: str | None = None) -> State:
    """The state before the first step, for a model that reads networks like `example`, by `method` if it is given."""
    init_key, key = jax.random.split(key)
    variables = jax.jit(lambda key, example: model.init(key, example, method=method))(init_key, example)
    return State(variables, tx.init(variables), key, jnp.asarray(0))


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, micro_batch: int | None = None, mesh: Mesh | None = None
) -> Step:
    """One update on the mean loss over a batch.

    Args:
      loss_fn: written for one network; it gets a key of its own.
      tx: the optimizer.
      micro_batch: networks that a device differentiates at a time, for less memory and fuller caches with the same
        result; must divide its share of the batch. None: all at once.
      mesh: a mesh with an axis "data", over whose devices every batch is shared out; one all-reduce a step. State and
        data must stand on all of them: `replicate`. None: one device.

    Returns:
      (state, batch) -> (state, metrics): the means of the loss's metrics, with loss and grad_norm. It raises
      ValueError where the batch cannot be shared out.
    """

    def mean_loss(variables: Any, rows: Any, keys: Key) -> tuple[Array, Metrics]:
        if len(keys) == 1:  # without the batch axis the compiler makes up to twice as fast a program
            loss, metrics = loss_fn(variables, *jax.tree.map(lambda leaf: leaf[0], (rows, keys)))
            return loss, metrics | {"loss": loss}
        losses, metrics = jax.vmap(loss_fn, (None, 0, 0))(variables, rows, keys)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()} | {"loss": losses.mean()}

    def gradient(variables: Any, rows: Any, keys: Key) -> tuple[Any, Metrics]:
        size = len(keys)
        if micro_batch is None or micro_batch >= size:
            return jax.grad(mean_loss, has_aux=True)(variables, rows, keys)
        if size % micro_batch:
            raise ValueError(f"micro_batch is {micro_batch}; expected a divisor of the {size} networks of a device.")
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, micro_batch, *leaf.shape[1:]), (rows, keys))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(mean_loss, has_aux=True)(variables, *part)), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(jax.grad(mean_loss, has_aux=True), variables, *first)
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda leaf: leaf * (micro_batch / size), total)

    def shared_gradient(variables: Any, rows: Any, keys: Key) -> tuple[Any, Metrics]:
        return jax.lax.pmean(gradient(variables, rows, keys), "data")

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(_purpose(state.key, "loss"), state.step), size)
        compute = gradient
        if mesh is not None:
            if size % mesh.shape["data"]:
                raise ValueError(f"The batch has {size} networks; {mesh.shape['data']} devices do not divide it.")
            # By hand, so that loops inside the loss end on each device by themselves.
            specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))
            compute = jax.shard_map(
                shared_gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
        grad, metrics = compute(state.variables, batch, keys)
        updates, opt_state = tx.update(grad, state.opt_state, state.variables)
        variables = optax.apply_updates(state.variables, updates)
        metrics |= {"grad_norm": optax.tree.norm(grad)}
        return State(variables, opt_state, state.key, state.step + 1), metrics

    return step


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree, like state or data, on every device of a mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def make_evaluation(loss_fn: LossFn, *, batch_size: int = 64) -> Callable[[Any, Any], Metrics]:
    """(variables, data) -> the means of the loss and its metrics over all networks of `data`, compiled.

    `batch_size` networks are computed at a time. Give it a loss without randomness: every network gets the same key.
    """

    def evaluate(variables: Any, data: Any) -> Metrics:
        losses, metrics = jax.lax.map(
            lambda row: loss_fn(variables, row, jax.random.key(0)), data, batch_size=batch_size
        )
        return {name: value.mean() for name, value in metrics.items()} | {"loss": losses.mean()}

    return jax.jit(evaluate)


def fit(step: Step, state: State, data: Any, *, batch_size: int, num_epochs: int) -> Iterator[tuple[State, Metrics]]:
    """Yields the state and the mean metrics behind every epoch; an epoch is one compiled scan, the data on the device.

    Every epoch draws its own order from the state's key; networks that fill no batch wait for another epoch. A state
    from the middle of training goes on where it stood.

    Args:
      step: of `make_step`.
      state: where to begin. Its buffers, and those of a yielded state, are gone once the next epoch runs.
      data: a pytree whose arrays have a leading axis [networks].
      batch_size: networks a step.
      num_epochs: in all, those before `state` included.

    Raises:
      ValueError: if the data hold less than a batch.
    """
    count = len(jax.tree.leaves(data)[0])
    steps = count // batch_size
    if steps == 0:
        raise ValueError(f"The data hold {count} networks, fewer than one batch of {batch_size}. Lower batch_size.")

    compiled = _compiled_epoch(step, count, batch_size)
    for _ in range(int(state.step) // steps, num_epochs):
        state, metrics = compiled(state, data)
        yield state, metrics


class Monitor(NamedTuple):
    """Early stopping on an exponentially smoothed validation loss.

    Attributes:
      smoothed: the smoothed loss, infinite before the first.
      best: its lowest value so far.
      since_best: validations since then.
    """

    smoothed: float = math.inf
    best: float = math.inf
    since_best: int = 0

    def update(self, loss: float, *, smoothing: float = 0.5) -> "Monitor":
        """The monitor behind one more validation.

        Raises:
          FloatingPointError: if the loss is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"The validation loss is {loss}: training diverged. Lower the learning rate.")
        smoothed = loss if math.isinf(self.smoothed) else smoothing * self.smoothed + (1 - smoothing) * loss
        if smoothed < self.best:
            return Monitor(smoothed, smoothed, 0)
        return Monitor(smoothed, self.best, self.since_best + 1)


# --- private ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _compiled_epoch(step: Step, count: int, batch_size: int) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The epoch of `fit`, kept: another fit with the very same step, like one of another seed, compiles nothing."""
    steps = count // batch_size

    def epoch(state: State, data: Any) -> tuple[State, Metrics]:
        order_key = jax.random.fold_in(_purpose(state.key, "order"), state.step // steps)
        order = jax.random.permutation(order_key, count)[: steps * batch_size].reshape(steps, batch_size)

        def body(state: State, rows: Array) -> tuple[State, Metrics]:
            return step(state, jax.tree.map(lambda leaf: leaf[rows], data))

        state, metrics = jax.lax.scan(body, state, order)
        return state, jax.tree.map(lambda values: values.mean(0), metrics)

    return jax.jit(epoch, donate_argnums=0)


def _purpose(key: Key, name: str) -> Key:
    """Independent keys for the different uses of one."""
    return jax.random.fold_in(key, {"order": 0, "loss": 1}[name])
