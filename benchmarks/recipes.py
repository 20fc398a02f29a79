"""Time to quality: the digits autoencoder trained by several recipes, its error against seconds of computing.

python -m benchmarks.recipes --zoo runs/digits/zoo                         # every recipe, one JSON line each
python -m benchmarks.recipes --zoo runs/digits/zoo --only baseline muon    # two of them
python -m benchmarks.recipes --zoo runs/digits/zoo --epochs 32             # as long as the published training

All recipes see the same INRs, in an order of the same seed. Seconds are those of gradients and updates alone, without
compilation and evaluation. Choose by the error on the selection networks, and quote the one on the scoring networks.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tyro

from experiments import autoencoders, inr, inr_zoo
from experiments.moves import MoveConfig, move
from experiments.runs import environment
from jax_scalegmn import models, network
from jax_scalegmn.training import losses
from jax_scalegmn.types import LossFn, Params
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; the default is the one with which the results of the first versions were measured."""

    optimizer: Literal["adamw", "muon", "schedule_free"] = "adamw"
    """AdamW; Muon for matrices with AdamW for the rest; or schedule-free AdamW, which has no decay."""
    learning_rate: float = 8e-3
    """The learning rate after the warm-up."""
    adam_ratio: float = 0.4
    """With Muon: the learning rate of AdamW, in units of Muon's."""
    b2: float = 0.999
    """The decay of AdamW's second moments."""
    weight_decay: float = 0.01
    """The weight decay."""
    warmup: float = 0.072
    """The share of the training in which the learning rate rises."""
    decay: Literal["cosine", "linear", "none"] = "cosine"
    """How the learning rate falls to 0."""
    batch_sizes: tuple[int, ...] = (64,)
    """Batch sizes, each for an equal share of the training."""
    ema: float | None = None
    """The decay of a running mean of the weights, which is then what is evaluated."""
    first_networks: int | None = None
    """The number of networks that the first half of the training sees; None for all."""
    orbit_weight: float = 0.3
    """The weight of the orbit-distance term, in units of the images' variance."""
    features: int = 32
    """The number of features of the autoencoder."""
    num_layers: int = 3
    """The number of message passing layers."""
    dtype: Literal["bfloat16"] | None = None
    """The dtype of features and products."""
    turn: float = 0.0
    """The standard deviation of random turns of the images, in degrees, by the weights of the first layer."""
    shift: float = 0.0
    """The standard deviation of random shifts of the images; they are 2 wide and high."""
    stretch: float = 0.0
    """The standard deviation of random changes of the images' size and shape."""


