"""What the experiments on CNNs share: their images as inputs, and the zoos of CNNs with their splits."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_scalegmn as sg
from experiments import progress, runs
from jax_scalegmn import zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.zoo import Zoo, classifier_zoo, small_cnn_zoo


@dataclasses.dataclass(frozen=True)
class ZooConfig(runs.ImageConfig):
    """The CNNs, of each activation as many: 3 x 3 convolutions of strides 2, global mean pooling, a dense layer."""

    selection_images: int = 200
    enlarge: int = 2
    """Every pixel becomes so many along both sides."""
    channels: tuple[int, ...] = (1, 16, 16, 16)
    """Of the images and of every convolution."""
    networks: int = 160
    steps: int = 600
    """Updates of every network."""
    checkpoints: int = 4
    """Moments of the training at which every network is kept, equally far apart; the last is its end."""
    batch_size: int = 64
    learning_rate: tuple[float, float] = (5e-4, 2e-2)
    """Bounds of what is sampled for each network, as are the next five."""
    weight_decay: tuple[float, float] = (1e-8, 1e-2)
    dropout: tuple[float, float] = (0.0, 0.5)
    init_scale: tuple[float, float] = (0.3, 2.0)
    train_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    part: int = 256
    """Networks trained by one call and saved together: what an interruption can lose."""
    chunk: int | None = None
    """Networks trained side by side inside a call; None for what suits the device."""


# Of CIFAR-10 in gray, the published networks.
CIFAR = ZooConfig(
    train_images=20_000,
    selection_images=2000,
    scoring_images=5000,
    enlarge=1,
    networks=256,
    steps=1000,
    part=32,
)


@dataclasses.dataclass(frozen=True)
class Config(runs.RunConfig):
    """A run on zoos of CNNs."""

    zoo: ZooConfig = ZooConfig()
    activations: tuple[str, ...] = ("relu", "tanh")


class Data(NamedTuple):
    """Inputs of the CNNs [examples, height, width, 1] and their labels."""

    x: jax.Array
    y: jax.Array


# Shares of the networks.
SPLITS = {"train": 0.6, "selection": 0.15, "scoring": 0.25}


def load_data(config: Config) -> dict[str, Data]:
    """Disjoint images for training, selection and scoring; mean 0 and variance 1 over those for training."""
    given = runs.load_images(config, config.zoo)
    mean, std = given["train"].images.mean(), given["train"].images.std()

    def as_input(one: images.Images) -> Data:
        x = ((one.images - mean) / std).astype(np.float32)
        x = x.repeat(config.zoo.enlarge, 1).repeat(config.zoo.enlarge, 2)
        return Data(jnp.asarray(x[..., None]), jnp.asarray(one.labels))

    return {split: as_input(one) for split, one in given.items()}


def architecture_of(config: Config, activation: str, data: dict[str, Data]) -> Architecture:
    """The architecture of the CNNs with one activation."""
    classes = 1 + max(int(one.y.max()) for one in data.values())
    return sg.cnn(config.zoo.channels, classes, activation=activation)


def fit_zoo(
    config: Config, activation: str, data: dict[str, Data], folder: Path, interruption: progress.Interruption
) -> Zoo:
    """All CNNs of one activation at all checkpoints, trained in parts; parts that a former run saved are read instead.

    Every checkpoint is scored on its training images, on those for selection and on those for scoring. In the end the
    zoo stands in the folder in the layout of the Small CNN Zoo, too.
    """
    settings = config.zoo
    arch = architecture_of(config, activation, data)
    entropy = [config.seed, config.activations.index(activation)]
    recipes = classifier_zoo.sample(
        settings.networks,
        int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0]),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        init_scale=settings.init_scale,
        train_fractions=settings.train_fractions,
    )
    checkpoints = np.linspace(0, settings.steps, settings.checkpoints + 1).round().astype(int)[1:]
    parts = []
    with progress.bar(f"{activation} CNNs", settings.networks, "networks") as advance:
        for number, first in enumerate(range(0, settings.networks, settings.part)):
            path = folder / f"{activation}-{number:04d}.safetensors"
            count = min(settings.part, settings.networks - first)
            if path.exists():
                parts.append(_read(path, arch, count, checkpoints))
                advance(count, "read")
                continue
            part = classifier_zoo.fit(
                arch,
                data["train"],
                classifier_zoo.Recipes(*(values[first : first + count] for values in recipes)),
                checkpoints=tuple(map(int, checkpoints)),
                batch_size=settings.batch_size,
                evaluations={split: data[split] for split in ("selection", "scoring")},
                chunk=settings.chunk,
                progress=advance,
            )
            part.records["model"] = part.records["model"] + first
            zoo.save(part, path)
            parts.append(part)
            interruption.stop_if_requested(f"{first + count} of {settings.networks} {activation} CNNs")
    left_out = {"left_out": sum(part.settings["left_out"] for part in parts)}
    whole = zoo.concatenate([dataclasses.replace(part, settings=part.settings | left_out) for part in parts])
    exchange = folder / "small_cnn_zoo" / activation
    if not exchange.exists():
        small_cnn_zoo.save(exchange, whole)
    return whole


def split(cnns: Zoo, seed: int) -> dict[str, Zoo]:
    """The zoo by networks, all checkpoints of one together, into training, selection and scoring."""
    models = np.random.default_rng(seed).permutation(np.unique(cnns.records["model"]))
    ends = np.round(np.cumsum([0, *SPLITS.values()]) * len(models)).astype(int)
    parts = {name: models[first:last] for name, first, last in zip(SPLITS, ends, ends[1:], strict=False)}
    if any(len(part) == 0 for part in parts.values()):
        raise ValueError(f"{len(models)} networks are too few to be split into {list(SPLITS)}. Raise zoo.networks.")
    return {name: cnns[np.isin(cnns.records["model"], part)] for name, part in parts.items()}


def describe(cnns: Zoo) -> dict[str, Any]:
    """What a zoo of CNNs holds, as JSON values."""
    last = cnns.records["step"] == cnns.records["step"].max()
    accuracy = cnns.records["scoring_accuracy"][last]
    return {
        "networks": len(np.unique(cnns.records["model"])),
        "checkpoints": len(cnns),
        "scoring_accuracy": {str(q): float(np.percentile(accuracy, q)) for q in (5, 25, 50, 75, 95, 100)},
    } | cnns.settings


# --- private ------------------------------------------------------------------------------------------------------


def _read(path: Path, arch: Architecture, count: int, checkpoints: np.ndarray) -> Zoo:
    """A part that a former run saved, if it is what this run would have trained there."""
    part = zoo.load(path)
    networks = len(np.unique(part.records["model"])) + part.settings["left_out"]
    steps = np.unique(part.records["step"])
    if part.arch != arch or networks != count or not np.array_equal(steps, checkpoints):
        raise ValueError(
            f"{path}: {networks} networks {part.arch.name!r} at steps {steps}; expected {count} networks {arch.name!r} "
            f"at steps {checkpoints}. It is of a run with other options: name another folder by --out, or delete it."
        )
    return part
