"""Search matching on digits: INRs fitted twice, and classifiers, merged by search and by weights; and what it costs.

    python -m benchmarks.search                  # prints one JSON line for every row
    python -m benchmarks.search --jobs cost      # what a sweep costs, over width, inputs and pairs
    python -m benchmarks.search --help

The INRs are those of `python -m experiments.inr digits`: its settings, and two fits of each of the first scoring
images, to which all errors are taken. The classifiers and the settings of their search are those of
`python -m experiments.merging digits`; they are searched on training images and scored on test images. Pairs are
aligned one after the other in one compiled program, whose time is CPU time.

The cost of a sweep does not depend on what networks have learned: it is measured on untrained perceptrons and INRs,
without the start of the search. Memory is what the compiled program needs for its temporary arrays.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import inr_zoo, merging, progress, runs
from experiments.inr_zoo import ZooConfig
from experiments.merging import MatchConfig, TrainConfig
from jax_scalegmn import architecture, matching, merge, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import Matching
from jax_scalegmn.types import Params
from jax_scalegmn.zoo import Zoo, classifiers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    jobs: tuple[Literal["inr", "classifier", "cost"], ...] = ("inr", "classifier", "cost")
    """Which rows."""
    zoo: ZooConfig = dataclasses.field(default_factory=ZooConfig)
    """The INRs; of their images only those of scoring are fitted."""
    inr_pairs: int = 60
    """The number of pairs of INRs."""
    classifiers: tuple[str, ...] = ("mlp:64-32-32-10,relu",)
    """The architectures of the classifiers; N networks of the first are merged into one."""
    many: tuple[int, ...] = (4,)
    """These numbers N."""
    pairs: int = 3
    """The number of pairs of classifiers."""
    match: MatchConfig = dataclasses.field(default_factory=MatchConfig)
    """The settings of the search of classifiers."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The training of the classifiers."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """The widths of both hidden layers, over which the cost of a sweep is measured."""
    inputs: tuple[int, ...] = (64, 256, 1024, 4096)
    """The numbers of inputs, over which it is measured."""
    vmapped: tuple[int, ...] = (1, 8, 64)
    """The numbers of pairs that are searched at once."""
    out: Path = Path("runs/search")
    """The folder of the fitted and trained networks."""


def main(config: Config) -> list[dict[str, Any]]:
    """Measures everything; returns the rows and prints each as one JSON line as soon as it is there."""
    rows = []
    jobs = {"inr": _inr_rows, "classifier": _classifier_rows, "cost": _cost_rows}
    for row in itertools.chain.from_iterable(jobs[name](config) for name in config.jobs):
        rows.append(row | runs.environment())
        print(json.dumps(rows[-1]), flush=True)
    return rows


# --- INRs ---------------------------------------------------------------------------------------------------------


def _inr_rows(config: Config) -> Iterator[dict[str, Any]]:
    arch, settings = inr_zoo.architecture_of(config.zoo), config.zoo
    run = inr_zoo.Config(config.out, zoo=settings)
    given = runs.load_images(run, settings)["scoring"]
    count, size = len(given.images), given.images.shape[1:3]
    with progress.Interruption() as interruption:
        fits = inr_zoo.fit_split(run, arch, "scoring", given, interruption)
    # The second fits of all images follow the first ones.
    pairs = np.arange(min(config.inr_pairs, count))
    a, b = (stacks.member(fits.params, k * count + pairs) for k in (0, 1))
    images, x = given.images[pairs], jnp.asarray(network.coordinates(*size)).reshape(-1, 2)
    keys = jax.random.split(jax.random.key(0), len(pairs))
    measure = jax.jit(functools.partial(_inr_scores, arch, size))
    yield {"job": "inr", "method": "naive", **_scores(measure(a, b, b, images))}
    weights = _timed(lambda p, t, key: matching.weight_matching(arch, p, t), b, a, keys)
    yield _inr_row("weights", arch, measure, a, b, images, *weights)
    for name, options in _SEARCHES.items():
        search = functools.partial(matching.search_matching, arch, **options)
        found = _timed(lambda p, t, key, e, s=search: s(p, t, x, key, start=e), b, a, keys, weights[0].element)
        yield _inr_row(name, arch, measure, a, b, images, *found)


_SEARCHES: dict[str, dict[str, Any]] = {
    "search, one sweep": {"max_sweeps": 1},
    "search": {},
    **{f"search, {number} kicks": {"kicks": number} for number in (4, 16, 64)},
    "search, annealed": {"temperature": 0.01, "max_sweeps": 60},
}


