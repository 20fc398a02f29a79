"""Classifiers trained independently of each other are aligned and merged, by every method compared with every other.

    python -m experiments.merging digits                           # scikit-learn's digits, no files needed
    python -m experiments.merging mnist --data mnist.npz           # perceptrons of several widths
    python -m experiments.merging cifar --data cifar10_gray.npz    # a CNN and a residual network
    python -m experiments.merging tiny                             # a minute

For each architecture several networks are trained from their own seeds. Pairs of them are aligned by each method
and scored on test images along the line between them, at its middle also with REPAIR (arXiv 2211.08403). Then N
networks are merged at once. The folder `--out` receives everything: the networks, one file of numbers for every
architecture, results.json and report.html. `--resume` continues a run that stopped.
"""

import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import compile_only, progress, report, runs, tables, watch
from jax_scalegmn import architecture, distributed, landscape, matching, merge, network, stacks, symmetry, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.matching import Matching
from jax_scalegmn.symmetry import canonical
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import classifiers


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training of the classifiers."""

    epochs: int = 30
    """The number of passes over the training images."""
    batch_size: int = 64
    """The number of images in a batch."""
    learning_rate: float = 3e-3
    """The first learning rate; it falls to 0 along a cosine."""
    weight_decay: float = 1e-2
    """The weight decay of AdamW."""


@dataclasses.dataclass(frozen=True)
class MatchConfig:
    """What the methods that look at data or train may spend."""

    examples: int = 1000
    """The number of training images whose activations are matched and repaired."""
    steps: int = 60
    """The number of steps of Sinkhorn matching on weights, and of straight-through matching on labels."""
    batch_size: int = 128
    """The number of training images of one step of straight-through matching on labels."""
    function_examples: int = 1000
    """The number of training images on which functions are compared, without their labels, by perceptrons."""
    function_values: int = 2**17
    """The most values of a hidden layer on these images: wider perceptrons are compared on fewer of them."""
    function_steps: int = 100
    """The number of gradient steps of the methods that compare functions."""
    search_neurons: int = 1024
    """The most neurons that search matching takes in all of its sweeps; it makes one sweep or more, and ten at most."""
    search_candidates: int = 32
    """The most exchanges that a step of search matching tries."""
    search_kicks: int = 0
    """The number of times that search matching goes on from its result with some neurons moved at random."""
    image_examples: int = 256
    """As `function_examples`, for networks of images."""
    scale_steps: int = 200
    """The number of gradient steps of the methods that fit positive scales, for networks that have them."""
    scale_batch: int | None = None
    """The number of training images that each of these steps draws from all; None: every step takes those on which
    functions are compared. Of N networks merged into one, scales are always fitted to the latter."""


MethodName: TypeAlias = Literal[
    "naive",
    "canonical",
    "weights_permutation",
    "weights",
    "activations",
    "sinkhorn",
    "straight_through",
    "sinkhorn_function",
    "straight_through_function",
    "search",
    "search_activations",
    "search_gradient",
    "scales",
    "scales_activations",
    "search_scales",
]
WayName: TypeAlias = Literal[
    "naive", "canonical", "first", "mean", "search", "search_gradient", "search_last", "search_scales"
]

# The methods and ways for networks with positive scales alone.
FITTING = frozenset({"scales", "scales_activations", "search_scales"})


@dataclasses.dataclass(frozen=True)
class Config(runs.RunConfig):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    networks: tuple[str, ...] = (
        "mlp:64-32-32-10,relu",
        "mlp:64-128-128-10,relu",
        "mlp:64-512-512-10,relu",
        "mlp:64-128-128-10,tanh",
        "cnn:1-16-32-32,10,relu,strides=1,padding=SAME,flatten=8-8,dense=64",
        "resnet:8,16-16-32,input_channels=1",
    )
    """The architectures in short form, as `architecture.parse` reads it."""
    models: int = 4
    """The number of networks of every architecture, each with its own seed."""
    pairs: int = 3
    """The number of pairs of them that are merged."""
    many: tuple[int, ...] = (2, 4, 8, 16)
    """The numbers of networks that are merged at once."""
    many_of: str = "mlp:64-512-512-10,relu"
    """The architecture of the networks that are merged at once."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """The methods that align pairs."""
    ways: tuple[WayName, ...] = get_args(WayName)
    """The ways to merge networks at once."""
    train_images: int | None = None
    """The largest number of training images; None for all."""
    test_images: int | None = None
    """The largest number of test images; None for all."""
    points: int = 11
    """The number of points of every path, its end points included."""
    train: TrainConfig = TrainConfig()
    match: MatchConfig = MatchConfig()


PRESETS = {
    "digits": ("scikit-learn's digits, 8 x 8", Config(Path("runs/merging-digits"))),
    "mnist": (
        "perceptrons of widths 32 to 512 on 28 x 28 images; needs --data",
        Config(
            Path("runs/merging-mnist"),
            networks=tuple(f"mlp:784-{width}-{width}-10,relu" for width in (32, 64, 128, 256, 512)),
            many_of="mlp:784-512-512-10,relu",
            train=TrainConfig(epochs=8, batch_size=128, learning_rate=1e-3),
        ),
    ),
    "cifar": (
        "a CNN of 3 convolutions and 2 dense layers and a residual network, on 32 x 32 images; needs --data",
        Config(
            Path("runs/merging-cifar"),
            networks=(
                "cnn:1-32-64-64,10,relu,strides=2,padding=SAME,flatten=32-32,dense=128",
                "resnet:8,16-16-32,input_channels=1",
            ),
            models=2,
            pairs=1,
            many=(),
            train_images=20_000,
            test_images=2000,
            train=TrainConfig(epochs=8, batch_size=128, learning_rate=1e-3, weight_decay=0.1),
            match=MatchConfig(steps=30),
        ),
    ),
    "tiny": (
        "a few digits in minutes, to try the machinery",
        Config(
            Path("runs/merging-tiny"),
            quick_compilation=True,
            networks=("mlp:64-8-8-10,relu", "resnet:8,4-4-6,input_channels=1"),
            models=2,
            pairs=1,
            many=(2, 3),
            many_of="mlp:64-8-8-10,relu",
            train_images=200,
            test_images=50,
            points=3,
            train=TrainConfig(epochs=2, batch_size=32),
            match=MatchConfig(
                64,
                steps=3,
                batch_size=32,
                function_examples=8,
                function_steps=2,
                search_neurons=1,
                search_candidates=2,
                image_examples=4,
                scale_steps=2,
            ),
        ),
    ),
}

OBJECTIVE = (
    "pairs.mlp:64-32-32-10,relu.methods.weights.pairs.0.middle.loss",
    "minimize",
)  # advised to sweeps


# The images of training and of test.
Parts: TypeAlias = tuple[images.Images, images.Images]


class Data(NamedTuple):
    """Inputs and labels, of training and of test."""

    x: jax.Array
    y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


class Method(NamedTuple):
    """One way to bring a network next to a target: (params, target, key) -> a matching."""

    label: str
    match: Callable[[Params, Params, Key], Matching]


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    _check(config)
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.device_mesh(config)  # refused before there is a folder
    archs = {text: architecture.parse(text) for text in config.networks}
    many = architecture.parse(config.many_of)
    images = load_images(config)
    _check_batch(config, len(images[0].images))
    with runs.Run(config) as run:
        pairs = {}
        for index, (text, arch) in enumerate(archs.items()):
            pairs[text] = _pairs_of(config, text, arch, images, index)
            run.interruption.stop_if_requested(f"{index + 1} of {len(archs)} architectures")
        results = {"pairs": pairs, "many": _many_of(config, many, images) if config.many else None}
        return run.finish(results, "Merging classifiers", sections, result_tables)


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The training step and the matching by weights of every architecture, to be compiled and not run."""
    size = None
    for text in config.networks:
        arch = architecture.parse(text)
        shape: tuple[int, ...] = (arch.neuron_layers[0].width,)
        if arch.input_rank == 3:
            size = size or load_images(config)[0].images.shape[1:3]
            shape = (*size, *shape)
        yield compile_only.classifier_step(mesh, text, arch, shape, config.train.batch_size, 1)
        yield compile_only.weight_matching(mesh, f"{text}, matching", arch, 1)


