"""INRs of images are classified by four encoders of equal size, which differ in the symmetry that they follow.

    python -m experiments.classify digits                    # scikit-learn's digits, no files needed
    python -m experiments.classify mnist --data mnist.npz    # INRs of 28 x 28 images; needs a GPU
    python -m experiments.classify mnist-small --data mnist.npz    # 8,192 of them, with 5, 10, 25 and 100 %
    python -m experiments.classify tiny                      # a minute

Scale-equivariant, permutation-only, symmetry-ablated (arXiv 2406.10685, section 6) and function-query encoders are
trained alike, each with several seeds, and scored on networks of unseen images, plain and moved by random elements of
their group. Fits start from independent random networks, so that an orbit's members are equally likely: in expectation
moving the networks changes no encoder's accuracy, but it shows whether a prediction belongs to the function. With
several `--fractions` all are trained on shares of the training images, with several `--learning-rates` each at the one
that is best for it on the networks for selection. The folder `--out` receives everything: the zoos, a file for every
finished pair of encoder and seed, results.json and report.html. `--resume` continues a run that stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from experiments import autoencoders, compile_only, encoders, inr_zoo, report, runs, tables, watch
from experiments.inr_zoo import ZooConfig
from jax_scalegmn import architecture, zoo
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.models import Canonical, baselines
from jax_scalegmn.training import losses
from jax_scalegmn.zoo import Zoo

LABELS = {
    "equivariant": "scale-equivariant",
    "permutation": "permutation-only",
    "ablated": "symmetry-ablated",
    "query": "function-query",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(autoencoders.ScaleGMNConfig):
    """The encoders: the scale-equivariant one, whose number of parameters the others match."""

    features: int = 16
    """The number of entries of a node or edge feature."""
    queries: int = 64
    """The number of learned inputs of the function-query encoder."""
    query_layers: int = 2
    """The number of mlps in sequence that read the outputs there."""
    tolerance: float = 0.03
    """The largest relative difference between the encoders' numbers of parameters."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(encoders.TrainConfig):
    """The training of every encoder."""

    epochs: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 100


@dataclasses.dataclass(frozen=True)
class Config(inr_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    seeds: int = 3
    """The number of trainings of every encoder, each with its own initialization and order of batches."""
    copies: int = 4
    """The number of random group elements that move every scoring network, the same for all encoders and seeds."""
    encoders: tuple[str, ...] = tuple(LABELS)
    """The encoders that are trained, all with as many parameters as the equivariant one."""
    fractions: tuple[float, ...] = (1.0,)
    """The shares of the training images, each in (0, 1], whose networks are trained on; smaller ones are contained in
    larger ones."""
    learning_rates: tuple[float, ...] = ()
    """The learning rates that every encoder is trained with, once each, at every fraction; it goes on with the one of
    the highest selection accuracy. None: train.learning_rate for all."""
    least_updates: int = 0
    """The number of updates below which no training ends: a small fraction is passed over more often."""
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
            zoo=inr_zoo.PUBLISHED,
            model=ModelConfig(64, 4, dropout=0.2, queries=256),
            train=TrainConfig(128, epochs=50, learning_rate=1e-3, warmup_steps=1000, micro_batch=None),
        ),
    ),
    "mnist-small": (
        "8,192 INRs of 28 x 28 images, shares of them, tuned learning rates; hours on two cores; needs --data",
        Config(
            Path("runs/classify-mnist-small"),
            zoo=inr_zoo.SMALL,
            fractions=(0.05, 0.1, 0.25, 1.0),
            learning_rates=(1e-3, 3e-3, 1e-2),
            least_updates=600,
            train=TrainConfig(32, epochs=6, warmup_steps=50),
        ),
    ),
    "tiny": (
        "a few digits in a minute or two, to try the machinery",
        Config(
            Path("runs/classify-tiny"),
            zoo=inr_zoo.TINY,
            quick_compilation=True,
            seeds=2,
            copies=2,
            model=ModelConfig(8, 1, queries=16),
            train=TrainConfig(16, epochs=2, warmup_steps=2, micro_batch=None),
        ),
    ),
}

OBJECTIVE = ("encoders.equivariant.accuracy.mean", "maximize")  # advised to sweeps

