"""INRs of images are classified by four encoders of one size, which differ in the symmetry that they follow.

    python -m experiments.classify digits                    # scikit-learn's digits, no files needed
    python -m experiments.classify mnist --data mnist.npz    # INRs of 28 x 28 images; needs a GPU
    python -m experiments.classify tiny                      # a minute

Scale-equivariant, permutation-only, symmetry-ablated (arXiv 2406.10685, section 6) and function-query encoders are
trained alike, each with several seeds, and scored on networks of unseen images, plain and moved by random elements of
their group. Fits start from independent random networks, so that an orbit's members are equally likely: in expectation
moving the networks changes no encoder's accuracy, but it shows whether a prediction belongs to the function. Everything
lands in `--out`: the zoos, a file for every finished pair of encoder and seed, results.json and report.html.
`--resume` goes on where a run stopped.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
import tyro
from flax import linen as nn
from matplotlib.figure import Figure

from experiments import progress, report, runs
from experiments.runs import ZooConfig
from jax_scalegmn import architecture, baselines, builders, losses, models, symmetry, train, zoo
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.layers import Canonical
from jax_scalegmn.types import Key, LossFn
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoders: the scale-equivariant one, whose number of parameters the others match."""

    features: int = 16
    num_layers: int = 3
    dropout: float = 0.0
    queries: int = 64
    """Learned inputs of the function-query encoder."""
    query_layers: int = 2
    """Mlps in sequence that read the outputs there."""
    tolerance: float = 0.03
    """Largest relative difference between the encoders' numbers of parameters."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(runs.TrainConfig):
    """The training, the same for all encoders: chosen for the scale-equivariant one, not for each of the others."""

    epochs: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 100
    augment: bool = False
    """Whether every network of every batch is moved by a random element of its full group."""


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    seeds: int = 3
    """Trainings of every encoder, each with an initialisation and an order of batches of its own; the zoos are one."""
    copies: int = 4
    """Random group elements that move every scoring network, the same for all encoders and seeds."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


PRESETS = {
    "digits": (
        "scikit-learn's digits, 8 x 8; minutes on two cores",
        Config(Path("runs/classify-digits"), zoo=ZooConfig(selection_images=200)),
    ),
    "mnist": (
        "28 x 28 images; needs --data, and a GPU",
        Config(
            Path("runs/classify-mnist"),
            zoo=ZooConfig(
                (2, 32, 32, 1), steps=1000, train_fits=1, selection_images=5000, scoring_images=10_000, chunk=32
            ),
            model=ModelConfig(64, 4, dropout=0.2, queries=256),
            train=TrainConfig(128, epochs=50, learning_rate=1e-3, warmup_steps=1000, micro_batch=None),
        ),
    ),
    "tiny": (
        "a few digits in a minute, to try the machinery",
        Config(
            Path("runs/classify-tiny"),
            zoo=ZooConfig((2, 6, 6, 1), steps=60, train_fits=2, train_images=32, selection_images=8, scoring_images=8),
            seeds=2,
            copies=2,
            model=ModelConfig(8, 1, queries=16),
            train=TrainConfig(16, epochs=2, warmup_steps=2, micro_batch=None),
        ),
    ),
}

LABELS = {
    "equivariant": "scale-equivariant",
    "permutation": "permutation-only",
    "ablated": "symmetry-ablated",
    "query": "function-query",
}
MEASURES = {"accuracy": "accuracy %", "moved_accuracy": "moved %", "agreement": "same %"}