def _pairs_of(config: Config, text: str, arch: Architecture, images: Parts, index: int) -> dict[str, Any]:
    """All numbers on pairs of one architecture; read where a former run stored them."""
    path = config.out / "pairs" / f"{_slug(text)}.json"
    if (found := runs.read_json(path)) is None:
        data = as_inputs(arch, images)
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        trained = train_networks(config, text, arch, data, key, config.models)
        found = json.loads(json.dumps(score_pairs(config, arch, trained, data, key)))
        runs.write_json(path, found)
    return found


def _many_of(config: Config, arch: Architecture, images: Parts) -> dict[str, Any]:
    """All numbers on N networks at once; read where a former run stored them."""
    path = config.out / "many.json"
    if (found := runs.read_json(path)) is None:
        data, key = as_inputs(arch, images), jax.random.key(config.seed)
        trained = train_networks(config, config.many_of, arch, data, key, max(config.many), name="many")
        by_number = merge_many(config, arch, trained, data)
        found = json.loads(json.dumps({"network": config.many_of, "by_number": by_number}))
        runs.write_json(path, found)
    return found


# --- data and networks --------------------------------------------------------------------------------------------


def load_images(config: Config) -> Parts:
    """Training and test images: the files' own parts; some of the digits are set apart."""
    if config.data is None:
        digits, held_out = images.digits(), runs.ImageConfig.scoring_images
        order = np.random.default_rng(config.seed).permutation(len(digits.images))
        parts = [
            images.Images(digits.images[rows], digits.labels[rows]) for rows in (order[held_out:], order[:held_out])
        ]
    else:
        parts = list(images.load(config.data))
    train, test = (
        images.Images(part.images[:count], part.labels[:count])
        for part, count in zip(parts, (config.train_images, config.test_images), strict=True)
    )
    return train, test