def _timed(match: Callable[..., Matching], *stacked: Any) -> tuple[Matching, float, float]:
    """The matchings of all pairs, one after the other, the milliseconds of a pair and the seconds of compiling."""
    begin = time.process_time()
    compiled = jax.jit(lambda *each: jax.lax.map(lambda one: match(*one), each)).lower(*stacked).compile()
    compiling = time.process_time() - begin
    begin = time.process_time()
    found = jax.block_until_ready(compiled(*stacked))
    return found, 1000 * (time.process_time() - begin) / stacks.count(stacked), compiling


def _inr_row(
    name: str,
    arch: Architecture,
    measure: Callable[..., Any],
    a: Params,
    b: Params,
    images: np.ndarray,
    found: Matching,
    milliseconds: float,
    compiling: float,
) -> dict[str, Any]:
    moved = jax.jit(jax.vmap(functools.partial(symmetry.act, arch)))(found.element, b)
    row = {"job": "inr", "method": name, **_scores(measure(a, moved, b, images)), "ms": milliseconds}
    if found.loss is not None:
        row |= {name: float(getattr(found, name).mean()) for name in ("start_loss", "loss", "evaluations", "sweeps")}
    return row | {"compile_s": compiling}


def _scores(values: dict[str, jax.Array]) -> dict[str, Any]:
    """Means over pairs; of the midpoint its 95 % interval too."""
    middle = np.asarray(values["midpoint"])
    half = 1.96 * middle.std(ddof=1) / np.sqrt(len(middle))
    means = {name: float(np.mean(value)) for name, value in values.items()}
    return {
        **means,
        "half_interval": float(half),
        "pairs": len(middle),
        "end_change": float(values["end_change"].max()),
    }


def _inr_scores(
    arch: Architecture, size: tuple[int, int], a: Params, moved: Params, b: Params, images: jax.Array
) -> dict[str, jax.Array]:
    """Of every pair: errors to the true image at t = .5 and over the path, and what no search has seen."""

    def draw(params: Params, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda one: network.apply(arch, params, one))(x)[:, 0]

    x = jnp.asarray(network.coordinates(*size)).reshape(-1, 2)
    doubled = [2 * side - 1 for side in size]
    fine = jnp.asarray(network.coordinates(*doubled)).reshape(*doubled, 2)[1::2, 1::2].reshape(-1, 2)

    def of_pair(pair: tuple[Params, Params, Params, jax.Array]) -> dict[str, jax.Array]:
        a, moved, b, image = pair
        errors = jax.vmap(lambda t: jnp.square(draw(merge.lerp(a, moved, t), x) - image.reshape(-1)).mean())
        between = (draw(a, fine) + draw(b, fine)) / 2
        return {
            "midpoint": errors(jnp.asarray([0.5]))[0],
            "path": errors(jnp.linspace(0, 1, 21)).mean(),
            "half_pixel": jnp.square(draw(merge.lerp(a, moved, 0.5), fine) - between).mean(),
            "end_change": jnp.abs(draw(moved, x) - draw(b, x)).max(),
        }

    return jax.lax.map(of_pair, (a, moved, b, jnp.asarray(images)))


# --- classifiers --------------------------------------------------------------------------------------------------


def _classifier_rows(config: Config) -> Iterator[dict[str, Any]]:
    count = max(*config.many, config.pairs, 2)
    run = merging.Config(config.out, train=config.train)
    images, settings = merging.load_images(run), config.match
    for index, text in enumerate(config.classifiers):
        arch = architecture.parse(text)
        data = merging.as_inputs(arch, images)
        trained = merging.train_networks(run, text, arch, data, jax.random.fold_in(jax.random.key(0), index), count)
        x, options = merging.function_inputs(settings, arch, data), merging.search_options(settings, arch)
        yield from _pair_rows(config, text, arch, trained, data, x, options)
        if not index:
            yield from _many_rows(config, text, arch, trained, data, x, options)


def _pair_rows(
    config: Config, text: str, arch: Architecture, trained: Zoo, data: merging.Data, x: jax.Array, options: Any
) -> Iterator[dict[str, Any]]:
    """Accuracies of midpoints, without REPAIR."""
    rows = jnp.asarray(list(itertools.combinations(range(len(trained)), 2))[: config.pairs])
    a, b = (stacks.member(trained.params, rows[:, side]) for side in (0, 1))
    keys = jax.random.split(jax.random.key(1), len(rows))
    search = functools.partial(matching.search_matching, arch, times=(0.5,), **options)
    methods: dict[str, Callable[..., Matching]] = {
        "naive": lambda p, t, key: matching.unmatched(arch, p, t),
        "weights": lambda p, t, key: matching.weight_matching(arch, p, t),
        "activations": lambda p, t, key: matching.activation_matching(arch, p, t, x),
        "search": lambda p, t, key: search(p, t, x, key),
        "search from activations": lambda p, t, key: search(
            p, t, x, key, start=matching.activation_matching(arch, p, t, x)
        ),
    }
    for name, method in methods.items():
        found, milliseconds, compiling = _timed(method, b, a, keys)
        middles = jax.vmap(lambda a, b, e: merge.lerp(a, symmetry.act(arch, e, b), 0.5))(a, b, found.element)
        row = {"job": "classifier", "network": text, "method": name, "pairs": len(rows)}
        row |= {"ends": float(np.mean(trained.records["accuracy"])), "accuracy": _accuracy(arch, middles, data)}
        yield row | {"ms": milliseconds, "compile_s": compiling}


