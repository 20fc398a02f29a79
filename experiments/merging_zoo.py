"""Pairs of the best CNNs of a zoo are aligned and merged, by every method of `experiments.merging`.

    python -m experiments.cnn_zoo cifar --data cifar10_gray.npz --out runs/cnn-zoo-cifar
    python -m experiments.merging_zoo cifar --data cifar10_gray.npz --zoo runs/cnn-zoo-cifar

The zoo is a run of `experiments.cnn_zoo` or `experiments.cnn`, finished or not. The networks are chosen on its images
for selection, no network is in two pairs, methods look at images for training, and merged networks are scored on its
images for scoring. The folder `--out` receives one file of numbers for every activation, results.json and report.html.
`--resume` continues a run that stopped.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import cnn_zoo, merging, runs, watch
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class Config(runs.RunConfig):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    zoo_path: Annotated[Path, tyro.conf.arg(name="zoo")] = Path("runs/cnn-zoo-cifar")
    """The folder of the run that trained the CNNs."""
    activations: tuple[str, ...] = ("relu", "tanh")
    """The activations of the CNNs that are merged."""
    best: int = 64
    """The number of networks that are chosen: the best on the images for selection at the end of training."""
    pairs: int = 8
    """The number of random pairs of them; no network is in two."""
    points: int = 5
    """The number of points of every path, its end points included."""
    match: merging.MatchConfig = dataclasses.field(default_factory=merging.MatchConfig)


PRESETS = {
    "cifar": (
        "the CNNs of `experiments.cnn_zoo cifar`; needs --data",
        Config(Path("runs/merging-cnn-zoo"), match=merging.MatchConfig(image_examples=1000)),
    ),
    "tiny": (
        "the CNNs of `experiments.cnn_zoo tiny`",
        Config(
            Path("runs/merging-cnn-zoo-tiny"),
            quick_compilation=True,
            zoo_path=Path("runs/cnn-zoo-tiny"),
            best=4,
            pairs=2,
            points=3,
            match=merging.PRESETS["tiny"][1].match,
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    runs.refuse_topology(config, "experiments.cnn_zoo", "trains the networks")
    runs.join(config)
    runs.device_mesh(config)  # refused before there is a folder
    _check(config)
    zoo_config = _zoo_config(config)
    data = cnn_zoo.load_data(zoo_config)
    chosen = {name: best_networks(config, name) for name in config.activations}
    with runs.Run(config) as run:
        pairs = {}
        for activation, networks in chosen.items():
            pairs[f"CNN {activation}"] = _pairs_of(config, activation, networks, data)
            run.interruption.stop_if_requested(f"the pairs of {activation} CNNs")
        results = {"zoo": runs.plain(zoo_config), "pairs": pairs, "many": None}
        return run.finish(results, "Merging CNNs of a zoo", merging.sections, merging.result_tables)


def best_networks(config: Config, activation: str) -> Zoo:
    """The networks of one activation that are best on the images for selection at the end of training.

    Raises:
      ValueError: If there are too few for the pairs, or they were not scored on images for selection.
    """
    networks = cnn_zoo.networks_at(config.zoo_path / "zoo", activation)
    if not {"step", "selection_accuracy", "scoring_accuracy"} <= set(networks.records):
        raise ValueError(
            f"{config.zoo_path}: its {activation} CNNs have the records {sorted(networks.records)}; expected step, "
            "selection_accuracy and scoring_accuracy. Name a run of experiments.cnn_zoo by --zoo."
        )
    networks = networks[networks.records["step"] == networks.records["step"].max()]
    if len(networks) < 2 * config.pairs:
        raise ValueError(
            f"{config.zoo_path} has {len(networks)} {activation} CNNs; expected {2 * config.pairs} or more for "
            f"{config.pairs} pairs. Lower --pairs, or let experiments.cnn_zoo go on with --resume."
        )
    ranked = np.argsort(-networks.records["selection_accuracy"], kind="stable")
    return networks[ranked[: config.best]]


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    if config.best < 2 * config.pairs:
        raise ValueError(f"best is {config.best}, pairs {config.pairs}; expected two networks or more for each pair.")
    if not set(config.activations) <= {"relu", "tanh"} or not config.activations:
        raise ValueError(f"activations are {config.activations}; expected 'relu', 'tanh' or both.")


def _zoo_config(config: Config) -> cnn_zoo.Config:
    """What of the zoo's own run says which images were used for what."""
    path = config.zoo_path / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; expected one in the folder of a run. Name a run by --zoo.")
    saved = json.loads(path.read_bytes())
    names = {field.name for field in dataclasses.fields(cnn_zoo.ZooConfig)}
    if not isinstance(saved.get("zoo"), dict) or not names >= saved["zoo"].keys():
        raise ValueError(f"{path}: it is of no zoo of CNNs; expected a run of experiments.cnn_zoo or experiments.cnn.")
    settings = {name: tuple(one) if isinstance(one, list) else one for name, one in saved["zoo"].items()}
    return cnn_zoo.Config(config.zoo_path, data=config.data, seed=saved["seed"], zoo=cnn_zoo.ZooConfig(**settings))


def _pairs_of(config: Config, activation: str, networks: Zoo, data: dict[str, cnn_zoo.Data]) -> dict[str, Any]:
    """All numbers on pairs of one activation; read where a former run stored them."""
    path = config.out / "pairs" / f"{activation}.json"
    if (found := runs.read_json(path)) is not None:
        return dict(found)
    order = np.random.default_rng(config.seed).permutation(len(networks))[: 2 * config.pairs]
    networks = networks[order]
    networks.records["accuracy"] = networks.records["scoring_accuracy"]
    networks.records["loss"] = networks.records["scoring_loss"]
    pairs = [(2 * pair, 2 * pair + 1) for pair in range(config.pairs)]
    options = merging.Config(config.out, seed=config.seed, mesh=config.mesh, points=config.points, match=config.match)
    given = merging.Data(*data["train"], *data["scoring"])
    key = jax.random.fold_in(jax.random.key(config.seed), config.activations.index(activation))
    scores = merging.score_pairs(options, networks.arch, networks, given, key, pairs)
    runs.write_json(path, scores)
    return scores


if __name__ == "__main__":
    watch.command(main, PRESETS)
