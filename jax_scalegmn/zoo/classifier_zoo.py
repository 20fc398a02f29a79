"""Zoos of classifiers with sampled hyperparameters, all trained at once, with checkpoints along the training.

The hyperparameters are those of the Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448, section 4); the
activation is the architecture's. `small_cnn_zoo.save` writes such zoos in that zoo's own layout.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_scalegmn import distributed, network
from jax_scalegmn.architecture import Architecture, Conv, Dense, Residual, walk
from jax_scalegmn.network import Unit
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import _plain_cnns, _populations, classifiers

__all__ = ["Examples", "Hyperparameters", "fit", "sample"]

OPTIMIZERS = ("adamw", "sgd", "muon")

# Inputs of the networks and their labels.
Examples: TypeAlias = tuple[Float[Array, "_examples ..."], Int[Array, " _examples"]]


class Hyperparameters(NamedTuple):
    """How each network of a zoo is trained: arrays with one entry per network.

    Attributes:
      learning_rate: The learning rate: constant, or the highest where `fit` warms it up or lets it fall.
      weight_decay: The weight decay: added to the gradient with SGD, else decoupled.
      dropout: The dropout rate after the activation of every hidden layer, in [0, 1).
      init_scale: The factor on the initialization, which is `network.standard`.
      train_fraction: The share of the training examples that the network sees, in (0, 1].
      seed: The seed of the network's initialization, examples and dropout.

    >>> from jax_scalegmn.zoo import classifier_zoo
    >>> classifier_zoo.Hyperparameters._fields
    ('learning_rate', 'weight_decay', 'dropout', 'init_scale', 'train_fraction', 'seed')
    """

    learning_rate: Float[Array, "*networks"]
    weight_decay: Float[Array, "*networks"]
    dropout: Float[Array, "*networks"]
    init_scale: Float[Array, "*networks"]
    train_fraction: Float[Array, "*networks"]
    seed: Int[Array, "*networks"]


def sample(
    count: int,
    seed: int,
    *,
    learning_rate: tuple[float, float] = (5e-4, 5e-2),
    weight_decay: tuple[float, float] = (1e-8, 1e-2),
    dropout: tuple[float, float] = (0.0, 0.7),
    init_scale: tuple[float, float] = (0.1, 3.0),
    train_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0),
) -> Hyperparameters:
    """Draws random hyperparameters for the networks of a zoo.

    The defaults are the Small CNN Zoo's ranges (arXiv 2002.11448, appendix A), with a factor on the usual
    initialization in place of its standard deviations.

    Args:
      count: The number of networks.
      seed: The seed of the draws.
      learning_rate: The bounds of the learning rate, drawn log-uniformly.
      weight_decay: The bounds of the weight decay, drawn log-uniformly.
      dropout: The bounds of the dropout rate, drawn uniformly.
      init_scale: The bounds of the factor on the initialization, drawn log-uniformly.
      train_fractions: The shares of the training examples, of which each network gets one.

    Returns:
      The hyperparameters, arrays [count].

    Raises:
      ValueError: If there are no networks, or bounds are outside of the ranges in `Hyperparameters`.

    >>> from jax_scalegmn.zoo import classifier_zoo
    >>> classifier_zoo.sample(5, seed=0).learning_rate.shape
    (5,)
    """
    positive = {"learning_rate": learning_rate, "weight_decay": weight_decay, "init_scale": init_scale}
    for name, (low, high) in positive.items():
        if not 0 < low <= high < np.inf:
            raise ValueError(f"{name} is ({low}, {high}); expected two numbers with 0 < low <= high.")
    if not 0 <= dropout[0] <= dropout[1] < 1:
        raise ValueError(f"dropout is {dropout}; expected two numbers with 0 <= low <= high < 1.")
    if not train_fractions or not all(0 < fraction <= 1 for fraction in train_fractions):
        raise ValueError(f"train_fractions are {train_fractions}; expected numbers in (0, 1].")
    if count < 1:
        raise ValueError(f"count is {count}; expected a number of networks >= 1.")
    rng = np.random.default_rng(seed)
    drawn = {name: np.exp(rng.uniform(math.log(low), math.log(high), count)) for name, (low, high) in positive.items()}
    drawn["dropout"] = rng.uniform(dropout[0], dropout[1], count)
    drawn["train_fraction"] = rng.choice(train_fractions, count)
    arrays = {name: jnp.asarray(values, jnp.float32) for name, values in drawn.items()}
    return Hyperparameters(**arrays, seed=jnp.asarray(rng.integers(0, 2**31, count), jnp.int32))


def fit(
    arch: Architecture,
    examples: Examples,
    hyperparameters: Hyperparameters,
    *,
    checkpoints: tuple[int, ...],
    batch_size: int = 64,
    evaluations: Mapping[str, Examples] | None = None,
    scored_examples: int = 1000,
    warmup_steps: int = 0,
    cosine: bool = False,
    mirrored: bool = False,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    networks_at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> _populations.Zoo:
    """Trains one classifier per row of hyperparameters, all in one compiled program, and keeps every checkpoint.

    Every step is one update on the cross-entropy of a batch, which is drawn with replacement from the examples that the
    network sees. All networks make the same number of steps.

    Args:
      arch: The architecture of all networks, without batch normalization.
      examples: The training set: inputs as `network.apply` takes them, [examples, ...], and labels [examples].
      hyperparameters: How each network is trained, arrays [networks].
      checkpoints: The numbers of updates after which every network is kept, increasing; the last ends the training.
        0 keeps the initialization.
      batch_size: The examples of one update.
      evaluations: Further examples on which every checkpoint is scored, like {"test": (x, y)}.
      scored_examples: The largest number of training examples on which a checkpoint is scored.
      warmup_steps: The number of updates over which the learning rate rises to its value.
      cosine: Whether the learning rate falls to 0 along a cosine until the last checkpoint.
      mirrored: Whether every image of a batch is mirrored, left to right, with probability 1/2.
      optimizer: "adamw"; "sgd" with Nesterov momentum; or "muon" (Jordan 2024), whose steps are orthogonal matrices:
        it moves the kernels of all layers but the last, and Adam the rest. Small CNNs, those with tanh above all, learn
        fastest with it.
      momentum: The momentum of "sgd" and "muon", in [0, 1).
      networks_at_once: The networks that are trained as one vmapped network; the others follow in the same program.
        None for 1 on a CPU, where more are slower (`python -m benchmarks.cnn`), and 64 on an accelerator.
      progress: A function that is called with the number of networks that have become ready.
      mesh: Devices over which the networks are shared out, as in `zoo.fit`.

    Returns:
      The zoo: one network per checkpoint and row of hyperparameters, the checkpoints of a row after each other. Its
      records are the hyperparameters, model (the row), step (the checkpoint), train_loss, train_accuracy, and for every
      evaluation {name}_loss and {name}_accuracy; losses in nats, accuracies in [0, 1]. Rows with a NaN or infinity at
      any checkpoint are left out; the setting left_out is their number.

    Raises:
      ValueError: If examples and labels do not fit each other or the architecture, on checkpoints that do not increase,
        if vectors are to be mirrored, on an unknown optimizer, on a momentum outside of [0, 1), or if all networks
        diverged.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.zoo import classifier_zoo
    >>> x, y = jnp.linspace(-1, 1, 20).reshape(10, 2), jnp.arange(10) % 2
    >>> hyperparameters = classifier_zoo.sample(3, seed=0)
    >>> zoo = classifier_zoo.fit(sg.mlp((2, 4, 2)), (x, y), hyperparameters, checkpoints=(0, 5), batch_size=4)
    >>> len(zoo), zoo.records["step"].tolist()
    (6, [0, 5, 0, 5, 0, 5])
    """
    evaluations = dict(evaluations or {})
    if "train" in evaluations:
        raise ValueError("evaluations has the name 'train'; expected other names: the training set is always scored.")
    scored = {"train": examples, **evaluations}
    _check_examples(arch, scored)
    if not checkpoints or checkpoints[0] < 0 or any(b <= a for a, b in itertools.pairwise(checkpoints)):
        raise ValueError(f"checkpoints are {checkpoints}; expected increasing numbers of updates >= 0, like (50, 100).")
    if batch_size < 1 or scored_examples < 1:
        raise ValueError(f"batch_size is {batch_size}, scored_examples {scored_examples}; expected numbers >= 1.")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; expected a number of updates >= 0.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}; expected one of {list(OPTIMIZERS)}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1), like 0.9.")
    if mirrored and arch.input_rank != 3:
        raise ValueError(f"mirrored is set, and {arch.name!r} reads vectors; expected a network of images.")
    if networks_at_once is None:
        networks_at_once = 1 if jax.default_backend() == "cpu" else 64
    rows, shared = jax.tree.map(jnp.asarray, (hyperparameters, scored))
    keys = jax.vmap(jax.random.key)(rows.seed)
    # Not in the compiled program: random numbers are what takes longest to compile.
    starts = jax.vmap(functools.partial(_scaled_initialization, arch))(keys, rows.init_scale)
    dropped = bool(np.any(np.asarray(rows.dropout) > 0))
    recipe = _Recipe(batch_size, warmup_steps, cosine, mirrored, optimizer, momentum, dropped)
    training = _Training(arch, checkpoints, scored_examples, recipe)
    params, scores = _populations.fit_each(
        training.run, (rows, keys, starts), shared, networks_at_once=networks_at_once, progress=progress, mesh=mesh
    )
    return _finite_zoo(training, hyperparameters, params, scores, mesh)


# --- private ------------------------------------------------------------------------------------------------------


def _check_examples(arch: Architecture, scored: Mapping[str, Examples]) -> None:
    for name, (x, y) in scored.items():
        network.check_examples(arch, x, name=f"x of {name}")
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} examples and {len(y)} labels; expected a label for each example.")
        classifiers.check_labels(arch, y)
    if any(parameter.path[-1] in network.STATISTICS for parameter in arch.parameters):
        raise ValueError(f"{arch.name!r} has statistics of batch normalizations; train it with classifiers.fit.")


def _scaled_initialization(arch: Architecture, key: Key, scale: Array) -> Params:
    params: Params = jax.tree.map(lambda leaf: leaf * scale, network.init(arch, key))
    return params


class _Recipe(NamedTuple):
    """How all networks are updated; `dropped` where any of them has a dropout."""

    batch_size: int
    warmup_steps: int
    cosine: bool
    mirrored: bool
    optimizer: str
    momentum: float
    dropped: bool

    def transformation(self, arch: Architecture, row: Hyperparameters, steps: int) -> optax.GradientTransformation:
        """The optimizer of one network, for this number of updates."""
        rate = self._rate(row.learning_rate, steps)
        match self.optimizer:
            case "adamw":
                return optax.adamw(rate, weight_decay=row.weight_decay)
            case "sgd":
                sgd = optax.sgd(rate, momentum=self.momentum, nesterov=True)
                return optax.chain(optax.add_decayed_weights(row.weight_decay), sgd)
        return optax.contrib.muon(
            rate,
            beta=self.momentum,
            weight_decay=row.weight_decay,
            adam_weight_decay=row.weight_decay,
            muon_weight_dimension_numbers=functools.partial(_as_matrices, arch),
        )

    def _rate(self, highest: Array, steps: int) -> Callable[[Array], Array]:
        """The learning rate by the number of updates so far."""

        def at(count: Array) -> Array:
            rate = highest * jnp.minimum(1, (count + 1) / self.warmup_steps) if self.warmup_steps else highest
            return rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2 if self.cosine else rate

        return at


def _as_matrices(arch: Architecture, params: Params) -> Params:
    """For Muon: the input and output axes of every kernel but the last layer's; None for all other arrays."""
    *hidden, _ = ((*path, layer.name, "kernel") for path, layer in walk(arch.layers) if isinstance(layer, Conv | Dense))

    def axes(path: tuple[jax.tree_util.DictKey, ...], array: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if tuple(key.key for key in path) not in hidden:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(array.ndim - 1)), array.ndim - 1)

    specs: Params = jax.tree_util.tree_map_with_path(axes, params)
    return specs


