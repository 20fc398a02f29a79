"""The test accuracy of CNNs is predicted from their weights by four encoders of equal size.

    python -m experiments.generalization digits                          # scikit-learn's digits, no files needed
    python -m experiments.generalization cifar --data cifar10_gray.npz   # gray CIFAR-10
    python -m experiments.generalization tiny                            # a minute

Zoos of relu and of tanh CNNs with sampled hyper-parameters are kept at several moments of their training, as in the
Small CNN Zoo (arXiv 2002.11448). Scale-equivariant, permutation-only and symmetry-ablated encoders (arXiv 2406.10685,
section 6) and one of the weights' statistics (arXiv 2002.11448) are trained alike, each with several seeds, and scored
on unseen CNNs, plain and moved by random elements of their group, which change no CNN's accuracy. The folder
`--out` receives everything: the zoos, a file for every finished pair of encoder and seed, results.json and report.html.
`--resume` continues a run that stopped; `--zoo-from` reads the zoos of another run.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.stats
import sklearn.metrics
from flax import linen as nn
from jax.sharding import Mesh

from experiments import autoencoders, cnn_zoo, compile_only, encoders, report, runs, tables, watch
from experiments.cnn_zoo import ZooConfig
from jax_scalegmn import architecture, zoo
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import Canonical, baselines
from jax_scalegmn.training import losses
from jax_scalegmn.zoo import Zoo

LABELS = {
    "equivariant": "scale-equivariant",
    "permutation": "permutation-only",
    "ablated": "symmetry-ablated",
    "statistics": "statistics-of-weights",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig(autoencoders.ScaleGMNConfig):
    """The encoders: the scale-equivariant one, whose number of parameters the others match."""

    features: int = 16
    """The number of entries of a node or edge feature."""
    dropout: float = 0.2
    """The rate on the node features after every layer during training."""
    statistics_layers: int = 3
    """The number of mlps in sequence that read the weights' statistics."""
    tolerance: float = 0.03
    """The largest relative difference between the encoders' numbers of parameters."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(encoders.TrainConfig):
    """The training of every encoder."""

    batch_size: int = 32
    epochs: int = 30
    learning_rate: float = 3e-3
    warmup_steps: int = 20


@dataclasses.dataclass(frozen=True)
class Config(cnn_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    zoo_from: Path | None = None
    """The folder of another finished run on CNNs, with the same data and zoo options, whose zoos are used."""
    seeds: int = 3
    """The number of trainings of every encoder, each with its own initialization and order of batches."""
    copies: int = 4
    """The number of random group elements that move every scoring network, the same for all encoders and seeds."""
    encoders: tuple[str, ...] = tuple(LABELS)
    """The encoders that are trained, all with as many parameters as the equivariant one."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


PRESETS = {
    "digits": (
        "scikit-learn's digits, 16 x 16; minutes on two cores",
        Config(Path("runs/generalization-digits")),
    ),
    "cifar": (
        "gray CIFAR-10; needs --data",
        Config(Path("runs/generalization-cifar"), zoo=cnn_zoo.CIFAR),
    ),
    "accurate": (
        "CNNs of `experiments.cnn_zoo cifar`, above 50 % of CIFAR-10, by --zoo-from; needs --data",
        Config(Path("runs/generalization-accurate"), zoo=cnn_zoo.ACCURATE),
    ),
    "tiny": (
        "a few digits in a minute or two, to try the machinery",
        Config(
            Path("runs/generalization-tiny"),
            quick_compilation=True,
            zoo=ZooConfig(
                train_images=64,
                selection_images=16,
                scoring_images=32,
                channels=(1, 4, 4),
                networks=16,
                steps=30,
                checkpoints=2,
                batch_size=8,
                part=8,
            ),
            seeds=2,
            copies=2,
            model=ModelConfig(5, 1, statistics_layers=1),
            train=TrainConfig(8, epochs=3, learning_rate=3e-2, warmup_steps=2, micro_batch=None),
        ),
    ),
}

OBJECTIVE = ("activations.relu.encoders.statistics.tau.mean", "maximize")  # advised to sweeps

MEASURES = {
    "tau": "τ",
    "moved_tau": "moved τ",
    "r2": "R²",
    "moved_r2": "moved R²",
    "l1": "L1",
    "moved_l1": "moved L1",
}
TARGET = "scoring_accuracy"  # the record of a zoo that is predicted
zoo_key = cnn_zoo.zoo_key


