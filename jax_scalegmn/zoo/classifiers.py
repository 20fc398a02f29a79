"""Classifiers: several networks trained on minibatches side by side, and scored."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jax_scalegmn import architecture, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import Key, Params

__all__ = ["Scores", "check_labels", "fit", "score"]


class Scores(NamedTuple):
    """How good a classifier is on data.

    Attributes:
      loss: the mean cross-entropy, in nats.
      accuracy: the share of examples whose largest output is their label's, in [0, 1].
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
    side_by_side: int | None = None,
) -> Iterator[tuple[dict[str, Any], Float[Array, " networks"]]]:
    """Trains one classifier for every key, on the cross-entropy of minibatches; yields behind every epoch.

    Every network has its own initialization and its own order of the examples; a last incomplete batch is left out.
    Batch normalizations compute with the batch's statistics and keep running ones (`network.train_apply`). A step is
    one compiled program, called from a Python loop: inside compiled loops XLA's CPU gradients of convolutions are ten
    times slower.

    Args:
      arch: of all networks.
      x: inputs of the networks.
      y: labels, 0 to outputs - 1.
      keys: [networks].
      tx: the optimizer, of weights alone: no weight decay shrinks a statistic.
      num_epochs: passes over the data.
      batch_size: examples of one step.
      side_by_side: networks computed as one vmapped network, the others in turn; None for all. On CPU 1 is best for
        convolutions, whose gradients XLA computes slowly for a batch of kernels.

    Yields:
      (params of all networks, every array with a leading axis [networks]; each network's mean loss over the epoch).

    Raises:
      ValueError: if examples and labels disagree in number, do not fill one batch, or a label is not of an output.
    """
    if len(x) != len(y) or not 1 <= batch_size <= len(x):
        raise ValueError(
            f"There are {len(x)} examples, {len(y)} labels and batches of {batch_size}; expected as many labels as "
            "examples, and at least one batch of them."
        )
    check_labels(arch, y)
    side_by_side = side_by_side or len(keys)
    groups = [slice(first, first + side_by_side) for first in range(0, len(keys), side_by_side)]
    update = functools.partial(_step, arch, tx)
    # A group of one goes without the batch axis that would stand on every kernel.
    step = jax.jit(jax.vmap(update, (0, None, None, 0)) if side_by_side > 1 else _of_one(update), donate_argnums=0)
    begin = jax.jit(jax.vmap(functools.partial(_begin, arch, tx)))
    states = [begin(keys[group]) for group in groups]
    for epoch in range(num_epochs):
        orders = jax.vmap(lambda key, epoch=epoch: jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(x)))
        batches = orders(keys)[:, : len(x) // batch_size * batch_size].reshape(len(keys), -1, batch_size)
        means = []
        for index, group in enumerate(groups):
            losses = []
            for number in range(batches.shape[1]):
                states[index], loss = step(states[index], x, y, batches[group, number])
                losses.append(loss)
            means.append(jnp.stack(losses).mean(0))
        stacks = [jax.vmap(functools.partial(_join, arch))(weights, kept) for weights, kept, _ in states]
        # Copied, since the next epoch takes the buffers.
        yield jax.tree.map(lambda *parts: jnp.copy(jnp.concatenate(parts)), *stacks), jnp.concatenate(means)


def score(
    arch: Architecture,
    params: Params,
    x: Float[Array, "examples ..."],
    y: Int[Array, " _labels"],
    *,
    batch_size: int = 1000,
) -> Scores:
    """Loss and accuracy of one network, computed `batch_size` examples at a time; `jax.vmap` or `lax.map` for more.

    Raises:
      ValueError: if the network does not fit the architecture, or a label is not of an output.
    """
    check_labels(arch, y)

    def one(row: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = network.apply(arch, params, row[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[1]), logits.argmax() == row[1]

    losses, right = jax.lax.map(one, (x, y), batch_size=min(batch_size, len(x)))
    return Scores(losses.mean(), right.mean())


def check_labels(arch: Architecture, y: Int[Array, " labels"]) -> None:
    """Checks that every label is that of an output, wherever the values are at hand, outside jit and vmap.

    Raises:
      ValueError: if one is not.
    """
    outputs = arch.neuron_layers[-1].width
    if not stacks.is_concrete(y):
        return
    low, high = np.asarray(y).min(), np.asarray(y).max()
    if low < 0 or high >= outputs:
        raise ValueError(f"Labels lie in [{low}, {high}]; {arch.name!r} has outputs 0 to {outputs - 1}.")


# --- private ------------------------------------------------------------------------------------------------------


# Weights, statistics of normalizations, state of the optimizer.
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
    """A step of one network as one of a stack of one."""

    def stacked(state: _State, x: Array, y: Array, rows: Array) -> Any:
        out = step(jax.tree.map(lambda leaf: leaf[0], state), x, y, rows[0])
        return jax.tree.map(lambda leaf: leaf[None], out)

    return stacked


def _split(arch: Architecture, params: Params) -> tuple[list[Array], list[Array]]:
    """What training changes, and the statistics that normalizations keep, in the order of the parameters."""
    pairs = list(zip(arch.parameters, architecture.unpack(arch, params), strict=True))
    stored = [parameter.path[-1] in network.STATISTICS for parameter, _ in pairs]
    weights = [value for (_, value), is_stored in zip(pairs, stored, strict=True) if not is_stored]
    return weights, [value for (_, value), is_stored in zip(pairs, stored, strict=True) if is_stored]


def _join(arch: Architecture, weights: list[Array], statistics: list[Array]) -> dict[str, Any]:
    sources = iter(weights), iter(statistics)
    return architecture.pack(arch, [next(sources[p.path[-1] in network.STATISTICS]) for p in arch.parameters])
