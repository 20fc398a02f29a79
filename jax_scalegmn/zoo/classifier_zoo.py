"""Zoos of classifiers over sampled hyper-parameters, all trained at once, with checkpoints along the training.

The hyper-parameters are those of the Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448, section 4); the
activation is the architecture's. `small_cnn_zoo.save` writes such zoos in that zoo's own layout.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jax_scalegmn import network
from jax_scalegmn.architecture import Architecture, Residual
from jax_scalegmn.network import Unit
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import _populations, classifiers

__all__ = ["Examples", "Recipes", "fit", "sample"]

# Inputs of the networks and their labels.
Examples: TypeAlias = tuple[Float[Array, "_examples ..."], Int[Array, " _examples"]]


class Recipes(NamedTuple):
    """How each network of a zoo is trained.

    Attributes:
      learning_rate: of Adam, constant.
      weight_decay: decoupled (AdamW).
      dropout: the rate behind every hidden layer's activation, in [0, 1).
      init_scale: a factor on the initialization, `network.standard`.
      train_fraction: the share of the training examples that the network sees, in (0, 1].
      seed: of its initialization, its examples and its dropout.
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
) -> Recipes:
    """Random recipes: dropout uniform, fractions one of those given, the others log-uniform between their bounds.

    The defaults are the Small CNN Zoo's ranges (arXiv 2002.11448, appendix A), with a factor on the usual
    initialization in the place of its standard deviations.

    Raises:
      ValueError: if there are no networks, or bounds lie outside of what `Recipes` says.
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
    rows = {name: jnp.asarray(values, jnp.float32) for name, values in drawn.items()}
    return Recipes(**rows, seed=jnp.asarray(rng.integers(0, 2**31, count), jnp.int32))


def fit(
    arch: Architecture,
    examples: Examples,
    recipes: Recipes,
    *,
    checkpoints: tuple[int, ...],
    batch_size: int = 64,
    evaluations: Mapping[str, Examples] | None = None,
    scored_examples: int = 1000,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> _populations.Zoo:
    """Trains one classifier for every recipe, all in one compiled program, and keeps each at every checkpoint.

    Every step is one update of AdamW on the cross-entropy of a batch drawn, with replacement, from the examples that
    the network sees; all networks make the same number of them.

    Args:
      arch: of all networks, without batch normalization.
      examples: what they are trained on: inputs as `network.apply` takes them, [examples, ...], and labels.
      recipes: of the networks.
      checkpoints: the numbers of updates behind which the networks are kept, increasing; the last ends the training.
        0 keeps them as initialized.
      batch_size: examples of one update.
      evaluations: further examples on which every checkpoint is scored, like {"test": (x, y)}.
      scored_examples: at most so many of the examples that a network sees score its training.
      chunk: networks trained side by side, inside the one program; None for 1 on a CPU, where more are slower
        (`python -m benchmarks.cnn`), and 64 on an accelerator.
      progress: called with the number of networks that each finished chunk adds.

    Returns:
      The zoo, one network for each checkpoint of each recipe, a recipe's own one behind another. Its records are
      the recipes', model (the row of the recipe), step, train_loss, train_accuracy and for every evaluation its
      {name}_loss and {name}_accuracy; losses in nats, accuracies in [0, 1]. Recipes that diverged (a NaN or infinity
      at any checkpoint) are left out; the settings tell their number, left_out.

    Raises:
      ValueError: if examples and labels do not fit each other or the architecture, on checkpoints that do not
        increase, or if no recipe is left.
    """
    scored = {"train": examples, **(evaluations or {})}
    if len(scored) != 1 + len(evaluations or {}):
        raise ValueError("evaluations has the name 'train'; expected other names: the training is scored by itself.")
    for name, (x, y) in scored.items():
        network.check_examples(arch, x, name=f"x of {name}")
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} examples and {len(y)} labels; expected as many of both.")
        classifiers.check_labels(arch, y)
    if any(parameter.path[-1] in network.STATISTICS for parameter in arch.parameters):
        raise ValueError(f"{arch.name!r} keeps statistics of batch normalizations; train it with classifiers.fit.")
    if not checkpoints or checkpoints[0] < 0 or any(b <= a for a, b in itertools.pairwise(checkpoints)):
        raise ValueError(f"checkpoints are {checkpoints}; expected increasing numbers of updates >= 0, like (50, 100).")
    if batch_size < 1 or scored_examples < 1:
        raise ValueError(f"batch_size is {batch_size}, scored_examples {scored_examples}; expected numbers >= 1.")
    if chunk is None:
        chunk = 1 if jax.default_backend() == "cpu" else 64
    count = len(recipes.seed)
    rows, shared = jax.tree.map(jnp.asarray, (recipes, scored))
    keys = jax.vmap(jax.random.key)(rows.seed)
    # Outside of the compiled program: random numbers are what takes longest to compile.
    starts = jax.vmap(lambda key, scale: jax.tree.map(lambda leaf: leaf * scale, network.init(arch, key)))(
        keys, rows.init_scale
    )
    training = _Training(arch, checkpoints, batch_size, scored_examples)
    params, scores = _populations.fit_each(training.run, (rows, keys, starts), shared, chunk=chunk, progress=progress)

    every = range(count * len(checkpoints))
    records = {name: np.repeat(np.asarray(values), len(checkpoints)) for name, values in recipes._asdict().items()}
    records |= {"model": np.repeat(np.arange(count), len(checkpoints)), "step": np.tile(checkpoints, count)}
    records |= {name: np.asarray(values).reshape(len(every)) for name, values in scores.items()}
    params = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(len(every), *leaf.shape[2:]), params)
    arrays = [*jax.tree.leaves(params), *(records[name] for name in scores)]
    finite = np.all([np.isfinite(a).reshape(count, -1).all(1) for a in arrays], 0)
    if not finite.any():
        raise ValueError(f"All {count} networks diverged (NaN or infinite). Lower the learning rates.")
    rows = np.repeat(finite, len(checkpoints))
    settings = {"batch_size": batch_size, "optimizer": "adamw", "left_out": int((~finite).sum())}
    kept = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), params)
    return _populations.Zoo(arch, kept, {name: values[rows] for name, values in records.items()}, settings)


# --- private ------------------------------------------------------------------------------------------------------


class _Training(NamedTuple):
    """The training of one network."""

    arch: Architecture
    checkpoints: tuple[int, ...]
    batch_size: int
    scored_examples: int

    def run(
        self, recipe: Recipes, key: Key, start: Params, scored: Mapping[str, Examples]
    ) -> tuple[Params, dict[str, Array]]:
        """Its params and scores, every array [checkpoints, ...]."""
        x, y = scored["train"]
        order_key, step_key = jax.random.split(jax.random.fold_in(key, 1))
        order = jax.random.permutation(order_key, len(x))
        seen = jnp.maximum(1, jnp.round(recipe.train_fraction * len(x)).astype(int))
        tx = optax.adamw(recipe.learning_rate, weight_decay=recipe.weight_decay)
        counted = _Dropout(recipe.dropout, None)
        jax.eval_shape(lambda params, x: network.apply_with(self.arch, params, x, counted), start, x[0])

        def loss_fn(params: Params, rows: Array, noise: Array) -> Array:
            logits = jax.vmap(
                lambda x, noise: network.apply_with(self.arch, params, x, _Dropout(recipe.dropout, noise))
            )(x[rows], noise)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        def step(number: Array, state: Any) -> Any:
            params, opt_state = state
            row_key, drop_key = jax.random.split(jax.random.fold_in(step_key, number))
            rows = order[jax.random.randint(row_key, (self.batch_size,), 0, seen)]
            noise = jax.random.uniform(drop_key, (self.batch_size, counted.used))
            gradient = jax.grad(loss_fn)(params, rows, noise)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def stretch(state: Any, ends: Array) -> tuple[Any, Params]:
            state = jax.lax.fori_loop(ends[0], ends[1], step, state)
            return state, state[0]

        stretches = jnp.asarray([*zip((0, *self.checkpoints), self.checkpoints, strict=False)])
        _, stack = jax.lax.scan(stretch, (start, tx.init(start)), stretches)

        def score(params: Params) -> dict[str, Array]:
            own = order[: self.scored_examples]
            sets = {name: (*values, jnp.ones(len(values[1]))) for name, values in scored.items()}
            sets["train"] = (x[own], y[own], (jnp.arange(len(own)) < seen).astype(float))
            found = {}
            for name, rows in sets.items():
                found[f"{name}_loss"], found[f"{name}_accuracy"] = self._score(params, *rows)
            return found

        return stack, jax.lax.map(score, stack)

    def _score(self, params: Params, x: Array, y: Array, weights: Array) -> tuple[Array, Array]:
        """Loss and accuracy, means by the weights."""

        def one(row: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = network.apply_with(self.arch, params, row[0], network.ByPatches())
            return optax.softmax_cross_entropy_with_integer_labels(logits, row[1]), logits.argmax() == row[1]

        losses, right = jax.lax.map(one, (x, y), batch_size=min(100, len(x)))
        return (losses * weights).sum() / weights.sum(), (right * weights).sum() / weights.sum()


class _Dropout(network.ByPatches):
    """Inverted dropout behind every hidden activation (Srivastava et al. 2014, JMLR 15), by patches.

    Attributes:
      rate: of the entries that are dropped.
      noise: uniform in [0, 1), one for every hidden activation of one example; None to count them only.
      used: of the noise.
    """

    def __init__(self, rate: Array, noise: Array | None) -> None:
        self.rate, self.noise, self.used = rate, noise, 0

    def behind(self, path: tuple[str, ...], layer: Unit | Residual, x: Array) -> Array:
        if layer.activation is None:
            return x
        first, self.used = self.used, self.used + x.size
        if self.noise is None:
            return x
        keep = self.noise[first : self.used].reshape(x.shape) >= self.rate
        return jnp.where(keep, x / (1 - self.rate), 0)