class _Training(NamedTuple):
    """The training of one network, and what all networks have in common."""

    arch: Architecture
    checkpoints: tuple[int, ...]
    scored_examples: int
    recipe: _Recipe

    def run(
        self, row: Hyperparameters, key: Key, start: Params, scored: Mapping[str, Examples]
    ) -> tuple[Params, dict[str, Array]]:
        """The network's params and scores, every array [checkpoints, ...]."""
        count = len(scored["train"][1])
        order_key, step_key = jax.random.split(jax.random.fold_in(key, 1))
        order = jax.random.permutation(order_key, count)
        num_seen = jnp.maximum(1, jnp.round(row.train_fraction * count).astype(int))
        step, opt_state = self._step(row, step_key, start, scored["train"], order, num_seen)

        def until(state: Any, ends: Array) -> tuple[Any, Params]:
            state = jax.lax.fori_loop(ends[0], ends[1], step, state)
            return state, state[0]

        ends = jnp.asarray([*zip((0, *self.checkpoints), self.checkpoints, strict=False)])
        _, stack = jax.lax.scan(until, (start, opt_state), ends)
        return stack, jax.lax.map(lambda params: self._scores(params, scored, order, num_seen), stack)

    def _step(
        self, row: Hyperparameters, key: Key, start: Params, train: Examples, order: Array, num_seen: Array
    ) -> tuple[Callable[[Array, Any], Any], Any]:
        """One update, (its number, (params, optimizer state)) -> the next ones, and the first optimizer state."""
        recipe, (x, y) = self.recipe, train
        tx = recipe.transformation(self.arch, row, self.checkpoints[-1])
        hidden = jax.eval_shape(functools.partial(_hidden_outputs, self.arch), start, x[0])  # refuses small images
        num_draws = sum(math.prod(value.shape) for value in hidden) if recipe.dropped else 0

        def loss_fn(params: Params, batch: Array, labels: Array, noise: Array) -> Array:
            if not recipe.dropped and _plain_cnns.is_plain(self.arch):
                outputs = _plain_cnns.logits(self.arch, params, batch)
            else:
                apply = functools.partial(_apply_with_dropout, self.arch, params, rate=row.dropout)
                outputs = jax.vmap(lambda x, noise: apply(x=x, noise=noise))(batch, noise)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

        def step(number: Array, state: Any) -> Any:
            params, opt_state = state
            row_key, drop_key = jax.random.split(jax.random.fold_in(key, number))
            rows = order[jax.random.randint(row_key, (recipe.batch_size,), 0, num_seen)]
            noise = jax.random.uniform(drop_key, (recipe.batch_size, num_draws))
            batch = _mirrored(x[rows], jax.random.fold_in(drop_key, 1)) if recipe.mirrored else x[rows]
            gradient = jax.grad(loss_fn)(params, batch, y[rows], noise)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step, tx.init(start)

    def _scores(
        self, params: Params, scored: Mapping[str, Examples], order: Array, num_seen: Array
    ) -> dict[str, Array]:
        """Loss and accuracy on every set of examples; of the training set, on those that the network sees."""
        own = order[: self.scored_examples]
        x, y = scored["train"]
        weighted = {name: (*examples, jnp.ones(len(examples[1]))) for name, examples in scored.items()}
        weighted["train"] = (x[own], y[own], (jnp.arange(len(own)) < num_seen).astype(float))
        scores = {}
        for name, (x, y, weights) in weighted.items():
            losses, hits = classifiers.losses_and_hits(
                self.arch, params, x, y, batch_size=100, convolve=network.convolve_by_patches
            )
            scores[f"{name}_loss"] = (losses * weights).sum() / weights.sum()
            scores[f"{name}_accuracy"] = (hits * weights).sum() / weights.sum()
        return scores