RECIPES = {
    "baseline": Recipe(),
    "rate 4e-3": Recipe(learning_rate=4e-3),
    "rate 16e-3": Recipe(learning_rate=16e-3),
    "linear decay": Recipe(decay="linear"),
    "constant rate": Recipe(decay="none"),
    "constant rate, mean of weights": Recipe(decay="none", ema=0.99),
    "mean of weights": Recipe(ema=0.99),
    "faster second moments": Recipe(b2=0.98),
    "batches of 32": Recipe(batch_sizes=(32,), learning_rate=6e-3),
    "batches of 16": Recipe(batch_sizes=(16,), learning_rate=4e-3),
    "growing batches": Recipe(batch_sizes=(16, 32, 64)),
    "muon": Recipe("muon", 2e-2),
    "muon, batches of 32": Recipe("muon", 2e-2, batch_sizes=(32,)),
    "moved images": Recipe(turn=8.0, shift=0.08, stretch=0.08),
    "muon, moved images": Recipe("muon", 2e-2, batch_sizes=(32,), turn=8.0, shift=0.08, stretch=0.08),
    "muon, images moved less": Recipe("muon", 2e-2, batch_sizes=(32,), turn=4.0, shift=0.04, stretch=0.04),
    "muon, images moved less, rate 8e-3": Recipe("muon", batch_sizes=(32,), turn=4.0, shift=0.04, stretch=0.04),
    "schedule-free": Recipe("schedule_free", 8e-3, decay="none"),
    "fewer networks first": Recipe(first_networks=1400),
    "bfloat16": Recipe(dtype="bfloat16"),
    "two layers": Recipe(num_layers=2),
    "no orbit-distance term": Recipe(orbit_weight=0.0),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    zoo: Path
    """The folder "zoo" of a run of experiments.inr digits."""
    only: tuple[str, ...] = ()
    """The names of recipes; none for all."""
    epochs: float = 8.0
    """The length of a training, in passes over the networks."""
    points: int = 4
    """The number of evaluations."""
    micro_batch: int = 16
    """The number of networks differentiated at a time."""
    seed: int = 0
    """The seed of the variables and of the order."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints one JSON line for each recipe, and returns them."""
    unknown = sorted(set(config.only) - set(RECIPES))
    if unknown:
        raise ValueError(f"only names {unknown}; expected names out of {sorted(RECIPES)}.")
    zoos = inr_zoo.read(config.zoo, inr_zoo.ZooConfig(), config.seed)
    rows = []
    for name in config.only or RECIPES:
        rows.append(measure(config, name, RECIPES[name], zoos) | {"environment": environment()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(config: Config, name: str, recipe: Recipe, zoos: dict[str, Zoo]) -> dict[str, Any]:
    """Trains by a recipe: shares of the variance after some seconds on selection, scoring and 512 training networks."""
    job = _job(recipe, zoos)
    tx = _optimizer(recipe)
    update = jax.jit(functools.partial(_update, tx))
    variables = job.init(jax.random.key(config.seed))
    state, mean = tx.init(variables), variables
    sizes = _sizes(recipe, config, len(zoos["train"]))
    marks = {round(at) for at in np.linspace(0, len(sizes), config.points + 1)[1:]}
    cpu = wall = seen = 0.0
    curve = []
    for number, rows in enumerate(_batches(recipe, sizes, len(zoos["train"]), config.seed)):
        start, start_cpu = time.perf_counter(), time.process_time()
        gradient = job.gradient(variables, rows, number, config.micro_batch)
        seen += len(rows)
        rate = _rate(recipe, number, seen / sum(sizes), len(sizes))
        variables, state = update(variables, state, gradient, rate)
        if recipe.ema is not None:
            decay = min(recipe.ema, (1 + number) / (10 + number))
            mean = _mean(mean, variables, decay)
        jax.block_until_ready(variables)
        if number:  # the first one compiles
            cpu, wall = cpu + time.process_time() - start_cpu, wall + time.perf_counter() - start
        if number + 1 in marks:
            evaluated = mean if recipe.ema is not None else variables
            if recipe.optimizer == "schedule_free":
                evaluated = optax.contrib.schedule_free_eval_params(state[-1], variables)  # after clipping
            curve.append({"networks": int(seen), "cpu_s": cpu, "wall_s": wall} | job.errors(evaluated))
    return {
        "label": name,
        "recipe": dataclasses.asdict(recipe),
        "epochs": config.epochs,
        "seed": config.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables)),
        "curve": curve,
    }


# --- private ------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """The model of a recipe."""

    init: Callable[[Any], Any]
    gradient: Callable[..., Any]
    errors: Callable[[Any], dict[str, float]]


def _job(recipe: Recipe, zoos: dict[str, Zoo]) -> _Job:
    arch, size = zoos["train"].arch, (8, 8)
    config = autoencoders.ModelConfig(recipe.features, recipe.num_layers, dtype=recipe.dtype)
    model = autoencoders.make_model(config, zoos["train"])
    draw = inr.make_draw(arch, size)
    variance = float(draw(zoos["train"].params).var())
    loss = losses.inr_reconstruction(model, size=size, orbit_weight=recipe.orbit_weight * variance)

    def gap(variables: Any, params: Params) -> Any:
        decoded = model.apply(variables, params)
        return jnp.square(network.render(arch, decoded, size) - network.render(arch, params, size)).mean()

    gaps = jax.jit(lambda variables, stack: jax.lax.map(lambda one: gap(variables, one), stack, batch_size=16))
    splits = {name: _first_fits(zoos[name]) for name in ("selection", "scoring")}
    splits["train"] = jax.tree.map(lambda leaf: leaf[:512], zoos["train"].params)

    def errors(variables: Any) -> dict[str, float]:
        return {name: float(gaps(variables, stack).mean()) / variance for name, stack in splits.items()}

    example = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), zoos["train"].params)
    return _Job(lambda key: models.init(model, key, example), _make_gradient(recipe, loss, zoos["train"]), errors)