# (features, width of hidden layers) -> the model.
Make: TypeAlias = Callable[[int, int], nn.Module]


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which also stand in config.out / "results.json"."""
    start = time.perf_counter()
    _check(config)
    images = runs.load_images(config)
    classes = 1 + max(int(one.labels.max()) for one in images.values())
    runs.claim(config)
    arch = builders.siren(config.zoo.widths, w0=config.zoo.w0)
    with progress.Interruption() as interruption:
        zoos = {split: runs.fit_zoo(config, arch, split, images[split], interruption) for split in images}
        zoo_seconds = time.perf_counter() - start
        encoders = matched_encoders(config.model, arch, classes, zoo.scales(zoos["train"]))
        pairs = train_pairs(config, encoders, zoos, interruption)
    shares = np.bincount(zoos["scoring"].records["label"]) / len(zoos["scoring"])
    results = {
        "config": runs.plain(config),
        "environment": runs.environment(),
        "zoo": {split: runs.describe_zoo(one) for split, one in zoos.items()},
        "largest_class_share": float(shares.max()),
        "encoders": {name: _summary(name, encoders[name], pairs[name]) for name in encoders},
        "seconds": {
            "zoo": zoo_seconds,
            "training": sum(pair["seconds"] for several in pairs.values() for pair in several),
            "total": time.perf_counter() - start,
        },
    }
    runs.write_json(config.out / "results.json", results)
    title = f"Classifying INRs {'-'.join(map(str, config.zoo.widths))}"
    report.write_page(config.out / "report.html", title, _sections(results))
    progress.console.print(_table(results))
    progress.console.print(f"Report: {config.out / 'report.html'}, numbers: {config.out / 'results.json'}")
    return results


# --- encoders -----------------------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """One of the encoders, with what it was matched by."""

    model: nn.Module
    features: int | None
    hidden: int
    parameters: int


def matched_encoders(
    settings: ModelConfig, arch: Architecture, classes: int, scales: tuple[float, ...]
) -> dict[str, Encoder]:
    """The four encoders, with as many parameters as the scale-equivariant one has.

    Raises:
      ValueError: if no width of an encoder comes within the tolerance.
    """

    def gmn(arch: Architecture, **options: Any) -> Make:
        def make(features: int, hidden: int) -> nn.Module:
            read = models.ScaleGMN(
                arch, features, settings.num_layers, hidden=hidden, dropout=settings.dropout, **options
            )
            return models.Encoder(read, classes, scales=scales)

        return make

    def query(_: int, hidden: int) -> nn.Module:
        shape = (arch.neurons[0].width,)
        return baselines.QueryEncoder(
            arch, settings.queries, shape, hidden, classes, settings.query_layers, settings.dropout
        )

    shapes = [jax.ShapeDtypeStruct(arch.shape(parameter), jnp.float32) for parameter in arch.parameters]
    example = architecture.pack(arch, shapes)
    make: dict[str, Make] = {
        "equivariant": gmn(arch),
        "permutation": gmn(architecture.restrict(arch, Scaling.PERMUTATION)),
        "ablated": gmn(arch, canonical=Canonical.ABLATED),
        "query": query,
    }
    size = settings.features
    target = baselines.num_parameters(make["equivariant"](size, size), example)
    return {name: _matched(name, make[name], example, size, target, settings.tolerance) for name in LABELS}


def _matched(name: str, make: Make, example: Any, size: int, target: int, tolerance: float) -> Encoder:
    """The size itself where it has as many parameters as the target.

    Otherwise features and hidden width alike as near as they come, and then the hidden width alone.
    """
    model = make(size, size)
    if baselines.num_parameters(model, example) == target:
        return Encoder(model, size, size, target)
    width = baselines.match_size(lambda width: make(width, width), example, target)
    found = []
    for features in [width, *({width - 1, width + 1} - {0})]:
        hidden = baselines.match_size(functools.partial(make, features), example, target)
        model = make(features, hidden)
        found.append(Encoder(model, features, hidden, baselines.num_parameters(model, example)))
        if abs(found[-1].parameters / target - 1) <= tolerance:
            return found[-1]._replace(features=None) if isinstance(model, baselines.QueryEncoder) else found[-1]
    best = min(found, key=lambda encoder: abs(encoder.parameters - target))
    raise ValueError(
        f"The {LABELS[name]} encoder has {best.parameters} parameters at best for the scale-equivariant one's "
        f"{target}, which model.tolerance={tolerance:g} does not allow. Change model.features, or raise the tolerance."
    )


# --- training and scoring -----------------------------------------------------------------------------------------


def train_pairs(
    config: Config, encoders: Mapping[str, Encoder], zoos: Mapping[str, Zoo], interruption: progress.Interruption
) -> dict[str, list[dict[str, Any]]]:
    """What every encoder reaches with every seed; pairs that a former run finished are read instead."""
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    folder, total = config.out / "pairs", len(encoders) * config.seeds
    with progress.bar("Trainings", total * config.train.epochs, "epochs") as advance:

        def behind_epoch(pair: str, note: str) -> None:
            advance(1, f"{pair}: {note}")
            finished = len(list(folder.glob("*.json")))
            interruption.stop_if_requested(f"{finished} of {total} pairs of encoder and seed")

        for name, encoder in encoders.items():
            program = None
            for seed in range(config.seeds):
                path = folder / f"{name}-{seed}.json"
                if path.exists():
                    pair = _read_pair(path)
                    advance(config.train.epochs, "read")
                else:
                    program = program or _program(config, encoder, zoos)
                    shown = functools.partial(behind_epoch, f"{LABELS[name]}, seed {seed}")
                    pair = _train_pair(config, program, seed, zoos, shown)
                    runs.write_json(path, pair)
                pairs[name].append(pair)
    return pairs


class Program(NamedTuple):
    """What the trainings of one encoder share, so that its seeds are compiled once."""

    init: Callable[[Key], train.State]
    step: train.Step
    validate: Callable[[Any, Any], Any]
    predict: Callable[[Any, Any, Any], Any]


def _program(config: Config, encoder: Encoder, zoos: Mapping[str, Zoo]) -> Program:
    settings, model, arch = config.train, encoder.model, zoos["train"].arch
    tx = settings.make_optimizer(len(zoos["train"]))
    loss = losses.classification_loss(model)
    validate = train.make_evaluation(losses.classification_loss(model, train=False))

    def predict(variables: Any, stack: Any, keys: Any) -> Any:
        """Predictions [networks, 1 + copies]: of every network as it is, then of its moved copies."""

        def one(row: Any) -> Any:
            params, keys = row
            moved = jax.vmap(lambda key: symmetry.act(arch, symmetry.random(arch, key), params))(keys)
            copies = jax.tree.map(lambda own, others: jnp.concatenate([own[None], others]), dict(params), moved)
            return jax.vmap(functools.partial(model.apply, variables))(copies).argmax(-1)

        return jax.lax.map(one, (stack, keys), batch_size=16)

    step = train.make_step(augmented(arch, loss) if settings.augment else loss, tx, micro_batch=settings.micro_batch)
    example = jax.tree.map(lambda leaf: leaf[0], zoos["train"].params)
    init = jax.jit(functools.partial(train.init, model, tx, example))
    return Program(init, step, validate, jax.jit(predict))


def augmented(arch: Architecture, loss_fn: LossFn) -> LossFn:
    """A loss of (variables, (params, label), key) at a random member of the network's orbit."""

    def moved(variables: Any, row: Any, key: Any) -> Any:
        element_key, key = jax.random.split(key)
        params, label = row
        element = symmetry.random(arch, element_key)
        return loss_fn(variables, (symmetry.act(arch, element, params), label), key)

    return moved