def as_inputs(arch: Architecture, images: Parts) -> Data:
    """The images as the architecture takes them: vectors, or maps of one channel; mean 0 and variance 1 in training."""
    mean, std = images[0].images.mean(), images[0].images.std()
    arrays = []
    for part in images:
        x = ((part.images - mean) / std).astype(np.float32)
        x = x[..., None] if arch.input_rank == 3 else x.reshape(len(x), -1)
        arrays += [jnp.asarray(x), jnp.asarray(part.labels)]
    return Data(*arrays)


def train_networks(
    config: Config, text: str, arch: Architecture, data: Data, key: Key, count: int, *, name: str = ""
) -> zoo.Zoo:
    """Trained networks with their test scores; read where a former run saved them."""
    path = config.out / "networks" / f"{name or _slug(text)}.safetensors"
    if (saved := runs.read_part(path)) is not None:
        return saved
    settings = config.train
    steps = len(data.x) // settings.batch_size * settings.epochs
    tx = optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, steps), weight_decay=settings.weight_decay)
    epochs = classifiers.fit(
        arch,
        data.x,
        data.y,
        jax.random.split(key, count),
        tx=tx,
        num_epochs=settings.epochs,
        batch_size=settings.batch_size,
        networks_at_once=1 if arch.input_rank == 3 and jax.default_backend() == "cpu" else None,
        mesh=runs.device_mesh(config),
    )
    with progress.bar(f"{count} x {text}", settings.epochs, "epochs") as advance:
        for epoch in epochs:
            params, losses = epoch
            advance(1, f"loss {np.mean(losses):.4f}")
    params = jax.tree.map(jnp.asarray, distributed.gather(params))
    scores = jax.jit(lambda stack: jax.lax.map(lambda one: _score(arch, one, data), stack))(params)
    records = {name: np.asarray(values) for name, values in scores._asdict().items()}
    trained = zoo.Zoo(arch, params, records | {"seed": np.arange(count)}, dataclasses.asdict(settings))
    runs.save_zoo(trained, path)
    return trained


def _score(arch: Architecture, params: Params, data: Data) -> classifiers.Scores:
    return classifiers.score(arch, params, data.test_x, data.test_y)


# --- pairs --------------------------------------------------------------------------------------------------------