zoo_key, fit_zoo = inr_zoo.zoo_key, inr_zoo.fit_zoo  # of a sweep
MEASURES = {"accuracy": "accuracy %", "moved_accuracy": "moved %", "agreement": "same %"}


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    _check(config)
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    images = runs.load_images(config, config.zoo)
    inr_zoo.check_fits(config.zoo, images["train"], config.train.batch_size)
    fewest = num_images(min(config.fractions), len(images["train"].images)) * config.zoo.train_fits
    inr_zoo.check_batch(fewest, config.train.batch_size)
    classes = 1 + max(int(part.labels.max()) for part in images.values())
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = inr_zoo.fit_all(config, images, run.interruption)
        matched = matched_encoders(
            config.model, zoos["train"].arch, classes, zoo.scales(zoos["train"]), config.encoders
        )
        found = {fraction: at_fraction(config, fraction, matched, zoos, run) for fraction in config.fractions}
        shares = np.bincount(zoos["scoring"].records["label"]) / len(zoos["scoring"])
        trainings = [
            pair for one in found.values() for encoder in one["encoders"].values() for pair in encoder["seeds"]
        ]
        results = {
            "zoo": {split: inr_zoo.describe(part) for split, part in zoos.items()},
            "largest_class_share": float(shares.max()),
            "encoders": found[max(found)]["encoders"],
            "smaller": {f"{fraction:g}": found[fraction] for fraction in sorted(found) if fraction < max(found)},
            "seconds": {"training": sum(pair["seconds"] for pair in trainings)},
        }
        title = f"Classifying INRs {'-'.join(map(str, config.zoo.widths))}"
        return run.finish(results, title, _sections, _tables)


# --- fractions and learning rates ---------------------------------------------------------------------------------


def num_images(fraction: float, images: int) -> int:
    """The number of images in a share of them, one or more."""
    return max(1, round(fraction * images))


def share_of(networks: Zoo, fraction: float, seed: int) -> Zoo:
    """All networks of a random share of the images; smaller shares are contained in larger ones."""
    index = networks.records["image_index"]
    chosen = np.random.default_rng(seed).permutation(np.unique(index))
    return networks[np.isin(index, chosen[: num_images(fraction, len(chosen))])]