def fit_zoo(config: Config) -> None:
    """Trains the CNNs of a config into its folder, for all trials of a sweep; none if it reads those of another run."""
    if config.zoo_from is None:
        cnn_zoo.fit_zoos(config)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    _check(config)
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    folder = _zoo_folder(config)
    data = cnn_zoo.load_data(config)
    for activation in config.activations:
        # An unknown one is refused before the folder is made.
        cnn_zoo.architecture_of(config, activation, cnn_zoo.num_classes(data))
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = {name: cnn_zoo.fit_zoo(config, name, data, folder, run.interruption) for name in config.activations}
        results = {name: train_and_score(run, config, name, cnns) for name, cnns in zoos.items()}
        summaries = [encoder for result in results.values() for encoder in result["encoders"].values()]
        seconds = {"training": sum(encoder["seconds"] for encoder in summaries)}
        return run.finish(
            {"activations": results, "seconds": seconds},
            "Predicting the test accuracy of CNNs",
            _sections,
            _tables,
        )


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The programs of the experiment, to be compiled and not run; those of the encoders for every activation."""
    images = runs.unread_images(config, config.zoo)
    for activation in config.activations:
        arch = cnn_zoo.architecture_of(config, activation, 1 + int(images.labels.max()))
        params = jax.tree.map(lambda leaf: np.ones((2, *leaf.shape), leaf.dtype), compile_only.params_of(arch))
        networks = Zoo(arch, params, {TARGET: np.arange(2.0)}, {})
        matched = {
            name: encoder._replace(label=f"{activation}, {encoder.label}")
            for name, encoder in matched_encoders(config.model, networks, config.encoders).items()
        }
        yield from encoders.training_steps(mesh, config.train, task(networks), matched, arch, np.float32)
        yield cnn_zoo.training_step(config, mesh, activation, images)


def train_and_score(run: runs.Run, config: Config, activation: str, cnns: Zoo) -> dict[str, Any]:
    """All that is found on the CNNs of one activation, as JSON values."""
    parts = cnn_zoo.split(cnns, config.seed)
    matched = matched_encoders(config.model, parts["train"], config.encoders)
    pairs = encoders.train_pairs(
        config,
        task(parts["train"]),
        matched,
        parts,
        config.out / "pairs" / activation,
        run.interruption,
        description=f"Encoders of {activation} CNNs",
    )
    summaries = {name: encoders.summary(matched[name], pairs[name], MEASURES) for name in matched}
    return _describe(cnns, parts) | {"encoders": summaries}


# --- encoders -----------------------------------------------------------------------------------------------------


def matched_encoders(
    settings: ModelConfig, networks: Zoo, names: Iterable[str] = LABELS
) -> dict[str, encoders.Encoder]:
    """The named encoders, all four by default, with as many parameters as the scale-equivariant one has.

    Args:
      settings: The sizes.
      networks: Networks like those that they read.
      names: Those that are wanted.

    Raises:
      ValueError: If no width of an encoder comes within the tolerance.
    """
    arch, scales = networks.arch, zoo.scales(networks)
    standard = baselines.standardization(arch, networks.params)

    def gmn(arch: architecture.Architecture, **options: Any) -> encoders.Make:
        return encoders.gmn(arch, 1, scales, settings, **options)

    def statistics(_: int, hidden: int) -> nn.Module:
        return baselines.StatisticsEncoder(arch, hidden, 1, settings.statistics_layers, settings.dropout, standard)

    make: dict[str, encoders.Make] = {
        "equivariant": gmn(arch),
        "permutation": gmn(architecture.restrict(arch, Scaling.PERMUTATION)),
        "ablated": gmn(arch, canonical=Canonical.ABLATED),
        "statistics": statistics,
    }
    return encoders.match(make, names, LABELS, arch, settings.features, settings.tolerance)


def task(networks: Zoo) -> encoders.Task:
    """The regression of the accuracy, which is standardized over these networks inside the loss."""
    accuracy = networks.records[TARGET].astype(float)
    mean, std = float(accuracy.mean()), float(accuracy.std()) or 1.0
    return encoders.Task(
        loss=losses.regression,
        target=lambda one: ((one.records[TARGET] - mean) / std).astype(np.float32),
        read=lambda outputs: outputs[..., 0] * std + mean,
        selection={"selection_loss": -1},
        note="selection loss {selection_loss:.3f}",
        score=lambda plain, moved, one: score(plain, moved, one.records[TARGET]),
        measures=(*MEASURES, "predicted"),
    )


# --- scoring ------------------------------------------------------------------------------------------------------


def score(plain: np.ndarray, moved: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """The measures of predictions [networks] and [networks, copies], the latter means over copies, as JSON values."""
    columns = list(moved.T)
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
        "tau": kendall,
        "r2": explained,
        "l1": lambda predicted, truth: float(np.abs(predicted.astype(float) - truth).mean()),
    }
    found: dict[str, Any] = {"predicted": [float(value) for value in plain]}
    for name, measure in measures.items():
        found[name] = measure(plain, truth)
        found[f"moved_{name}"] = encoders.spread([measure(column, truth) for column in columns])["mean"]
    return found


def kendall(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """Kendall's tau-b; None where it is undefined since all predictions, or all truths, are equal."""
    if len(np.unique(predicted)) < 2 or len(np.unique(truth)) < 2:
        return None
    return float(scipy.stats.kendalltau(predicted, truth).statistic)