def methods(config: Config, arch: Architecture, data: Data) -> dict[str, Method]:
    """All methods, each on the whole group of the architecture where its label does not say otherwise."""
    settings = config.match
    x = data.x[: settings.examples]

    def loss_fn(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        apply = functools.partial(network.apply, arch, params, convolve=network.convolve_by_patches)
        logits = jax.vmap(apply)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def naive(params: Params, target: Params, key: Key) -> Matching:
        return matching.unmatched(arch, params, target)

    def sinkhorn(params: Params, target: Params, key: Key) -> Matching:
        return matching.sinkhorn_matching(arch, params, target, num_steps=settings.steps)

    def straight_through(params: Params, target: Params, key: Key) -> Matching:
        rows = jax.random.randint(key, (settings.steps, settings.batch_size), 0, len(data.x))
        return matching.straight_through_matching(arch, params, target, loss_fn, (data.x[rows], data.y[rows]))

    def closed_form(params: Params, target: Params, key: Key) -> Matching:
        return matching.canonical_matching(arch, params, target)

    def by_activations(params: Params, target: Params, key: Key) -> Matching:
        return matching.activation_matching(arch, params, target, x)

    def by_weights(params: Params, target: Params, key: Key, **options: Any) -> Matching:
        return matching.weight_matching(arch, params, target, **options)

    every = {
        "naive": Method("naive", naive),
        "canonical": Method("canonical form", closed_form),
        "weights_permutation": Method("weights, permutations alone", functools.partial(by_weights, scale=False)),
        "weights": Method("weights", by_weights),
        "activations": Method("activations", by_activations),
        "sinkhorn": Method("Sinkhorn", sinkhorn),
        "straight_through": Method("straight-through", straight_through),
        **_by_function(config, arch, data, by_activations),
        **_by_scales(config, arch, data, by_weights, by_activations),
    }
    return {name: every[name] for name in config.methods if name in every}


def _by_function(
    config: Config, arch: Architecture, data: Data, by_activations: Callable[..., Matching]
) -> dict[str, Method]:
    """The methods that compare what merged networks compute with the networks' own outputs, without labels."""
    steps, x = config.match.function_steps, function_inputs(config.match, arch, data)
    distance, options = matching.cross_entropy, search_options(config.match, arch)

    def sinkhorn(params: Params, target: Params, key: Key) -> Matching:
        return matching.sinkhorn_matching(arch, params, target, key, x=x, distance=distance, num_steps=steps)

    def straight_through(params: Params, target: Params, key: Key) -> Matching:
        return matching.straight_through_matching(
            arch, params, target, x=x, key=key, distance=distance, num_steps=steps
        )

    def search(params: Params, target: Params, key: Key, **more: Any) -> Matching:
        return matching.search_matching(arch, params, target, x, key, times=(0.5,), **options, **more)

    def from_activations(params: Params, target: Params, key: Key) -> Matching:
        return search(params, target, key, start=by_activations(params, target, key))

    return {
        "sinkhorn_function": Method("Sinkhorn on the function", sinkhorn),
        "straight_through_function": Method("straight-through on the function", straight_through),
        "search": Method("search from weights", search),
        "search_activations": Method("search from activations", from_activations),
        "search_gradient": Method("search after gradient steps", functools.partial(search, gradient_steps=steps)),
    }


def _by_scales(
    config: Config,
    arch: Architecture,
    data: Data,
    by_weights: Callable[..., Matching],
    by_activations: Callable[..., Matching],
) -> dict[str, Method]:
    """The methods that fit positive scales to what merged networks compute; none where there are no such scales."""
    if not _has_scales(arch):
        return {}
    settings, compared = config.match, function_inputs(config.match, arch, data)
    x = compared if settings.scale_batch is None else data.x
    options = search_options(settings, arch) | {"gradient_steps": settings.function_steps}

    def fit(params: Params, target: Params, key: Key, match: Callable[..., Matching]) -> Matching:
        drawn = {} if settings.scale_batch is None else {"examples_per_step": settings.scale_batch, "key": key}
        return matching.fit_scales(
            arch,
            params,
            target,
            x,
            distance=matching.cross_entropy,
            start=match(params, target, key),
            times=(0.5,),
            num_steps=settings.scale_steps,
            **drawn,
        )

    def search(params: Params, target: Params, key: Key) -> Matching:
        return matching.search_matching(arch, params, target, compared, key, times=(0.5,), **options)

    return {
        "scales": Method("weights, scales fitted", functools.partial(fit, match=by_weights)),
        "scales_activations": Method("activations, scales fitted", functools.partial(fit, match=by_activations)),
        "search_scales": Method("search after gradient steps, scales fitted", functools.partial(fit, match=search)),
    }


def _has_scales(arch: Architecture) -> bool:
    return any(layer.scaling.has_sizes for layer in arch.hidden)


def function_inputs(settings: MatchConfig, arch: Architecture, data: Data) -> jax.Array:
    """The training images on which functions are compared."""
    if arch.input_rank == 3:
        return data.x[: settings.image_examples]
    widest = max(layer.width for layer in arch.hidden)
    return data.x[: max(1, min(settings.function_examples, settings.function_values // widest))]


def search_options(settings: MatchConfig, arch: Architecture) -> dict[str, Any]:
    """The options of a search: the wider the network, the fewer sweeps."""
    neurons = sum(layer.width for layer in arch.hidden)
    sweeps = min(10, max(1, settings.search_neurons // neurons))
    return {
        "distance": matching.cross_entropy,
        "candidates": settings.search_candidates,
        "max_sweeps": sweeps,
        "kicks": settings.search_kicks,
    }


def score_pairs(
    config: Config,
    arch: Architecture,
    trained: zoo.Zoo,
    data: Data,
    key: Key,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Every method on every pair: scores along the line and of its repaired middle, and how the alignment went.

    The pairs are those of the first networks where none are named.
    """
    if pairs is None:
        pairs = list(itertools.combinations(range(config.models), 2))[: config.pairs]
    found, mesh = {}, runs.device_mesh(config)
    every = methods(config, arch, data)
    follow = runs.one_each(functools.partial(_follow, config, arch), mesh)
    if mesh is not None:
        data = distributed.replicate(data, mesh)
    groups = _in_groups(trained.params, pairs, key, distributed.num_devices(mesh))
    with progress.bar(f"pairs of {arch}", len(every) * len(pairs), "alignments") as advance:
        for name, method in every.items():
            match, rows = runs.one_each(lambda pair, match=method.match: match(*pair), mesh), []
            for group, (a, b, keys) in groups:
                begin, cpu_begin = time.perf_counter(), time.process_time()
                result = match((b, a, keys))
                seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
                scores = follow((a, b, result.element), data)
                times = {"seconds": seconds, "cpu_seconds": cpu_seconds / len(group)}
                scores |= {name: getattr(result, name) for name in ("similarity", "sweeps", "converged")}
                for row, pair in enumerate(group):
                    one = jax.tree.map(lambda leaf, row=row: leaf[row].tolist(), scores)
                    rows.append(one | times | {"pair": list(pair)})
                advance(len(group), method.label)
            found[name] = {"label": method.label, "pairs": rows}
    return {
        "parameters": arch.num_parameters,
        "test_accuracy": trained.records["accuracy"].tolist(),
        "test_loss": trained.records["loss"].tolist(),
        "methods": found,
    }


def _in_groups(
    params: Params, pairs: Sequence[tuple[int, int]], key: Key, size: int
) -> list[tuple[Sequence[tuple[int, int]], tuple[Params, Params, Key]]]:
    """Groups of at most this size of the pairs, with their first networks, their second ones, and their keys."""
    groups = []
    for first in range(0, len(pairs), size):
        group = pairs[first : first + size]
        a, b = (
            jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], params)
            for rows in np.array(group).reshape(-1, 2).T
        )
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first + np.arange(len(group)))
        groups.append((group, (a, b, keys)))
    return groups


def _follow(
    config: Config, arch: Architecture, pair: tuple[Params, Params, symmetry.Element], data: Data
) -> dict[str, Any]:
    """Test scores from a to the moved b, of the repaired middle, and the largest change of b's outputs."""
    a, b, element = pair
    moved = symmetry.act(arch, element, b)

    def measure(params: Params) -> dict[str, jax.Array]:
        return _score(arch, params, data)._asdict()

    path = landscape.path(measure, a, moved, num_points=config.points, batch_size=1)
    middle = merge.lerp(a, moved, 0.5)
    ends = stacks.stack(dict(a), moved)
    repaired = merge.repair(arch, middle, ends, data.x[: config.match.examples])
    outputs = [jax.vmap(lambda x, p=p: network.apply(arch, p, x))(data.test_x[:256]) for p in (b, moved)]
    return {
        "path": {"ts": path.ts, **path.metrics},
        "middle": measure(middle),
        "repaired": measure(repaired),
        "tempered": _tempered(arch, middle, data, config.match.examples),
        "function_change": jnp.abs(outputs[1] - outputs[0]).max() / jnp.abs(outputs[0]).max(),
    }


def _tempered(arch: Architecture, params: Params, data: Data, examples: int) -> dict[str, jax.Array]:
    """The test loss with one softmax temperature, the best on training images: it needs no alignment."""
    temperatures = jnp.geomspace(0.02, 50.0, 157)

    def logits(x: jax.Array) -> jax.Array:
        return jax.lax.map(functools.partial(network.apply, arch, params), x, batch_size=min(500, len(x)))

    def loss(logits: jax.Array, y: jax.Array, temperature: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits / temperature, y).mean()

    seen = logits(data.x[:examples])
    best = temperatures[jnp.argmin(jax.vmap(loss, (None, None, 0))(seen, data.y[:examples], temperatures))]
    return {"temperature": best, "loss": loss(logits(data.test_x), data.test_y, best)}


# --- many networks ------------------------------------------------------------------------------------------------


def merge_many(config: Config, arch: Architecture, trained: zoo.Zoo, data: Data) -> dict[str, Any]:
    """The mean of N networks, brought together in several ways, of which each of several processes tries its share."""
    x = data.x[: config.match.examples]
    mend = jax.jit(lambda merged, stack: merge.repair(arch, merged, stack, x))
    score = jax.jit(lambda params: _score(arch, params, data))
    routes = {name: jax.jit(route) for name, route in many_routes(config, arch, data).items()}
    cells = list(itertools.product(config.many, routes))
    mine: dict[int, dict[str, float]] = {}
    with progress.bar("N networks", len(cells), "merges") as advance:
        for cell in range(jax.process_index(), len(cells), jax.process_count()):
            number, name = cells[cell]
            stack = jax.tree.map(lambda leaf, n=number: leaf[:n], trained.params)
            begin = time.process_time()
            aligned = jax.block_until_ready(routes[name](stack))
            seconds = time.process_time() - begin
            merged = merge.average(aligned)
            plain, repaired = score(merged), score(mend(merged, aligned))
            mine[cell] = {
                "accuracy": float(plain.accuracy),
                "loss": float(plain.loss),
                "repaired_accuracy": float(repaired.accuracy),
                "repaired_loss": float(repaired.loss),
                "cpu_seconds_with_compiling": seconds,
            }
            advance(jax.process_count(), f"{number}, {name}")
    every = {int(cell): row for part in distributed.every_process(mine) for cell, row in part.items()}
    found: dict[str, Any] = {
        str(number): {"end_points": float(trained.records["accuracy"][:number].mean())} for number in config.many
    }
    for cell, (number, name) in enumerate(cells):
        found[str(number)][name] = every[cell]
    return found


def many_routes(config: Config, arch: Architecture, data: Data) -> dict[str, Callable[[Params], Params]]:
    """By the name of a way: a stack of networks -> the same functions, moved so that their mean is good."""

    def searched(stack: Params, **more: Any) -> Params:
        options = search_options(config.match, arch) | more
        inputs = function_inputs(config.match, arch, data)
        many = merge.merge_many(arch, stack, inputs, jax.random.key(config.seed), **options)
        return jax.vmap(functools.partial(symmetry.act, arch))(many.elements, stack)

    steps = config.match.function_steps
    routes: dict[str, Callable[[Params], Params]] = {
        "naive": lambda stack: stack,
        "canonical": jax.vmap(functools.partial(canonical.form, arch)),
        "first": lambda stack: jax.vmap(lambda one: matching.align(arch, one, stacks.member(stack, 0)))(stack),
        "mean": lambda stack: matching.align_all(arch, stack).aligned,
        "search": searched,
        "search_gradient": functools.partial(searched, gradient_steps=steps),
        "search_last": functools.partial(searched, gradient_steps=steps, last_round=True),
    }
    if _has_scales(arch):
        scale_steps = config.match.scale_steps
        routes["search_scales"] = functools.partial(searched, gradient_steps=steps, scale_steps=scale_steps)
    return {name: routes[name] for name in config.ways if name in routes}


# --- what is shown ------------------------------------------------------------------------------------------------


WAYS = {
    "naive": "naive",
    "canonical": "canonical",
    "first": "to the first",
    "mean": "to their mean",
    "search": "search",
    "search_gradient": "search after gradient steps",
    "search_last": "and a last round",
    "search_scales": "search after gradient steps, scales fitted",
}


def result_tables(results: Mapping[str, Any]) -> list[tables.Table]:
    shown = []
    for text, result in results["pairs"].items():
        whole = _pairs_table(text, result)
        brief = [[*row[:5], row[-1]] for row in (whole.head, *whole.rows)]  # as wide as a terminal
        shown.append(tables.Table(whole.title, brief[0], brief[1:]))
    return shown + ([_many_table(results["many"])] if results["many"] else [])


def _pairs_table(text: str, result: Mapping[str, Any]) -> tables.Table:
    """Means over pairs: accuracies in %, the middle's loss, and seconds."""
    head = ("method", "middle", "REPAIR", "loss", "REPAIR", "temperature", "similarity", "function", "seconds")
    ends = f"{100 * np.mean(result['test_accuracy']):.2f}", f"{np.mean(result['test_loss']):.3f}"
    rows = [["end points", ends[0], "", ends[1], "", "", "", "", ""]]
    for method in result["methods"].values():
        pairs = method["pairs"]
        middle, repaired = ([pair[kind] for pair in pairs] for kind in ("middle", "repaired"))
        cells = [f"{100 * np.mean([score['accuracy'] for score in scores]):.2f}" for scores in (middle, repaired)]
        cells += [f"{np.mean([score['loss'] for score in scores]):.3f}" for scores in (middle, repaired)]
        cells.append(f"{np.mean([pair['tempered']['loss'] for pair in pairs]):.3f}")
        cells.append(f"{np.mean([pair['similarity'] for pair in pairs]):.3f}")
        cells.append(f"{np.max([pair['function_change'] for pair in pairs]):.0e}")
        # The first pair's time includes compilation.
        cells.append(f"{np.median([pair['seconds'] for pair in pairs[1:] or pairs]):.2f}")
        rows.append([method["label"], *cells])
    return tables.Table(f"{text}: accuracy %, loss", head, rows)


def _many_table(many: Mapping[str, Any]) -> tables.Table:
    """Accuracies of the mean in %, without / with REPAIR."""
    numbers = many["by_number"]
    rows = [["end points", *(f"{100 * routes['end_points']:.1f}" for routes in numbers.values())]]
    for name in next(iter(numbers.values())):
        if name in WAYS:
            both = [(routes[name]["accuracy"], routes[name]["repaired_accuracy"]) for routes in numbers.values()]
            rows.append([WAYS[name], *(f"{100 * plain:.1f} / {100 * repaired:.1f}" for plain, repaired in both)])
    return tables.Table("N networks merged: accuracy %, without / with REPAIR", ("N", *numbers), rows)


def sections(results: Mapping[str, Any]) -> Iterable[str]:
    for text, result in results["pairs"].items():
        yield f"<h2>{text}</h2>" + tables.page(_pairs_table(text, result)) + _paths(result)
    yield (
        "<p class=note>Means over pairs; accuracies in %, losses in nats, on test images. Function: the largest change "
        "of an aligned network's outputs over their largest entry. Temperature: the loss at the middle with the one "
        "softmax temperature that is best on training images. Seconds: of one alignment, without compilation "
        "where there are several pairs.</p>"
    )
    if results["many"]:
        yield f"<h2>N networks {results['many']['network']}</h2>" + tables.page(_many_table(results["many"]))
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds")})


def _paths(result: Mapping[str, Any]) -> str:
    """A chart of the accuracy along the line between the networks of a pair: the mean over pairs."""
    lines = []
    for method in result["methods"].values():
        paths = [pair["path"] for pair in method["pairs"]]
        mean = np.mean([path["accuracy"] for path in paths], 0).tolist()
        lines.append(report.Line(method["label"], paths[0]["ts"], mean))
    return report.chart(lines, x="t", y="test accuracy")


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    for name, chosen in {"methods": config.methods, "ways": config.ways}.items():
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"{name} are {chosen}; expected one or more, each once.")
    if len(set(config.networks)) != len(config.networks) or not config.networks:
        raise ValueError(f"networks are {config.networks}; expected one architecture or more, each once.")
    asked: list[tuple[str, tuple[str, ...]]] = [(text, config.methods) for text in config.networks]
    for text, chosen in [*asked, *([(config.many_of, config.ways)] if config.many else [])]:
        if FITTING.issuperset(chosen) and not _has_scales(architecture.parse(text)):
            raise ValueError(
                f"{', '.join(chosen)} fit positive scales, and '{text}' has none; expected a network with relu, or "
                "another method too."
            )


def _check_batch(config: Config, images: int) -> None:
    batch = config.match.scale_batch
    if batch is not None and not 1 <= batch <= images:
        raise ValueError(
            f"match.scale_batch is {batch}; expected 1 to {images}, the training images, or None: then every step "
            "takes the images on which functions are compared."
        )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


if __name__ == "__main__":
    watch.command(main, PRESETS)
