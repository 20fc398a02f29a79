"""CNNs are canonicalized by a ScaleGMN autoencoder and merged (Boufalis et al. 2025, arXiv 2511.12601, section 5).

    python -m experiments.cnn digits                             # scikit-learn's digits, no files needed
    python -m experiments.cnn cifar --data cifar10_gray.npz      # CIFAR-10 in gray; a GPU helps
    python -m experiments.cnn digits --zoo my-zoo                # CNNs that were trained before
    python -m experiments.cnn tiny                               # a few minutes, to try the machinery

For relu (positive scales) and tanh (signs): a zoo of small CNNs over sampled hyperparameters, an autoencoder that
distills them, a matcher and a frame that learn what merged networks compute, and pairs of the best networks merged by
every method, each without and with REPAIR (arXiv 2211.08403).
Images and networks of training, of selection and of scoring are disjoint. The folder `--out` receives everything: the
zoos, the checkpoints, results.json and report.html. `--resume` continues a run that stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array
from scipy import stats

from experiments import (
    alignment,
    autoencoders,
    cnn_report,
    cnn_zoo,
    compile_only,
    evaluation,
    populations,
    progress,
    runs,
    watch,
)
from experiments.alignment import CnnAlignmentConfig
from experiments.autoencoders import Trained
from experiments.cnn_zoo import Data, ZooConfig
from experiments.evaluation import Member, Method
from jax_scalegmn import matching, merge, models, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.matching import Matching
from jax_scalegmn.training import losses
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import Zoo, classifiers


@dataclasses.dataclass(frozen=True)
class TrainConfig(autoencoders.TrainConfig):
    """The training of the autoencoders."""

    epochs: int = 60
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    clip_norm: float = 5.0
    temperature: float = 0.6
    """The temperature of the distillation."""
    distillation_images: int | None = None
    """The largest number of training images that networks are distilled on; None for all."""
    images_per_step: int = 64
    """The number of these images that are drawn anew for every network of every batch."""
    least_accuracy: float = 0.0
    """The accuracy on training images below which a network is left out of the autoencoder's training."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The merging."""

    best: int = 30
    """The number of scoring networks that are merged: the best on the images for selection at the end of training."""
    pairs: int = 20
    """The number of random pairs of them."""
    points: int = 21
    """The number of points of every path, an odd one."""
    examples: int = 256
    """The number of training images whose activations are matched and repaired."""
    function_examples: int = 128
    """The number of training images on which functions are compared, without their labels."""
    function_steps: int = 60
    """The number of gradient steps of the methods that compare functions."""
    search_candidates: int = 16
    """The most exchanges that a step of search matching tries."""
    search_sweeps: int = 2
    """The most sweeps over all neurons of search matching."""
    search_kicks: int = 0
    """The number of times that search matching goes on from its result with some neurons moved at random."""
    orbits: int = 8
    """The number of networks whose orbits are embedded."""
    orbit_size: int = 16
    """The number of members of each of these orbits."""