def _train_pair(
    config: Config, program: Program, seed: int, zoos: Mapping[str, Zoo], behind_epoch: Callable[[str], None]
) -> dict[str, Any]:
    """Trains with one seed; scores the epoch with the highest selection accuracy, of several that of least loss."""
    start = time.perf_counter()
    settings = config.train
    data = {split: (one.params, jnp.asarray(one.records["label"])) for split, one in zoos.items()}
    state = program.init(jax.random.fold_in(jax.random.key(config.seed), seed))
    epochs = train.fit(program.step, state, data["train"], batch_size=settings.batch_size, num_epochs=settings.epochs)
    trained = len(zoos["train"]) // settings.batch_size * settings.batch_size
    history: list[dict[str, float]] = []
    best, variables = (-math.inf, -math.inf), None
    begin = time.perf_counter()
    for epoch in epochs:
        state, metrics = jax.block_until_ready(epoch)
        seconds = time.perf_counter() - begin
        selection = program.validate(state.variables, data["selection"])
        numbers = {f"train_{name}": float(value) for name, value in metrics.items()}
        numbers |= {f"selection_{name}": float(value) for name, value in selection.items()}
        if not math.isfinite(numbers["selection_loss"]):
            raise FloatingPointError(
                f"The selection loss is {numbers['selection_loss']} behind epoch {len(history) + 1} of seed {seed}: "
                "training diverged. Lower train.learning_rate."
            )
        history.append({**numbers, "seconds": seconds})
        reached = (numbers["selection_accuracy"], -numbers["selection_loss"])
        if reached > best:  # copied, since the next epoch takes the buffers
            best, best_epoch, variables = reached, len(history), jax.tree.map(jnp.copy, state.variables)
        behind_epoch(f"{reached[0]:.1%} of the selection networks")
        begin = time.perf_counter()
    scoring, labels = zoos["scoring"].params, zoos["scoring"].records["label"]
    copy_keys = jax.random.split(jax.random.key(config.seed + 1), (len(labels), config.copies))
    predicted = np.asarray(program.predict(variables, scoring, copy_keys))
    plain, moved = predicted[:, :1], predicted[:, 1:]
    labels = labels[:, None]
    return {
        "seed": seed,
        "best_epoch": best_epoch,
        "selection_accuracy": best[0],
        "accuracy": float((plain == labels).mean()),
        "moved_accuracy": float((moved == labels).mean()),
        "agreement": float((moved == plain).mean()),
        "networks_per_second": trained / statistics.median(epoch["seconds"] for epoch in history),
        "seconds": time.perf_counter() - start,
        "history": history,
    }


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    numbers = {"seeds": config.seeds, "copies": config.copies, "train.epochs": config.train.epochs}
    if min(numbers.values()) < 1:
        raise ValueError(f"Got {numbers}; expected numbers >= 1.")