def at_fraction(
    config: Config, fraction: float, matched: Mapping[str, encoders.Encoder], zoos: Mapping[str, Zoo], run: runs.Run
) -> dict[str, Any]:
    """What every encoder reaches when it is trained on a share of the training images."""
    own = {**zoos, "train": share_of(zoos["train"], fraction, config.seed)}
    updates = len(own["train"]) // config.train.batch_size
    epochs = max(config.train.epochs, -(-config.least_updates // updates))
    folder = config.out / "pairs" / ("" if fraction == 1 else f"fraction-{fraction:g}")

    def train(names: Iterable[str], rate: float, seeds: int) -> dict[str, list[dict[str, Any]]]:
        settings = dataclasses.replace(config.train, learning_rate=rate, epochs=epochs)
        return encoders.train_pairs(
            dataclasses.replace(config, train=settings, seeds=seeds),
            TASK,
            {name: matched[name] for name in names},
            own,
            folder / f"rate-{rate:g}" if config.learning_rates else folder,
            run.interruption,
            description=f"Trainings, {fraction:.0%} of the images",
        )

    pairs = {} if config.learning_rates else train(matched, config.train.learning_rate, config.seeds)
    tuned: dict[str, dict[str, Any]] = {name: {} for name in matched}
    for name in matched if config.learning_rates else ():
        reached = {rate: _reached(train, name, rate) for rate in config.learning_rates}
        best = max(reached, key=lambda rate: -1.0 if reached[rate] is None else reached[rate])
        pairs |= train([name], best, config.seeds)
        tuned[name] = {"learning_rate": best, "tuning": {f"{rate:g}": value for rate, value in reached.items()}}
    summaries = {
        name: encoders.summary(encoder, pairs[name], (*MEASURES, "selection_accuracy")) | tuned[name]
        for name, encoder in matched.items()
    }
    return {"networks": len(own["train"]), "epochs": epochs, "encoders": summaries}


def _reached(train: Callable[..., Any], name: str, rate: float) -> float | None:
    """What one training with this learning rate reaches on selection networks; None if it diverges."""
    try:
        return float(train([name], rate, 1)[name][0]["selection_accuracy"])
    except FloatingPointError:
        return None


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The programs of the experiment, to be compiled and not run."""
    arch, images = inr_zoo.architecture_of(config.zoo), runs.unread_images(config, config.zoo)
    classes, scales = 1 + int(images.labels.max()), (1.0,) * len(arch.parameters)
    matched = matched_encoders(config.model, arch, classes, scales, config.encoders)
    yield from encoders.training_steps(mesh, config.train, TASK, matched, arch, np.int32)
    yield compile_only.fitting_step(mesh, arch, images.images.shape[1:3], config.zoo.chunk)


# --- encoders -----------------------------------------------------------------------------------------------------


def matched_encoders(
    settings: ModelConfig, arch: Architecture, classes: int, scales: tuple[float, ...], names: Iterable[str] = LABELS
) -> dict[str, encoders.Encoder]:
    """The named encoders, all four by default, with as many parameters as the scale-equivariant one has.

    Raises:
      ValueError: If no width of an encoder comes within the tolerance.
    """

    def gmn(arch: Architecture, **options: Any) -> encoders.Make:
        return encoders.gmn(arch, classes, scales, settings, **options)

    def query(_: int, hidden: int) -> nn.Module:
        shape = (arch.neuron_layers[0].width,)
        return baselines.QueryEncoder(
            arch, settings.queries, shape, hidden, classes, settings.query_layers, settings.dropout
        )

    make: dict[str, encoders.Make] = {
        "equivariant": gmn(arch),
        "permutation": gmn(architecture.restrict(arch, Scaling.PERMUTATION)),
        "ablated": gmn(arch, canonical=Canonical.ABLATED),
        "query": query,
    }
    return encoders.match(make, names, LABELS, arch, settings.features, settings.tolerance)


# --- scoring ------------------------------------------------------------------------------------------------------


def _score(plain: np.ndarray, moved: np.ndarray, networks: Zoo) -> dict[str, Any]:
    labels = networks.records["label"]
    return {
        "accuracy": float((plain == labels).mean()),
        "moved_accuracy": float((moved == labels[:, None]).mean()),
        "agreement": float((moved == plain[:, None]).mean()),
    }


TASK = encoders.Task(
    loss=losses.classification,
    target=lambda networks: networks.records["label"],
    read=lambda logits: logits.argmax(-1),
    selection={"selection_accuracy": 1, "selection_loss": -1},
    note="{selection_accuracy:.1%} of the selection networks",
    score=_score,
    measures=tuple(MEASURES),
)


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    encoders.check(config, LABELS)
    fractions, rates = config.fractions, config.learning_rates
    if not fractions or len(set(fractions)) < len(fractions) or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions are {fractions}; expected one or more in (0, 1], each once, like 0.1 1.")
    if len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates are {rates}; expected each once, or none.")


def _tables(results: Mapping[str, Any]) -> list[tables.Table]:
    seeds = results["config"]["seeds"]
    shown = [encoders.table(f"INRs of unseen images, {seeds} seeds", results["encoders"], MEASURES, 1, 100)]
    return shown + ([_fractions_table(results)] if results["smaller"] else [])


def _fractions_table(results: Mapping[str, Any]) -> tables.Table:
    """Accuracies in % by the share of the training images."""
    largest = f"{max(results['config']['fractions']):g}"
    several = {name: one["encoders"] for name, one in results["smaller"].items()} | {largest: results["encoders"]}
    rows = [
        [LABELS[name], *(encoders.text(own[name]["accuracy"], 1, 100) for own in several.values())]
        for name in results["encoders"]
    ]
    return tables.Table(
        "Accuracy % by the share of the training images",
        ("encoder", *(f"{100 * float(name):g} %" for name in several)),
        rows,
    )


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    config, zoos = results["config"], results["zoo"]
    counts = ", ".join(
        f"{part['networks']} networks of {part['images']} images for {name}" for name, part in zoos.items()
    )
    yield (
        f"<p>{counts}; no image is used twice. Always naming the most frequent class would be right for "
        f"{results['largest_class_share']:.1%} of the scoring networks. Training "
        f"{'moved' if config['train']['augment'] else 'did not move'} networks by random group elements.</p>"
    )
    yield "<h2>Networks of unseen images</h2>" + tables.page(_tables(results)[0])
    rates = "each with the learning rate that is best for it on the networks for selection"
    yield (
        f"<p class=note>All encoders are trained alike, "
        f"{rates if config['learning_rates'] else 'with options chosen for the scale-equivariant one'}. "
        f"Mean ± standard deviation over {config['seeds']} trainings on the same networks, each scored "
        "after the epoch with the highest selection accuracy. Moved: every scoring network is moved by "
        f"{config['copies']} random elements of its group, permutations and signs, that do not change its function. "
        "Same: how many of these copies are assigned the class of the network itself. Networks/s: in training, "
        "median over epochs.</p>"
    )
    for table in _tables(results)[1:]:
        yield f"<h2>{table.title}</h2>" + tables.page(table)
    curves = encoders.curves(results["encoders"], "selection_accuracy", "accuracy on selection networks")
    yield "<h2>Training</h2>" + curves
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


if __name__ == "__main__":
    watch.command(main, PRESETS)