def _make_gradient(recipe: Recipe, loss: LossFn, networks: Zoo) -> Callable[..., Any]:
    """(variables, rows, number, micro_batch) -> the gradient of the mean loss of these networks at a step."""
    moves = MoveConfig(recipe.turn, recipe.shift, recipe.stretch)

    def mean_loss(variables: Any, rows: Params, key: Any) -> Any:
        each = jax.vmap(loss, (None, 0, 0))(variables, rows, jax.random.split(key, len(jax.tree.leaves(rows)[0])))
        return each[0].mean()

    data = jax.tree.map(jnp.asarray, networks.params)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Any, variables: Any, rows: Any, share: Any, key: Any) -> Any:
        few = jax.tree.map(lambda leaf: leaf[rows], data)
        if moves:
            few = jax.vmap(functools.partial(move, moves, networks.arch))(few, jax.random.split(key, len(rows)))
        part = jax.grad(mean_loss)(variables, few, jax.random.key(0))
        return jax.tree.map(lambda sum_, leaf: sum_ + share * leaf, total, part)

    zeros = jax.jit(lambda variables: jax.tree.map(jnp.zeros_like, variables))

    def gradient(variables: Any, rows: np.ndarray, number: int, micro_batch: int) -> Any:
        total = zeros(variables)
        for part, few in enumerate(rows.reshape(-1, min(micro_batch, len(rows)))):
            key = jax.random.fold_in(jax.random.key(number), part)
            total = add(total, variables, few, np.float32(len(few) / len(rows)), key)
        return total

    return gradient


def _first_fits(networks: Zoo) -> Params:
    rows = inr_zoo.pair_rows(networks)
    assert rows is not None  # selection and scoring images have two fits
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows[0]], networks.params)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer at rate 1, to be scaled by the schedule; the schedule-free one knows its rate itself."""
    clip = optax.clip_by_global_norm(10.0)
    if recipe.optimizer == "schedule_free":
        rate = optax.linear_schedule(0.0, recipe.learning_rate, 100)
        return optax.chain(
            clip, optax.contrib.schedule_free_adamw(rate, b2=recipe.b2, weight_decay=recipe.weight_decay)
        )
    if recipe.optimizer == "muon":
        muon = optax.contrib.muon(
            1.0, weight_decay=recipe.weight_decay, adam_b2=recipe.b2, adam_learning_rate=recipe.adam_ratio
        )
        return optax.chain(clip, muon)
    return optax.chain(clip, optax.adamw(1.0, b2=recipe.b2, weight_decay=recipe.weight_decay))


def _update(tx: optax.GradientTransformation, variables: Any, state: Any, gradient: Any, rate: Any) -> Any:
    updates, state = tx.update(gradient, state, variables)
    return optax.apply_updates(variables, jax.tree.map(lambda update: rate * update, updates)), state


@jax.jit
def _mean(mean: Any, variables: Any, decay: Any) -> Any:
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, mean, variables)


def _rate(recipe: Recipe, number: int, share: float, steps: int) -> float:
    """The learning rate of a step, at a share of the training."""
    if recipe.optimizer == "schedule_free":
        return 1.0
    rise = min(1.0, (number + 1) / max(1.0, recipe.warmup * steps))
    left = min(1.0, (1 - share) / (1 - recipe.warmup))
    fall = {"cosine": 0.5 - 0.5 * np.cos(np.pi * left), "linear": left, "none": 1.0}[recipe.decay]
    return float(recipe.learning_rate * rise * fall)


def _sizes(recipe: Recipe, config: Config, networks: int) -> list[int]:
    """The batch size of every step."""
    share = config.epochs * networks / len(recipe.batch_sizes)
    return [size for size in recipe.batch_sizes for _ in range(max(1, round(share / size)))]


def _batches(recipe: Recipe, sizes: list[int], networks: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of every step, in orders without repetition."""
    random = np.random.default_rng(seed)
    total, seen = sum(sizes), 0
    left = np.zeros(0, int)
    for size in sizes:
        few = recipe.first_networks is not None and seen < total / 2
        if len(left) < size:
            left = random.permutation(recipe.first_networks if few else networks)
        rows, left = left[:size], left[size:]
        seen += size
        yield rows


if __name__ == "__main__":
    main(tyro.cli(Config))