def ceiling(truth: np.ndarray) -> float | None:
    """The largest tau-b that predictions without ties can reach; None where all truths are equal.

    Of n0 pairs, n1 are tied in the truth. At best the other n0 - n1 are concordant, and tau-b, their number over
    sqrt(n0 (n0 - n1)), is sqrt((n0 - n1) / n0).
    """
    count = len(truth)
    pairs = count * (count - 1) / 2
    times = np.unique(truth, return_counts=True)[1]
    untied = pairs - float((times * (times - 1) / 2).sum())
    return math.sqrt(untied / pairs) if untied else None


def explained(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """R²: the share of the truths' variance that predictions explain; None where all truths are equal."""
    if len(np.unique(truth)) < 2:
        return None
    return float(sklearn.metrics.r2_score(truth.astype(float), predicted.astype(float)))


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    encoders.check(config, LABELS)
    if not config.activations or len(set(config.activations)) < len(config.activations):
        raise ValueError(f"activations are {config.activations}; expected one or more, none of them twice.")


def _zoo_folder(config: Config) -> Path:
    """Where the zoos are stored: the run's own folder, or that of another run, whose options must be the same."""
    if config.zoo_from is None:
        return config.out / "zoo"
    path = config.zoo_from / "config.json"
    if not path.is_file() or not (config.zoo_from / "results.json").is_file():
        raise SystemExit(
            f"{config.zoo_from} holds no finished run: config.json or results.json is missing. Name the folder of one "
            "by --zoo-from, or leave it out."
        )
    theirs, mine = json.loads(path.read_text()), runs.plain(config)
    differences = [f"{k}: {theirs.get(k)} there, {mine[k]} here" for k in ("data", "seed") if theirs.get(k) != mine[k]]
    options = theirs.get("zoo", {})
    differences += [f"zoo.{k}: {options.get(k)} there, {v} here" for k, v in mine["zoo"].items() if options.get(k) != v]
    missing = [one for one in config.activations if one not in theirs.get("activations", ())]
    differences += [f"activations: no {', '.join(missing)} there"] if missing else []
    if differences:
        raise SystemExit(f"{config.zoo_from} holds a run with other CNNs ({'; '.join(differences)}). Use the same.")
    return config.zoo_from / "zoo"


def _describe(cnns: Zoo, parts: Mapping[str, Zoo]) -> dict[str, Any]:
    """What is known of the networks of one activation before any encoder is trained."""
    truth, mean = parts["scoring"].records[TARGET], float(parts["train"].records[TARGET].mean())
    return {
        "zoo": cnn_zoo.describe(cnns),
        "parts": {
            name: {"networks": len(np.unique(one.records["model"])), "checkpoints": len(one)}
            for name, one in parts.items()
        },
        "truth": [float(value) for value in truth],
        "ceiling": ceiling(truth),
        "constant_l1": float(np.abs(truth.astype(float) - mean).mean()),
    }


def _tables(results: Mapping[str, Any]) -> list[tables.Table]:
    return [
        encoders.table(
            f"Accuracy of unseen {activation} CNNs, {results['config']['seeds']} seeds; "
            f"τ at most {_number(result['ceiling'])}",
            result["encoders"],
            MEASURES,
            digits=3,
        )
        for activation, result in results["activations"].items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    config = results["config"]
    for (activation, result), table in zip(results["activations"].items(), _tables(results), strict=True):
        counts = ", ".join(
            f"{part['checkpoints']} checkpoints of {part['networks']} networks for {name}"
            for name, part in result["parts"].items()
        )
        yield (
            f"<h2>{activation}</h2><p>{counts}; no network is used twice. Ties between true accuracies leave a τ of "
            f"{_number(result['ceiling'])} at most. Always predicting the mean accuracy of the training networks would "
            f"have an L1 of {result['constant_l1']:.3f}.</p>"
        )
        yield tables.page(table)
        predicted = {
            encoder["label"]: list(zip(result["truth"], encoder["seeds"][0]["predicted"], strict=True))
            for encoder in result["encoders"].values()
        }
        yield report.scatter(predicted, x="true accuracy", y="predicted accuracy", limits=(0.0, 1.0))
        yield encoders.curves(result["encoders"], "selection_loss", "selection loss", log=True)
    yield (
        "<p class=note>All encoders are trained alike, with options chosen for the scale-equivariant one"
        f"{', on networks moved by random group elements' if config['train']['augment'] else ''}. Mean ± standard "
        f"deviation over {config['seeds']} trainings on the same networks, each scored after the epoch with the least "
        "selection loss. τ: Kendall's tau-b. L1: mean absolute error of the accuracy, in [0, 1]. Moved: every scoring "
        f"network is moved by {config['copies']} random elements of its group, permutations with positive scales or "
        "signs, that do not change its function. Networks/s: in training, median over epochs. The dots are the first "
        "seed's predictions, the curves means and ranges over seeds of the squared error, in units of the variance of "
        "the training networks' accuracy.</p>"
    )
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds")})


if __name__ == "__main__":
    watch.command(main, PRESETS)