def _hidden_outputs(arch: Architecture, params: Params, x: Array) -> tuple[Array, ...]:
    """What dropout acts on in one example: the output of every layer with an activation."""

    def visit(
        path: tuple[str, ...], layer: Unit | Residual, params: Params, x: Array, outputs: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        y = network.layer_output(layer, params, x)
        return y, outputs if layer.activation is None else (*outputs, y)

    none: tuple[Array, ...] = ()
    return network.forward(arch, params, x, visit, none)[1]


def _apply_with_dropout(arch: Architecture, params: Params, x: Array, rate: Array, noise: Array) -> Array:
    """The logits of one example with inverted dropout after every activation (Srivastava et al. 2014, JMLR 15).

    Args:
      arch: The architecture.
      params: The network.
      x: The example.
      rate: The share of the values that are dropped.
      noise: Uniform numbers in [0, 1), one for every value in `_hidden_outputs`.
    """

    def visit(
        path: tuple[str, ...], layer: Unit | Residual, params: Params, x: Array, noise: Array
    ) -> tuple[Array, Array]:
        y = network.layer_output(layer, params, x, convolve=network.convolve_by_patches)
        if layer.activation is None or not noise.size:
            return y, noise
        keep = noise[: y.size].reshape(y.shape) >= rate
        return jnp.where(keep, y / (1 - rate), 0), noise[y.size :]

    return network.forward(arch, params, x, visit, noise)[0]


def _mirrored(images: Array, key: Key) -> Array:
    """Images [images, height, width, channels], each with probability 1/2 mirrored."""
    chosen = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def _finite_zoo(
    training: _Training,
    hyperparameters: Hyperparameters,
    params: Params,
    scores: Mapping[str, np.ndarray],
    mesh: Mesh | None,
) -> _populations.Zoo:
    """The zoo of arrays [networks, checkpoints, ...], without the networks with a NaN or infinity."""
    steps = training.checkpoints
    count = len(hyperparameters.seed)
    finite = np.all(
        [np.isfinite(np.asarray(leaf)).reshape(count, -1).all(1) for leaf in jax.tree.leaves((params, dict(scores)))], 0
    )
    if not finite.any():
        raise ValueError(f"All {count} networks diverged (NaN or infinite). Lower the learning rates.")
    rows = np.repeat(finite, len(steps))
    records = {name: np.repeat(np.asarray(values), len(steps)) for name, values in hyperparameters._asdict().items()}
    records |= {"model": np.repeat(np.arange(count), len(steps)), "step": np.tile(steps, count)}
    records |= {name: np.asarray(values).reshape(len(rows)) for name, values in scores.items()}
    kept = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(len(rows), *leaf.shape[2:])[rows], params)
    kept = distributed.place_rows(kept, mesh)
    recipe = {name: value for name, value in training.recipe._asdict().items() if name != "dropped"}
    settings = {**recipe, "left_out": int((~finite).sum())}
    return _populations.Zoo(training.arch, kept, {name: values[rows] for name, values in records.items()}, settings)