def _read_pair(path: Path) -> dict[str, Any]:
    try:
        pair: dict[str, Any] = json.loads(path.read_text())
        missing = {"seed", "best_epoch", "seconds", "history", "networks_per_second", *MEASURES} - pair.keys()
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not the JSON of a finished training ({error}). Delete it to train again.") from error
    if missing:
        raise ValueError(f"{path}: lacks {sorted(missing)} of a finished training. Delete it to train again.")
    return pair


def _summary(name: str, encoder: Encoder, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    def spread(measure: str) -> dict[str, Any]:
        values = [pair[measure] for pair in pairs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "std": deviation, "values": values}

    return {
        "label": LABELS[name],
        "parameters": encoder.parameters,
        "features": encoder.features,
        "hidden": encoder.hidden,
        **{measure: spread(measure) for measure in (*MEASURES, "selection_accuracy", "networks_per_second")},
        "seconds": sum(pair["seconds"] for pair in pairs),
        "seeds": pairs,
    }


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["encoder", "parameters", *MEASURES.values(), "networks/s"]]
    for encoder in results["encoders"].values():
        measures = [_percent(encoder[measure]) for measure in MEASURES]
        speed = f"{encoder['networks_per_second']['mean']:,.0f}"
        rows.append([encoder["label"], f"{encoder['parameters']:,}", *measures, speed])
    return rows


def _percent(measure: Mapping[str, Any]) -> str:
    mean = f"{100 * measure['mean']:.1f}"
    return mean if measure["std"] is None else f"{mean} ± {100 * measure['std']:.1f}"


def _table(results: Mapping[str, Any]) -> rich.table.Table:
    """The means and standard deviations over seeds, for a terminal."""
    head, *rows = _rows(results)
    title = f"INRs of unseen images, {results['config']['seeds']} seeds"
    shown = rich.table.Table(head[0], title=title, box=rich.box.SIMPLE)
    for name in head[1:]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    config, zoos = results["config"], results["zoo"]
    counts = ", ".join(f"{one['networks']} networks of {one['images']} images for {name}" for name, one in zoos.items())
    yield (
        f"<p>{counts}; no image serves twice. Always naming the most frequent class would be right for "
        f"{results['largest_class_share']:.1%} of the scoring networks. Training "
        f"{'moved' if config['train']['augment'] else 'did not move'} networks by random group elements.</p>"
    )
    yield "<h2>Networks of unseen images</h2>" + report.html_table(_rows(results))
    yield (
        "<p class=note>All encoders are trained alike, with options chosen for the scale-equivariant one. "
        f"Mean ± standard deviation over {config['seeds']} trainings on the same networks, each scored "
        "behind the epoch with the highest selection accuracy. Moved: every scoring network is moved by "
        f"{config['copies']} random elements of its group, permutations and signs, that leave its function as it is. "
        "Same: how many of these copies are given the class that the network itself is given. Networks/s: in training, "
        "median over epochs.</p>"
    )
    yield "<h2>Training</h2>" + report.html_image(_curves(results))
    yield report.html_settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


def _curves(results: Mapping[str, Any]) -> Figure:
    """The accuracy on the selection networks behind every epoch: the seeds' mean and range."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for encoder in results["encoders"].values():
        reached = np.array([[epoch["selection_accuracy"] for epoch in pair["history"]] for pair in encoder["seeds"]])
        epochs = np.arange(1, reached.shape[1] + 1)
        (line,) = axes.plot(epochs, reached.mean(0), label=encoder["label"])
        axes.fill_between(epochs, reached.min(0), reached.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="accuracy on selection networks", ylim=(0, 1))
    axes.legend()
    return figure


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
