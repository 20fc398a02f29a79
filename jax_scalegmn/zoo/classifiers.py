"""Classifiers: several networks trained at once on minibatches, and their scores."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture, distributed, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import Key, Params

__all__ = ["Scores", "check_labels", "cross_entropy", "fit", "score"]


class Scores(NamedTuple):
    """How good a classifier is on a set of examples.

    Attributes:
      loss: The mean cross-entropy, in nats.
      accuracy: The share of examples whose largest output is that of their label, in [0, 1].

    >>> from jax_scalegmn.zoo import classifiers
    >>> classifiers.Scores(loss=0.1, accuracy=0.97).accuracy
    0.97
    """

    loss: Float[Array, "*networks"]
    accuracy: Float[Array, "*networks"]


def fit(
    arch: Architecture,
    x: Float[Array, "examples ..."],
    y: Int[Array, " _labels"],
    keys: Key,
    *,
    tx: optax.GradientTransformation,
    num_epochs: int,
    batch_size: int = 128,
    networks_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[dict[str, Any], Float[Array, " networks"]]]:
    """Trains one classifier for every key on the cross-entropy of minibatches, and yields after every epoch.

    Every network has its own initialization and its own order of the examples; a last incomplete batch is left out.
    Batch normalizations use the batch's statistics and keep running ones (`network.train_apply`). A step is one
    compiled program, called from a Python loop: inside compiled loops XLA's CPU gradients of convolutions are ten times
    slower.

    Args:
      arch: The architecture of all networks.
      x: Inputs of the networks, [examples, ...].
      y: Labels [examples], from 0 to outputs - 1.
      keys: Random keys [networks].
      tx: The optimizer. It gets the weights alone, so that no weight decay shrinks a statistic.
      num_epochs: The number of passes over the data.
      batch_size: The examples of one step.
      networks_at_once: The networks that are computed as one vmapped network; the others follow. None for all. On a CPU
        1 is best for convolutions, whose gradients XLA computes slowly for a batch of kernels.
      mesh: Devices (`distributed.mesh`) over whose axis "data" the networks are shared out, each trained on one device
        and bit for bit as without if networks_at_once is 1; else XLA's rounding may differ in the last bit. They are
        yielded on the devices where these divide their number, and as NumPy arrays otherwise. None: one device.

    Yields:
      The params of all networks, every array with a leading axis [networks], and each network's mean loss over the
      epoch [networks].

    Raises:
      ValueError: If examples and labels disagree in number or do not fill one batch, or if a label is not that of an
        output.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> x, y = jnp.linspace(-1, 1, 20).reshape(10, 2), jnp.arange(10) % 2
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> epochs = sg.zoo.classifiers.fit(sg.mlp((2, 4, 2)), x, y, keys, tx=optax.adam(0.01), num_epochs=2, batch_size=5)
    >>> for params, losses in epochs:
    ...     print(params["Dense_0"]["kernel"].shape, losses.shape)
    (3, 2, 4) (3,)
    (3, 2, 4) (3,)
    """
    if len(x) != len(y) or not 1 <= batch_size <= len(x):
        raise ValueError(
            f"There are {len(x)} examples, {len(y)} labels and batches of {batch_size}; expected as many labels as "
            "examples, and at least one batch of them."
        )
    check_labels(arch, y)
    group = _Group(mesh, len(keys), networks_at_once or len(keys))
    update = functools.partial(_step, arch, tx)
    # A group of one is computed without the batch axis that vmap would add to every kernel.
    step = group.program(jax.vmap(update, (0, None, None, 0)) if group.size > 1 else _of_one(update), 4)
    begin = group.program(jax.vmap(functools.partial(_begin, arch, tx)), 1)
    x, y = (x, y) if mesh is None else distributed.replicate((x, y), mesh)
    states = [begin(group.rows(keys, first)) for first in group.firsts]
    for epoch in range(num_epochs):
        orders = jax.vmap(lambda key, epoch=epoch: jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(x)))
        batches = orders(keys)[:, : len(x) // batch_size * batch_size].reshape(len(keys), -1, batch_size)
        means = []
        for index, first in enumerate(group.firsts):
            losses, own = [], group.rows(batches, first)
            for number in range(batches.shape[1]):
                states[index], loss = step(states[index], x, y, own[:, number])
                losses.append(loss)
            means.append(jnp.stack(losses).mean(0))
        params = [jax.vmap(functools.partial(_join, arch))(weights, statistics) for weights, statistics, _ in states]
        # Copied, since the next epoch's first step donates these buffers.
        yield group.joined(params), group.joined(means)


def score(
    arch: Architecture,
    params: Params,
    x: Float[Array, "examples ..."],
    y: Int[Array, " _labels"],
    *,
    batch_size: int = 1000,
) -> Scores:
    """Computes the loss and accuracy of one network; `jax.vmap` or `jax.lax.map` for more.

    Args:
      arch: The network's architecture.
      params: The network's params.
      x: Inputs [examples, ...].
      y: Labels [examples].
      batch_size: The examples that are computed at once. It changes nothing but memory and speed.

    Returns:
      The mean loss, in nats, and the accuracy, in [0, 1].

    Raises:
      ValueError: If the network does not fit the architecture, or a label is not that of an output.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 2))
    >>> params = {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    >>> float(sg.zoo.classifiers.score(arch, params, jnp.eye(2), jnp.array([0, 1])).accuracy)
    1.0
    """
    check_labels(arch, y)
    losses, hits = losses_and_hits(arch, params, x, y, batch_size=batch_size)
    return Scores(losses.mean(), hits.mean())


def cross_entropy(
    arch: Architecture,
    params: Params,
    x: Float[Array, "examples ..."],
    y: Int[Array, " _labels"],
    *,
    convolve: network.Convolve = network.convolve,
) -> Float[Array, ""]:
    """The mean cross-entropy of one network on a batch, in nats: a loss to train or to match classifiers with.

    -mean_i log softmax(f(x_i))[y_i]

    Args:
      arch: The network's architecture.
      params: The network's params.
      x: Inputs [examples, ...].
      y: Labels [examples].
      convolve: How convolutions are computed, as in `network.apply`.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 2))
    >>> params = {"Dense_0": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    >>> round(float(sg.zoo.classifiers.cross_entropy(arch, params, jnp.eye(2), jnp.array([0, 1]))), 3)
    0.693
    """
    logits = jax.vmap(functools.partial(network.apply, arch, params, convolve=convolve))(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def check_labels(arch: Architecture, y: Int[Array, " labels"]) -> None:
    """Checks that every label is that of an output; inside `jax.jit` and `jax.vmap` labels are not known and pass.

    Args:
      arch: The classifier's architecture.
      y: The labels.

    Raises:
      ValueError: If a label is not that of an output.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> sg.zoo.classifiers.check_labels(sg.mlp((2, 10)), jnp.array([3, 10]))
    Traceback (most recent call last):
    ...
    ValueError: Labels are from 3 to 10; 'mlp 2-10 relu' has outputs 0 to 9. ...
    """
    num_outputs = arch.neuron_layers[-1].width
    if not stacks.is_concrete(y):
        return
    low, high = np.asarray(y).min(), np.asarray(y).max()
    if low < 0 or high >= num_outputs:
        raise ValueError(
            f"Labels are from {low} to {high}; {arch.name!r} has outputs 0 to {num_outputs - 1}. Number the classes "
            "from 0, or widen the last layer."
        )


def losses_and_hits(
    arch: Architecture,
    params: Params,
    x: Float[Array, "examples ..."],
    y: Int[Array, " _labels"],
    *,
    batch_size: int,
    convolve: network.Convolve = network.convolve,
) -> tuple[Float[Array, " examples"], Array]:
    """Each example's cross-entropy, in nats, and whether its largest output is that of its label."""

    def one(example: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = network.apply(arch, params, example[0], convolve=convolve)
        return optax.softmax_cross_entropy_with_integer_labels(logits, example[1]), logits.argmax() == example[1]

    losses, hits = jax.lax.map(one, (x, y), batch_size=min(batch_size, len(x)))
    return losses, hits


# --- private ------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Networks that one program trains: on one device some after each other, over a mesh some of every device."""

    mesh: Mesh | None
    networks: int
    most: int

    @property
    def share(self) -> int:
        """The networks of a device."""
        return -(-self.networks // distributed.num_devices(self.mesh))

    @property
    def size(self) -> int:
        """The networks of a device that are computed as one vmapped network."""
        return min(self.most, self.share)

    @property
    def firsts(self) -> range:
        """Where each group begins among the networks of a device."""
        return range(0, self.share, self.size)

    def rows(self, values: Array, first: int) -> Array:
        """The rows of a group; over a mesh, which needs as many rows of every device, the last are filled up."""
        size = min(self.size, self.share - first)
        if self.mesh is None:
            return values[first : first + size]
        devices = distributed.num_devices(self.mesh)
        index = self.share * np.arange(devices)[:, None] + first + np.arange(size)
        return distributed.shard_rows(values[index.reshape(-1) % self.networks], self.mesh).tree

    def program(self, fn: Callable[..., Any], inputs: int) -> Callable[..., Any]:
        """The program of a function of rows, of which x and y, the second and third input, are the same for all."""
        donated = 0 if inputs > 1 else ()
        if self.mesh is None:
            return jax.jit(fn, donate_argnums=donated)
        rows, whole = PartitionSpec("data"), PartitionSpec()
        specs = (rows, whole, whole, rows)[:inputs]
        mapped = jax.shard_map(fn, mesh=self.mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return jax.jit(mapped, donate_argnums=donated)

    def joined(self, groups: list[Any]) -> Any:
        """All networks in order, every array a copy."""
        if self.mesh is None:
            return jax.tree.map(lambda *parts: jnp.copy(jnp.concatenate(parts)), *groups)
        devices = distributed.num_devices(self.mesh)

        def ordered(*parts: np.ndarray) -> np.ndarray:
            blocks = [part.reshape(devices, -1, *part.shape[1:]) for part in parts]
            whole = np.concatenate(blocks, 1)
            return whole.reshape(-1, *whole.shape[2:])[: self.networks]

        return distributed.place_rows(jax.tree.map(ordered, *distributed.gather(groups)), self.mesh)


# The weights, the statistics of normalizations, and the optimizer's state.
_State: TypeAlias = tuple[list[Array], list[Array], Any]


def _begin(arch: Architecture, tx: optax.GradientTransformation, key: Key) -> _State:
    weights, statistics = _split(arch, network.init(arch, key))
    return weights, statistics, tx.init(weights)


def _step(
    arch: Architecture, tx: optax.GradientTransformation, state: _State, x: Array, y: Array, rows: Array
) -> tuple[_State, Array]:
    """One update of one network on those rows of the data."""
    weights, statistics, opt_state = state

    def loss_fn(weights: list[Array]) -> tuple[Array, list[Array]]:
        logits, moved = network.train_apply(arch, _join(arch, weights, statistics), x[rows])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()
        return loss, _split(arch, moved)[1]

    (loss, statistics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(weights)
    updates, opt_state = tx.update(gradient, opt_state, weights)
    return (optax.apply_updates(weights, updates), statistics, opt_state), loss


def _of_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of one network, for a stack of one network."""

    def stacked(state: _State, x: Array, y: Array, rows: Array) -> Any:
        out = step(jax.tree.map(lambda leaf: leaf[0], state), x, y, rows[0])
        return jax.tree.map(lambda leaf: leaf[None], out)

    return stacked


def _split(arch: Architecture, params: Params) -> tuple[list[Array], list[Array]]:
    """The weights, which training changes, and the statistics of normalizations, in the order of the parameters."""
    weights: list[Any] = []
    statistics: list[Any] = []
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        (statistics if _is_statistic(parameter) else weights).append(value)
    return weights, statistics


def _join(arch: Architecture, weights: list[Array], statistics: list[Array]) -> dict[str, Any]:
    """The inverse of `_split`."""
    next_weight, next_statistic = iter(weights), iter(statistics)
    values = [next(next_statistic if _is_statistic(parameter) else next_weight) for parameter in arch.parameters]
    return architecture.pack(arch, values)


def _is_statistic(parameter: architecture.Parameter) -> bool:
    return parameter.path[-1] in network.STATISTICS