def _many_rows(
    config: Config, text: str, arch: Architecture, trained: Zoo, data: merging.Data, x: jax.Array, options: Any
) -> Iterator[dict[str, Any]]:
    """Accuracies of N networks in one, and of the mean of their first two where all are moved."""

    def by_search(stack: Params, *, last_round: bool) -> tuple[Params, Params]:
        many = merge.merge_many(arch, stack, x, jax.random.key(2), last_round=last_round, **options)
        moved = jax.vmap(functools.partial(symmetry.act, arch))(many.elements, stack)
        return many.params, moved

    def by_weights(stack: Params) -> tuple[Params, Params]:
        frame = matching.align_all(arch, stack)
        return frame.mean, frame.aligned

    routes: dict[str, Callable[[Params], tuple[Params, Params]]] = {
        "weights to their mean": by_weights,
        "search": functools.partial(by_search, last_round=False),
        "search, last round": functools.partial(by_search, last_round=True),
    }
    for number in config.many:
        stack = jax.tree.map(lambda leaf, n=number: jnp.asarray(leaf)[:n], trained.params)
        for name, route in routes.items():
            begin = time.process_time()
            merged, moved = jax.block_until_ready(jax.jit(route)(stack))
            pair = merge.average(jax.tree.map(lambda leaf: leaf[:2], moved))
            yield {
                "job": "many",
                "network": text,
                "method": name,
                "number": number,
                "ends": float(np.mean(trained.records["accuracy"][:number])),
                "accuracy": _accuracy(arch, stacks.stack(merged), data),
                "first_two": _accuracy(arch, stacks.stack(pair), data),
                "seconds_with_compiling": time.process_time() - begin,
            }


# --- cost ---------------------------------------------------------------------------------------------------------

_COST_INPUTS, _COST_WIDTH, _COST_CANDIDATES = 256, 64, 32


def _cost_rows(config: Config) -> Iterator[dict[str, Any]]:
    for width in config.widths:
        yield _cost("width", _perceptron(width), _COST_INPUTS)
    for count in config.inputs:
        yield _cost("inputs", _perceptron(_COST_WIDTH), count)
    arch = inr_zoo.architecture_of(config.zoo)
    for pairs in config.vmapped:
        yield _cost("pairs", arch, 64, pairs=pairs)


def _perceptron(width: int) -> Architecture:
    return architecture.mlp((64, width, width, 10), "relu")


def _cost(over: str, arch: Architecture, inputs: int, pairs: int = 1) -> dict[str, Any]:
    """One sweep of untrained networks from the identity, in CPU time by pair, and the memory of all pairs."""
    stacks_of = [
        jax.vmap(functools.partial(network.init, arch))(jax.random.split(jax.random.key(k), pairs)) for k in (0, 1)
    ]
    x = jax.random.normal(jax.random.key(2), (inputs, arch.neuron_layers[0].width))
    keys = jax.random.split(jax.random.key(3), pairs)
    begin = symmetry.identity(arch)

    def search(params: Params, target: Params, key: jax.Array) -> Matching:
        return matching.search_matching(
            arch, params, target, x, key, start=begin, times=(0.5,), candidates=_COST_CANDIDATES, max_sweeps=1
        )

    compiled = jax.jit(jax.vmap(search)).lower(*stacks_of, keys).compile()
    found = jax.block_until_ready(compiled(*stacks_of, keys))
    begins = time.process_time()
    jax.block_until_ready(compiled(*stacks_of, keys))
    seconds = (time.process_time() - begins) / pairs
    evaluations = int(found.evaluations[0])
    return {
        "job": "cost",
        "over": over,
        "network": arch.name,
        "width": arch.hidden[0].width,
        "inputs": inputs,
        "pairs": pairs,
        "ms": 1000 * seconds,
        "evaluations": evaluations,
        "us_an_evaluation": 1e6 * seconds / evaluations,
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def _accuracy(arch: Architecture, stack: Params, data: merging.Data) -> float:
    """The mean over networks, on test images."""
    score = jax.jit(lambda p: jax.lax.map(lambda one: classifiers.score(arch, one, data.test_x, data.test_y), p))
    return float(score(stack).accuracy.mean())


if __name__ == "__main__":
    main(tyro.cli(Config))
