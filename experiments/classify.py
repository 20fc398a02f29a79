"""INRs of images are classified by four encoders of equal size, which differ in the symmetry that they follow.

    python -m experiments.classify digits                    # scikit-learn's digits, no files needed
    python -m experiments.classify mnist --data mnist.npz    # INRs of 28 x 28 images; needs a GPU
    python -m experiments.classify tiny                      # a minute

Scale-equivariant, permutation-only, symmetry-ablated (arXiv 2406.10685, section 6) and function-query encoders are
trained alike, each with several seeds, and scored on networks of unseen images, plain and moved by random elements of
their group. Fits start from independent random networks, so that an orbit's members are equally likely: in expectation
moving the networks changes no encoder's accuracy, but it shows whether a prediction belongs to the function. The
folder `--out` receives everything: the zoos, a file for every finished pair of encoder and seed, results.json and
report.html. `--resume` continues a run that stopped.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
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
    "tiny": (
        "a few digits in a minute, to try the machinery",
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

zoo_key, fit_zoo = inr_zoo.zoo_key, inr_zoo.fit_zoo  # of a sweep
MEASURES = {"accuracy": "accuracy %", "moved_accuracy": "moved %", "agreement": "same %"}


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    encoders.check(config, LABELS)
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    images = runs.load_images(config, config.zoo)
    inr_zoo.check_fits(config.zoo, images["train"], config.train.batch_size)
    classes = 1 + max(int(part.labels.max()) for part in images.values())
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = inr_zoo.fit_all(config, images, run.interruption)
        matched = matched_encoders(
            config.model, zoos["train"].arch, classes, zoo.scales(zoos["train"]), config.encoders
        )
        pairs = encoders.train_pairs(config, TASK, matched, zoos, config.out / "pairs", run.interruption)
        shares = np.bincount(zoos["scoring"].records["label"]) / len(zoos["scoring"])
        results = {
            "zoo": {split: inr_zoo.describe(part) for split, part in zoos.items()},
            "largest_class_share": float(shares.max()),
            "encoders": {
                name: encoders.summary(matched[name], pairs[name], (*MEASURES, "selection_accuracy"))
                for name in matched
            },
            "seconds": {"training": sum(pair["seconds"] for several in pairs.values() for pair in several)},
        }
        title = f"Classifying INRs {'-'.join(map(str, config.zoo.widths))}"
        return run.finish(results, title, _sections, lambda results: [_table(results)])


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


def _table(results: Mapping[str, Any]) -> tables.Table:
    title = f"INRs of unseen images, {results['config']['seeds']} seeds"
    return encoders.table(title, results["encoders"], MEASURES, digits=1, factor=100)


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
    yield "<h2>Networks of unseen images</h2>" + tables.page(_table(results))
    yield (
        "<p class=note>All encoders are trained alike, with options chosen for the scale-equivariant one. "
        f"Mean ± standard deviation over {config['seeds']} trainings on the same networks, each scored "
        "after the epoch with the highest selection accuracy. Moved: every scoring network is moved by "
        f"{config['copies']} random elements of its group, permutations and signs, that do not change its function. "
        "Same: how many of these copies are assigned the class of the network itself. Networks/s: in training, "
        "median over epochs.</p>"
    )
    curves = encoders.curves(results["encoders"], "selection_accuracy", "accuracy on selection networks")
    yield "<h2>Training</h2>" + curves
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


if __name__ == "__main__":
    watch.command(main, PRESETS)