@dataclasses.dataclass(frozen=True)
class Config(cnn_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    zoo_path: Annotated[Path | None, tyro.conf.arg(name="zoo")] = None
    """CNNs that are read in place of training some: a folder in the layout of the Small CNN Zoo, a file of `zoo.save`,
    or the folder "zoo" of a former run. They are scored on the images of `--data`. Of the options of the zoo, the
    numbers of images, `size`, `enlarge`, `standardized` and `pixels` hold."""
    zoo_step: int | None = None
    """The step of the networks of `--zoo` that are read, 86 in the published zoo; None for all."""
    model: autoencoders.ModelConfig = dataclasses.field(default_factory=autoencoders.ModelConfig)
    train: TrainConfig = TrainConfig()
    alignment: CnnAlignmentConfig = dataclasses.field(default_factory=CnnAlignmentConfig)
    evaluation: EvaluationConfig = EvaluationConfig()


PRESETS = {
    "digits": ("scikit-learn's digits, 16 x 16; minutes on two cores", Config(Path("runs/cnn-digits"))),
    "cifar": (
        "CIFAR-10 in gray, 32 x 32, the published networks; needs --data, a GPU helps",
        Config(
            Path("runs/cnn-cifar"),
            zoo=cnn_zoo.CIFAR,
            model=autoencoders.ModelConfig(64, 4),
            train=TrainConfig(epochs=60, distillation_images=5000),
        ),
    ),
    "accurate": (
        "CNNs of `experiments.cnn_zoo cifar`, above 50 % of CIFAR-10, by --zoo; needs --data, an hour on two cores",
        Config(
            Path("runs/cnn-accurate"),
            zoo=cnn_zoo.ACCURATE,
            model=autoencoders.ModelConfig(64, 4),
            train=TrainConfig(
                8, 120, 8e-3, micro_batch=8, optimizer="muon", distillation_images=5000, images_per_step=16
            ),
            alignment=CnnAlignmentConfig(epochs=0),  # it has too few networks to learn from
            evaluation=EvaluationConfig(pairs=8),
        ),
    ),
    "tiny": (
        "a few digits in minutes, to try the machinery",
        Config(
            Path("runs/cnn-tiny"),
            quick_compilation=True,
            zoo=ZooConfig(
                train_images=64,
                selection_images=16,
                scoring_images=16,
                channels=(1, 3, 4),
                networks=12,
                steps=6,
                checkpoints=2,
                batch_size=8,
                part=8,
            ),
            model=autoencoders.ModelConfig(4, 1),
            train=TrainConfig(4, epochs=2, warmup_steps=2, micro_batch=None, images_per_step=8),
            alignment=CnnAlignmentConfig(
                8, epochs=1, warmup_steps=2, features=4, num_layers=1, num_iterations=3, pairs=8, images_per_step=8
            ),
            evaluation=EvaluationConfig(
                3, 2, 3, 16, 4, 2, search_candidates=2, search_sweeps=1, orbits=2, orbit_size=3
            ),
        ),
    ),
}

OBJECTIVE = ("activations.tanh.best.selection_loss", "minimize")  # advised to sweeps

ACTIVATIONS = "activations"
zoo_key, program = cnn_zoo.zoo_key, populations.program  # of a sweep


def fit_zoo(config: Config) -> None:
    """Trains the CNNs of a config into its folder, for all trials of a sweep; none if it reads others."""
    if config.zoo_path is None:
        cnn_zoo.fit_zoos(config)


def population(configs: Sequence[Config | None]) -> Iterator[list[dict[str, Any]]]:
    """Trains the autoencoders of configs of one program, one activation after the other; see `populations.train`."""
    config = next(one for one in configs if one is not None)
    data = cnn_zoo.load_data(config)
    found: list[dict[str, Any]] = [{} for _ in configs]
    with runs.compilation(config), progress.Interruption() as interruption:
        zoos = read_zoos(config, data) or {
            name: cnn_zoo.fit_zoo(config, name, data, config.out / "zoo", interruption) for name in config.activations
        }
        for activation, cnns in zoos.items():
            subject = _subject(config, activation, cnn_zoo.split(cnns, config.seed), data)
            settings = [None if one is None else one.train for one in configs]
            for epoch in populations.train(
                configs,
                settings,
                subject.model,
                lambda trial, train=True, loss=subject.loss: loss(train=train),
                subject.rows,
                interruption,
                folder=f"checkpoints/{activation}",
            ):
                for results, told in zip(found, epoch, strict=True):
                    results[activation] = told.get("results", {})
                yield [told | {"results": {"activations": dict(one)}} for told, one in zip(epoch, found, strict=True)]


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    _check(config)
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    alignment.check(config, config.alignment)
    data = cnn_zoo.load_data(config)
    zoos = read_zoos(config, data)
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = zoos or {
                name: cnn_zoo.fit_zoo(config, name, data, config.out / "zoo", run.interruption)
                for name in config.activations
            }
        results, pictures = {}, {}
        for activation, cnns in zoos.items():
            results[activation], pictures[activation] = train_and_score(run, config, activation, cnns, data)
        return run.finish(
            {"activations": results},
            "Merging CNNs by a ScaleGMN autoencoder",
            functools.partial(cnn_report.sections, pictures=pictures),
            cnn_report.result_tables,
        )


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The programs of the experiment for every activation, to be compiled and not run."""
    given, settings = runs.unread_images(config, config.zoo), config.train
    shown = len(given.images[: settings.distillation_images])
    x = jnp.zeros((shown, *cnn_zoo.input_shape(config, given)))
    classes = 1 + int(given.labels.max())
    for activation in config.activations:
        arch = cnn_zoo.architecture_of(config, activation, classes)
        scales = (1.0,) * len(arch.parameters)
        model = models.autoencoder(arch, scales=scales if config.model.normalized else None, **config.model.options())
        loss = losses.distillation(
            model, x, temperature=settings.temperature, images_per_step=min(settings.images_per_step, shown)
        )
        params = compile_only.params_of(arch)
        row = params, jax.ShapeDtypeStruct((shown, classes), np.float32)
        yield compile_only.training_step(mesh, f"{activation}, training step", model, loss, settings, row)
        for name in alignment.KINDS if config.alignment.epochs else ():
            learns, pair, method = config.alignment, (params, params), alignment.reads_one(name)
            aligner = alignment.make_model(learns, name, arch, scales)
            loss = alignment.cnn_losses(learns, {"train": x, "selection": x}, aligner)["train"]
            label = f"{activation}, {name}'s step"
            yield compile_only.training_step(mesh, label, aligner, loss, learns, pair, method=method)
        yield cnn_zoo.training_step(config, mesh, activation, given)
        yield compile_only.weight_matching(mesh, f"{activation}, matching", arch, 32)


def read_zoos(config: Config, data: Mapping[str, Data]) -> dict[str, Zoo]:
    """The zoos at `--zoo` by activation, checked before any training; empty without that option."""
    if config.zoo_path is None:
        return {}
    mesh = runs.device_mesh(config)
    zoos = {name: cnn_zoo.read(config.zoo_path, name, dict(data), config.zoo_step, mesh) for name in config.activations}
    for activation, cnns in zoos.items():
        usable(config.train, activation, cnn_zoo.split(cnns, config.seed)["train"])
    return zoos


def usable(settings: TrainConfig, activation: str, networks: Zoo) -> Zoo:
    """The training networks that are accurate enough.

    Raises:
      ValueError: If they do not fill a batch.
    """
    enough = networks.records["train_accuracy"] >= settings.least_accuracy
    if not 1 <= settings.batch_size <= enough.sum():
        raise ValueError(
            f"{enough.sum()} {activation} networks reach train.least_accuracy={settings.least_accuracy:g}; expected "
            f"one batch of train.batch_size={settings.batch_size} or more. Lower one of the two, or raise zoo.networks."
        )
    return networks[enough]


def train_and_score(
    run: runs.Run, config: Config, activation: str, cnns: Zoo, data: Mapping[str, Data]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of one activation, as JSON values, and what its scatter plot shows."""
    begin = time.perf_counter()
    parts = cnn_zoo.split(cnns, config.seed)
    trained = fit_autoencoder(config, activation, parts, data, run.interruption)
    train_seconds = time.perf_counter() - begin
    aligners = fit_aligners(config, activation, parts, data, run.interruption)
    align_seconds = time.perf_counter() - begin - train_seconds
    scores, pictures = score(config, trained, aligners, parts, data)
    return {
        "zoo": cnn_zoo.describe(cnns),
        "model": {"parameters": trained.parameters},
        "training": trained.history,
        "alignment": alignment.results(aligners),
        **scores,
        "seconds": {
            "training": train_seconds,
            "alignment": align_seconds,
            "scoring": time.perf_counter() - begin - train_seconds - align_seconds,
        },
    }, pictures


# --- autoencoder, matcher and frame -------------------------------------------------------------------------------


def fit_autoencoder(
    config: Config,
    activation: str,
    parts: Mapping[str, Zoo],
    data: Mapping[str, Data],
    interruption: progress.Interruption,
) -> Trained:
    """Trains the autoencoder of one activation, or continues with it."""
    subject = _subject(config, activation, parts, data)
    return autoencoders.fit(
        config,
        config.train,
        subject.model,
        {"train": subject.loss(train=True), "selection": subject.loss(train=False)},
        subject.rows,
        interruption,
        note=lambda metrics: f"agreement {metrics['selection_agreement']:.1%}",
        title=f"Autoencoder {activation}",
        folder=f"checkpoints/{activation}",
    )


def fit_aligners(
    config: Config,
    activation: str,
    parts: Mapping[str, Zoo],
    data: Mapping[str, Data],
    interruption: progress.Interruption,
) -> dict[str, Trained]:
    """Trains the matcher and the frame of one activation, or continues with them, on what the autoencoder sees."""
    networks, shown = _seen(config.train, activation, parts, data)
    return alignment.fit_on_cnns(config, config.alignment, networks, shown, interruption, name=activation)


def _seen(
    settings: TrainConfig, activation: str, parts: Mapping[str, Zoo], data: Mapping[str, Data]
) -> tuple[dict[str, Zoo], dict[str, Array]]:
    """The networks and the images of training and of selection."""
    networks = {"train": usable(settings, activation, parts["train"]), "selection": parts["selection"]}
    return networks, {"train": data["train"].x[: settings.distillation_images], "selection": data["selection"].x}


class Subject(NamedTuple):
    """The autoencoder of one activation: whether it trains -> its loss, and what the losses read."""

    model: models.Autoencoder
    loss: Callable[..., Any]
    rows: dict[str, Any]


def _subject(config: Config, activation: str, parts: Mapping[str, Zoo], data: Mapping[str, Data]) -> Subject:
    settings = config.train
    networks, shown = _seen(settings, activation, parts, data)
    model = autoencoders.make_model(config.model, networks["train"])
    distillation = functools.partial(losses.distillation, model, temperature=settings.temperature)

    def loss(*, train: bool) -> Any:
        if not train:
            return distillation(shown["selection"], train=False)
        return distillation(shown["train"], images_per_step=min(settings.images_per_step, len(shown["train"])))

    rows = {
        split: (cnns.params, losses.teacher_logits(cnns.arch, cnns.params, shown[split]))
        for split, cnns in networks.items()
    }
    return Subject(model, loss, rows)


# --- scoring ------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What one method does to a pair, at every point of the path [points], as it is and with REPAIR.

    Attributes:
      loss: The loss on the images for scoring.
      accuracy: The accuracy there.
      repaired_loss: The loss with REPAIR by the path's own end points.
      repaired_accuracy: The accuracy with it.
    """

    loss: Any
    accuracy: Any
    repaired_loss: Any
    repaired_accuracy: Any


def score(
    config: Config,
    trained: Trained,
    aligners: Mapping[str, Trained],
    parts: Mapping[str, Zoo],
    data: Mapping[str, Data],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of one activation, on networks and images that neither training nor selection has seen."""
    settings, arch = config.evaluation, trained.model.arch
    last = {name: part[part.records["step"] == part.records["step"].max()] for name, part in parts.items()}
    keys = runs.keys(config.seed + 1)
    ranked = np.argsort(-last["scoring"].records["selection_accuracy"], kind="stable")[: settings.best]
    first, second = _pairs(config, last["scoring"], ranked)
    mesh = runs.device_mesh(config)
    at_once = min(64, len(last["scoring"]))
    read = evaluation.make_read(trained.model, trained.variables, networks_at_once=at_once, mesh=mesh)
    whole = np.mean([part.records["scoring_accuracy"] for part in (first, second)], 0)
    best_of_training = int(np.argmax(last["train"].records["selection_accuracy"]))
    fixed = jax.tree.map(lambda leaf: np.asarray(leaf)[best_of_training], last["train"].params)
    methods = _methods(settings, trained, aligners, fixed, data["train"].x, mesh)
    examples = data["train"].x[: settings.examples]
    follow = {
        reader: make_follow(arch, reader, data["scoring"], examples, settings.points, mesh)
        for reader in {method.network for method in methods.values()}
    }
    merging = _merge(methods, follow, (read(first.params), read(second.params)), whole, keys)

    decoded = _decoded_accuracy(arch, read, last["scoring"], data["scoring"], mesh)
    recorded = last["scoring"].records["scoring_accuracy"]
    chosen = jax.tree.map(lambda leaf: leaf[ranked[: settings.orbits]], last["scoring"].params)
    copies = evaluation.make_transformed_copies(arch, mesh=mesh)
    spread = evaluation.orbit_spread(copies, read, chosen, next(keys), settings.orbit_size)
    spread.pop("latent")
    tau = stats.kendalltau(decoded, recorded).statistic
    return {
        "distillation": {
            "accuracy_error": float(np.abs(decoded - recorded).mean()),
            "kendall_tau": float(tau) if np.isfinite(tau) else None,
        },
        "orbit": spread,
        "end_points": float(whole.mean()),
        "merging": merging,
    }, {"decoded": decoded, "recorded": recorded}


def _methods(
    settings: EvaluationConfig,
    trained: Trained,
    aligners: Mapping[str, Trained],
    fixed: Params,
    inputs: Array,
    mesh: Mesh | None,
) -> dict[str, Method]:
    """Those that compare functions and the learned ones among all others."""
    arch = trained.model.arch
    x = inputs[: settings.function_examples]
    make_search = evaluation.make_search(arch, x, mesh, **_search_options(settings))
    learned = alignment.make_methods(aligners, make_search, networks_at_once=settings.pairs, mesh=mesh)
    further = by_function(settings, arch, inputs, mesh) | learned
    examples = inputs[: settings.examples]
    return all_methods(arch, trained.model, trained.variables, fixed, examples, further, mesh)


def _pairs(config: Config, networks: Zoo, ranked: np.ndarray) -> tuple[Zoo, Zoo]:
    """Random pairs of the best networks: the first ones, and the second ones."""
    rng = np.random.default_rng(config.seed)
    drawn = [rng.choice(ranked, 2, replace=False) for _ in range(config.evaluation.pairs)]
    first, second = (networks[np.array([pair[side] for pair in drawn])] for side in (0, 1))
    return first, second


def _merge(
    methods: Mapping[str, Method],
    follow: Mapping[Any, Any],
    members: tuple[Member, Member],
    original: np.ndarray,
    keys: Iterator[Key],
) -> dict[str, Any]:
    """Every method on every pair."""
    merging = {}
    with progress.bar("Merging", len(methods) * len(original), "pairs") as advance:
        for name, method in methods.items():
            ends = method.end_points(*members)
            begin = time.process_time()
            jax.block_until_ready(method.end_points(*members))  # by programs that are compiled
            milliseconds = 1000 * (time.process_time() - begin) / len(original)
            scores = summary(follow[method.network](*ends), original, next(keys))
            advance(len(original), method.label)
            merging[name] = {"label": method.label, "cpu_milliseconds": milliseconds, **scores}
    return merging


def _decoded_accuracy(arch: Architecture, read: Any, networks: Zoo, given: Data, mesh: Mesh | None) -> np.ndarray:
    score_all = cnn_zoo.make_scores(arch, given, mesh)
    return np.asarray(score_all(read(networks.params).decoded).accuracy)


def all_methods(
    arch: Architecture,
    model: models.Autoencoder,
    variables: Any,
    fixed: Params,
    examples: Array,
    further: Mapping[str, Method] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Method]:
    """Those of `evaluation.methods`, with further ones after weight matching, and matching by activations."""

    def by_activations(params: Params, target: Params) -> Matching:
        return matching.activation_matching(arch, params, target, examples)

    others = evaluation.methods(arch, model, variables, fixed, further, mesh=mesh)
    activations = evaluation.pairwise("matching by activations", _one_by_one(arch, by_activations, mesh))
    return {"naive": others["naive"], ACTIVATIONS: activations} | others


def by_function(
    settings: EvaluationConfig, arch: Architecture, inputs: Array, mesh: Mesh | None = None
) -> dict[str, Method]:
    """The methods that compare what merged networks compute with the networks' own outputs, without labels."""
    x, steps, key = inputs[: settings.function_examples], settings.function_steps, jax.random.key(0)
    distance, examples, options = matching.cross_entropy, inputs[: settings.examples], _search_options(settings)

    def sinkhorn(params: Params, target: Params) -> Matching:
        return matching.sinkhorn_matching(arch, params, target, key, x=x, distance=distance, num_steps=steps)

    def straight_through(params: Params, target: Params) -> Matching:
        return matching.straight_through_matching(
            arch, params, target, x=x, key=key, distance=distance, num_steps=steps
        )

    def search(params: Params, target: Params, **more: Any) -> Matching:
        return matching.search_matching(arch, params, target, x, key, **options, **more)

    def from_activations(params: Params, target: Params) -> Matching:
        return search(params, target, start=matching.activation_matching(arch, params, target, examples))

    every = {
        "sinkhorn_function": ("Sinkhorn on the function", sinkhorn),
        "straight_through_function": ("straight-through on the function", straight_through),
        "search": ("search from weights", search),
        "search_activations": ("search from activations", from_activations),
        "search_gradient": ("search after gradient steps", functools.partial(search, gradient_steps=steps)),
    }
    return {name: evaluation.pairwise(label, _one_by_one(arch, match, mesh)) for name, (label, match) in every.items()}


def _search_options(settings: EvaluationConfig) -> dict[str, Any]:
    return {
        "distance": matching.cross_entropy,
        "times": (0.5,),
        "candidates": settings.search_candidates,
        "max_sweeps": settings.search_sweeps,
        "kicks": settings.search_kicks,
    }


def _one_by_one(
    arch: Architecture, match: Callable[[Params, Params], Matching], mesh: Mesh | None
) -> Callable[[Params, Params], Params]:
    """(stacked params, stacked targets) -> the params moved by the matchings, one pair after the other."""

    def one(pair: tuple[Params, Params]) -> Params:
        return symmetry.act(arch, match(*pair).element, pair[0])

    return runs.by_rows(lambda stack, targets: jax.lax.map(one, (stack, targets)), mesh)


def make_follow(
    arch: Architecture, read: Any, given: Data, examples: Array, points: int, mesh: Mesh | None = None
) -> Callable[[Any, Any], Scored]:
    """(starts, ends) of pairs -> their `Scored`; compiled. `read` returns the network at a point of the path.

    One pair is computed after the other, by each device of a mesh.
    """

    def follow(start: Any, end: Any) -> Scored:
        ends = stacks.stack(dict(read(start)), dict(read(end)))

        def at(t: Array) -> tuple[Array, ...]:
            params = read(merge.lerp(start, end, t))
            mended = merge.repair(arch, params, ends, examples, weights=jnp.stack([1 - t, t]))
            return *classifiers.score(arch, params, *given), *classifiers.score(arch, mended, *given)

        return Scored(*jax.lax.map(at, jnp.linspace(0, 1, points)))

    if mesh is not None:
        return runs.by_rows(lambda *stacks: jax.lax.map(lambda pair: follow(*pair), stacks), mesh)
    one = jax.jit(follow)

    def each(*stacks: Any) -> Scored:
        stacks = jax.tree.map(np.asarray, stacks)
        count = len(jax.tree.leaves(stacks)[0])
        rows = [one(*jax.tree.map(lambda leaf, pair=pair: leaf[pair], stacks)) for pair in range(count)]
        return Scored(*(np.stack(values) for values in zip(*rows, strict=True)))

    return each


def summary(paths: Scored, original: np.ndarray, key: Key) -> dict[str, Any]:
    """Means over pairs, with 95 % bootstrap intervals: at t = 1/2, of the barriers, of what the end points lost."""
    summaries: dict[str, Any] = {}
    for kind, loss, accuracy in (
        ("plain", paths.loss, paths.accuracy),
        ("repaired", paths.repaired_loss, paths.repaired_accuracy),
    ):
        half = accuracy.shape[1] // 2
        values = {
            "accuracy": accuracy[:, half],
            "loss": loss[:, half],
            "barrier": evaluation.heights(loss),
            "end_point_gap": original - accuracy[:, [0, -1]].mean(1),
        }
        rows = np.stack([value.astype(np.float32) for value in values.values()])
        summaries[kind] = {
            **dict(zip(values, evaluation.intervals(rows, key), strict=True)),
            "path_accuracy": accuracy.mean(0).tolist(),
            "path_loss": loss.mean(0).tolist(),
        }
    return summaries


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    settings = config.evaluation
    if settings.points % 2 == 0 or settings.points < 3 or settings.best < 2:
        raise ValueError(
            f"evaluation.points is {settings.points}, best {settings.best}; expected an odd number of points >= 3, so "
            "that one of them is t = 1/2, and two networks or more."
        )
    if not set(config.activations) <= {"relu", "tanh"} or not config.activations:
        raise ValueError(f"activations are {config.activations}; expected 'relu', 'tanh' or both.")


if __name__ == "__main__":
    watch.command(main, PRESETS)
