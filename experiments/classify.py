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
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from flax import linen as nn

import jax_scalegmn as sg
from experiments import encoders, progress, report, runs
from experiments.runs import ZooConfig
from jax_scalegmn import architecture, zoo
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.models import Canonical, baselines
from jax_scalegmn.training import losses
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
class TrainConfig(encoders.TrainConfig):
    """The training of every encoder."""

    epochs: int = 16
    learning_rate: float = 1e-2
    warmup_steps: int = 100


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    seeds: int = 3
    """Trainings of every encoder, each with an initialization and an order of batches of its own; the zoos are one."""
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
                widths=(2, 32, 32, 1), steps=1000, train_fits=1, selection_images=5000, scoring_images=10_000, chunk=32
            ),
            model=ModelConfig(64, 4, dropout=0.2, queries=256),
            train=TrainConfig(128, epochs=50, learning_rate=1e-3, warmup_steps=1000, micro_batch=None),
        ),
    ),
    "tiny": (
        "a few digits in a minute, to try the machinery",
        Config(
            Path("runs/classify-tiny"),
            zoo=ZooConfig(
                widths=(2, 6, 6, 1), steps=60, train_fits=2, train_images=32, selection_images=8, scoring_images=8
            ),
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


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which also stand in config.out / "results.json"."""
    start = time.perf_counter()
    encoders.check(config)
    images = runs.load_images(config, config.zoo)
    classes = 1 + max(int(one.labels.max()) for one in images.values())
    runs.claim(config)
    arch = sg.siren(config.zoo.widths, w0=config.zoo.w0)
    with progress.Interruption() as interruption:
        zoos = {split: runs.fit_zoo(config, arch, split, images[split], interruption) for split in images}
        zoo_seconds = time.perf_counter() - start
        matched = matched_encoders(config.model, arch, classes, zoo.scales(zoos["train"]))
        pairs = encoders.train_pairs(config, TASK, matched, zoos, config.out / "pairs", interruption)
    shares = np.bincount(zoos["scoring"].records["label"]) / len(zoos["scoring"])
    results = {
        "config": runs.plain(config),
        "environment": runs.environment(),
        "zoo": {split: runs.describe_zoo(one) for split, one in zoos.items()},
        "largest_class_share": float(shares.max()),
        "encoders": {
            name: encoders.summary(matched[name], pairs[name], (*MEASURES, "selection_accuracy")) for name in matched
        },
        "seconds": {
            "zoo": zoo_seconds,
            "training": sum(pair["seconds"] for several in pairs.values() for pair in several),
            "total": time.perf_counter() - start,
        },
    }
    runs.write_json(config.out / "results.json", results)
    title = f"Classifying INRs {'-'.join(map(str, config.zoo.widths))}"
    report.write_page(config.out / "report.html", title, _sections(results))
    progress.console.print(encoders.table(f"INRs of unseen images, {config.seeds} seeds", _rows(results)))
    progress.console.print(f"Report: {config.out / 'report.html'}, numbers: {config.out / 'results.json'}")
    return results


# --- encoders -----------------------------------------------------------------------------------------------------


def matched_encoders(
    settings: ModelConfig, arch: Architecture, classes: int, scales: tuple[float, ...]
) -> dict[str, encoders.Encoder]:
    """The four encoders, with as many parameters as the scale-equivariant one has.

    Raises:
      ValueError: if no width of an encoder comes within the tolerance.
    """

    def gmn(arch: Architecture, **options: Any) -> encoders.Make:
        return encoders.gmn(arch, classes, scales, settings.num_layers, settings.dropout, **options)

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
    return encoders.match(make, LABELS, arch, settings.features, settings.tolerance)


# --- scoring ------------------------------------------------------------------------------------------------------


def _score(plain: np.ndarray, moved: np.ndarray, networks: Zoo) -> dict[str, Any]:
    labels = networks.records["label"]
    return {
        "accuracy": float((plain == labels).mean()),
        "moved_accuracy": float((moved == labels[:, None]).mean()),
        "agreement": float((moved == plain[:, None]).mean()),
    }


TASK = encoders.Task(
    loss=losses.classification_loss,
    target=lambda networks: networks.records["label"],
    read=lambda logits: logits.argmax(-1),
    selection={"selection_accuracy": 1, "selection_loss": -1},
    note="{selection_accuracy:.1%} of the selection networks",
    score=_score,
    measures=tuple(MEASURES),
)


# --- private ------------------------------------------------------------------------------------------------------


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    return encoders.rows(results["encoders"], MEASURES, digits=1, factor=100)


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
    curves = encoders.curves(results["encoders"], "selection_accuracy", "accuracy on selection networks", ylim=(0, 1))
    yield "<h2>Training</h2>" + report.html_image(curves)
    yield report.html_settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
