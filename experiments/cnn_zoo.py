"""What the experiments on CNNs share: their images as inputs, and the zoos of CNNs with their splits.

    python -m experiments.cnn_zoo cifar --data cifar10_gray.npz    # CNNs that are worth merging, without more
    python -m experiments.cnn_zoo tiny                             # some on digits, in seconds

The folder `--out` receives the zoos, results.json and report.html; `--resume` continues a run that stopped. Then
`python -m experiments.merging_zoo cifar --zoo OUT` merges pairs of the CNNs, and `python -m experiments.cnn cifar --zoo
OUT/zoo` trains an autoencoder on them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jax_scalegmn as sg
from experiments import compile_only, progress, report, runs, tables, watch
from experiments import parts as fit_parts
from jax_scalegmn import distributed, zoo
from jax_scalegmn.architecture import Architecture, Conv, walk
from jax_scalegmn.io import images
from jax_scalegmn.types import Params
from jax_scalegmn.zoo import Zoo, classifier_zoo, classifiers, small_cnn_zoo


@dataclasses.dataclass(frozen=True)
class ZooConfig(runs.ImageConfig):
    """The CNNs of every activation: 3 x 3 convolutions of strides 2, global mean pooling, a dense layer."""

    selection_images: int = 200
    """The number of images on which networks and the best epoch are selected."""
    enlarge: int = 2
    """The number of pixels, along both sides, that every pixel becomes."""
    standardized: bool = True
    """Whether images are moved and scaled to mean 0 and variance 1; False leaves them in [0, 1]."""
    pixels: tuple[float, float] | None = None
    """What black and white become in place of that: -1 and 1 for the published Small CNN Zoo."""
    channels: tuple[int, ...] = (1, 16, 16, 16)
    """The channels of the images and of every convolution."""
    networks: int = 160
    """The number of networks of each activation."""
    steps: int = 600
    """The number of updates of every network."""
    checkpoints: int = 4
    """The number of equidistant moments of the training at which every network is kept; the last is its end."""
    batch_size: int = 64
    """The number of images in a batch."""
    warmup_steps: int = 0
    """The number of updates over which the learning rate rises to its value."""
    cosine: bool = False
    """Whether the learning rate falls to 0 along a cosine until the last update."""
    mirrored: bool = False
    """Whether images are mirrored at random in training."""
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """What updates the networks."""
    momentum: float = 0.9
    """The momentum of SGD and Muon."""
    learning_rate: tuple[float, float] = (5e-4, 2e-2)
    """The bounds of the learning rate that is sampled for each network."""
    weight_decay: tuple[float, float] = (1e-8, 1e-2)
    """The bounds of the weight decay that is sampled for each network."""
    dropout: tuple[float, float] = (0.0, 0.5)
    """The bounds of the dropout rate that is sampled for each network."""
    init_scale: tuple[float, float] = (0.3, 2.0)
    """The bounds of the factor on the first weights that is sampled for each network."""
    train_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """The shares of the training images, of which one is sampled for each network."""
    part: int = 256
    """The number of networks that are saved together, and in pieces of a few minutes before."""
    chunk: int | None = None
    """The number of networks trained as one vmapped network; None for what suits the device."""


# The published networks, for CIFAR-10 in gray.
CIFAR = ZooConfig(
    size=(32, 32),
    train_images=20_000,
    selection_images=2000,
    scoring_images=5000,
    enlarge=1,
    networks=256,
    steps=1000,
    part=32,
)

# The same networks trained longer, alike and without dropout: above 50 % of the test images.
ACCURATE = dataclasses.replace(
    CIFAR,
    train_images=45_000,
    networks=72,
    steps=5000,
    checkpoints=4,
    batch_size=96,
    warmup_steps=100,
    cosine=True,
    mirrored=True,
    optimizer="muon",
    learning_rate=(0.04, 0.04),
    weight_decay=(1e-5, 1e-5),
    dropout=(0.0, 0.0),
    init_scale=(1.0, 1.0),
    train_fractions=(1.0,),
    part=8,
)


@dataclasses.dataclass(frozen=True)
class Config(runs.RunConfig):
    """A run on zoos of CNNs."""

    zoo: ZooConfig = ZooConfig()
    activations: tuple[str, ...] = ("relu", "tanh")
    """The activations of the CNNs, each with a zoo of its own."""


PRESETS = {
    "cifar": (
        "CIFAR-10 in gray: CNNs for merging; needs --data, an hour and a half on one core",
        Config(Path("runs/cnn-zoo-cifar"), zoo=ACCURATE),
    ),
    "tiny": (
        "a few digits in seconds, to try the machinery",
        Config(
            Path("runs/cnn-zoo-tiny"),
            quick_compilation=True,
            zoo=dataclasses.replace(
                ACCURATE,
                size=None,
                enlarge=2,
                train_images=64,
                selection_images=16,
                scoring_images=16,
                channels=(1, 3, 4),
                networks=8,
                steps=6,
                checkpoints=2,
                batch_size=8,
                warmup_steps=2,
                part=2,
            ),
        ),
    ),
}


class Data(NamedTuple):
    """Inputs of the CNNs [examples, height, width, 1] and their labels."""

    x: jax.Array
    y: jax.Array


# Shares of the networks.
SPLITS = {"train": 0.6, "selection": 0.15, "scoring": 0.25}


def load_data(config: Config) -> dict[str, Data]:
    """Disjoint images for training, selection and scoring; mean 0 and variance 1 over those for training.

    Raises:
      ValueError: If the images do not fit the options.
    """
    given = runs.load_images(config, config.zoo)
    mean, std = 0.0, 1.0
    if config.zoo.pixels is not None:
        black, white = config.zoo.pixels
        if not (np.isfinite([black, white]).all() and black < white):
            raise ValueError(
                f"zoo.pixels is {config.zoo.pixels}; expected two numbers, that of black first, like -1 1."
            )
        mean, std = -black / (white - black), 1 / (white - black)
    elif config.zoo.standardized:
        mean, std = given["train"].images.mean(), given["train"].images.std()

    def as_input(part: images.Images) -> Data:
        x = ((part.images - mean) / std).astype(np.float32)
        x = x.repeat(config.zoo.enlarge, 1).repeat(config.zoo.enlarge, 2)
        return Data(jnp.asarray(x[..., None]), jnp.asarray(part.labels))

    return {split: as_input(part) for split, part in given.items()}


def num_classes(data: dict[str, Data]) -> int:
    """The number of classes of the images."""
    return 1 + max(int(np.asarray(part.y).max()) for part in data.values())


def architecture_of(config: Config, activation: str, classes: int) -> Architecture:
    """The architecture of the CNNs with one activation."""
    return sg.cnn(config.zoo.channels, classes, activation=activation)


def input_shape(config: Config, given: images.Images) -> tuple[int, int, int]:
    """The shape of an image as the CNNs take it."""
    height, width = given.images.shape[1:3]
    return height * config.zoo.enlarge, width * config.zoo.enlarge, 1


def training_step(config: Config, mesh: Mesh, activation: str, given: images.Images) -> compile_only.Program:
    """A step of the zoo of one activation, to be compiled and not run."""
    arch, shape = architecture_of(config, activation, 1 + int(given.labels.max())), input_shape(config, given)
    networks = config.zoo.chunk or 64  # as on an accelerator
    return compile_only.classifier_step(mesh, f"{activation} CNNs", arch, shape, config.zoo.batch_size, networks)


def fit_zoo(
    config: Config, activation: str, data: dict[str, Data], folder: Path, interruption: progress.Interruption
) -> Zoo:
    """All CNNs of one activation at all checkpoints, trained in parts; parts that a former run saved are read instead.

    Every checkpoint is scored on its training images, on those for selection and on those for scoring. The
    folder receives the zoo in the layout of the Small CNN Zoo, too.
    """
    settings, parts = config.zoo, []
    with progress.bar(f"{activation} CNNs", settings.networks, "networks") as advance:
        for number in range(num_parts(settings)):
            parts.append(fit_part(config, activation, number, data, folder, interruption, advance))
            done = min((number + 1) * settings.part, settings.networks)
            interruption.stop_if_requested(f"{done} of {settings.networks} {activation} CNNs")
    whole = _joined(parts)
    exchange = folder / "small_cnn_zoo" / activation
    if distributed.is_writer() and not (exchange / "weights.npy").exists():
        small_cnn_zoo.save(exchange, whole, overwrite=True)
    return whole


def num_parts(settings: ZooConfig) -> int:
    """The number of parts in which the CNNs of one activation are trained."""
    return -(-settings.networks // settings.part)


def fit_part(
    config: Config,
    activation: str,
    number: int,
    data: dict[str, Data],
    folder: Path,
    interruption: progress.Interruption,
    advance: Callable[..., None],
) -> Zoo:
    """One part of the CNNs of an activation, read where a former run saved it."""
    settings, first = config.zoo, number * config.zoo.part
    arch, recipes = architecture_of(config, activation, num_classes(data)), _sample(config, activation)
    checkpoints = np.linspace(0, settings.steps, settings.checkpoints + 1).round().astype(int)[1:]
    count = min(settings.part, settings.networks - first)

    def fit_rows(begin: int, size: int) -> Zoo:
        rows = slice(first + begin, first + begin + size)
        part = classifier_zoo.fit(
            arch,
            data["train"],
            type(recipes)(*(values[rows] for values in recipes)),
            checkpoints=tuple(map(int, checkpoints)),
            batch_size=settings.batch_size,
            warmup_steps=settings.warmup_steps,
            cosine=settings.cosine,
            mirrored=settings.mirrored,
            optimizer=settings.optimizer,
            momentum=settings.momentum,
            evaluations={split: data[split] for split in ("selection", "scoring")},
            networks_at_once=settings.chunk,
            progress=advance,
            mesh=runs.device_mesh(config),
        )
        part.records["model"] = part.records["model"] + rows.start
        return part

    plan = _plan(config, folder / f"{activation}-{number:04d}.safetensors", count, data)
    part = fit_parts.fit(config, plan, fit_rows, _joined, interruption, advance)
    return _checked(plan.path, part, arch, count, checkpoints)


def main(config: Config) -> dict[str, Any]:
    """Trains the zoos alone, and returns what they hold, which is also stored in config.out / "results.json".

    A part of every activation in turn: an interrupted run leaves about as many networks of each.
    """
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    data = load_data(config)
    with runs.Run(config) as run:
        with run.timed("zoo"), progress.bar("CNNs", config.zoo.networks * len(config.activations), "CNNs") as advance:
            for number in range(num_parts(config.zoo)):
                for activation in config.activations:
                    fit_part(config, activation, number, data, config.out / "zoo", run.interruption, advance)
                    run.interruption.stop_if_requested(f"{number + 1} of {num_parts(config.zoo)} parts")
        zoos = {name: fit_zoo(config, name, data, config.out / "zoo", run.interruption) for name in config.activations}
        found = {"zoos": {name: describe(cnns) for name, cnns in zoos.items()}}
        return run.finish(found, "CNNs", _sections, lambda results: [_table(results)])


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The training step of the CNNs of every activation, to be compiled and not run."""
    given = runs.unread_images(config, config.zoo)
    for activation in config.activations:
        yield training_step(config, mesh, activation, given)


def zoo_key(config: Config) -> str:
    """Configs of which this text is the same train the same CNNs, once for all trials of a sweep."""
    settings = runs.plain(config)
    names = ("zoo", "data", "seed", "activations", "zoo_path", "zoo_from")
    return json.dumps({name: settings.get(name) for name in names})


def fit_zoos(config: Config) -> None:
    """Trains the CNNs of all activations of a config, or what is left of them, into its folder."""
    data = load_data(config)
    with runs.compilation(config), progress.Interruption() as interruption:
        for activation in config.activations:
            fit_zoo(config, activation, data, config.out / "zoo", interruption)


def read(path: Path, activation: str, data: dict[str, Data], step: int | None, mesh: Mesh | None = None) -> Zoo:
    """The CNNs of one activation in a zoo that somebody else made, scored on our images.

    Args:
      path: A folder in the layout of the Small CNN Zoo, as `zoo.small_cnn_zoo.load` reads it; a file of `zoo.save`;
        or the folder "zoo" of a former run.
      activation: The activation of the CNNs.
      data: The images for training, selection and scoring.
      step: The step whose networks are read; None for all.
      mesh: The devices that score them; None for one.

    Raises:
      ValueError: If the path is none of these, or its networks do not fit the activation, the images or the step.
    """
    whole = _without_step(path, networks_at(path, activation), step)
    _check_fit(path, whole, activation, data)
    records = {"step": whole.records.get("step", np.zeros(len(whole), int))}
    records["model"] = whole.records.get("model", np.arange(len(whole)))
    steps = np.unique(records["step"])
    if "model" not in whole.records and len(steps) > 1:
        raise ValueError(
            f"{path}: networks at steps {steps.tolist()[:20]} without a column 'model' that tells which are one "
            "network; expected one step, lest a network is trained on and scored. Name a step by --zoo-step."
        )
    for name, part in data.items():
        scores = jax.tree.map(np.asarray, make_scores(whole.arch, part, mesh)(whole.params))
        records |= {f"{name}_loss": scores.loss, f"{name}_accuracy": scores.accuracy}
    settings = {"source": str(path), "activation": activation, "left_out": whole.settings.get("left_out", 0)}
    if "test_accuracy" in whole.records:  # near 0 if they were trained on images like ours
        gap = np.abs(whole.records["test_accuracy"] - records["scoring_accuracy"])
        settings["gap_to_recorded_accuracy"] = float(np.nanmean(gap)) if np.isfinite(gap).any() else None
    return Zoo(whole.arch, whole.params, records, settings)


def make_scores(arch: Architecture, part: Data, mesh: Mesh | None) -> Callable[[Params], classifiers.Scores]:
    """A stack of networks -> their scores on these images, one network after the other on each device."""
    return runs.by_rows(lambda stack: jax.lax.map(lambda params: classifiers.score(arch, params, *part), stack), mesh)


def networks_at(path: Path, activation: str) -> Zoo:
    """The CNNs of one activation in any of the places that `read` reads, with what is known of them."""
    if path.is_file():
        return zoo.load(path)
    if (path / "weights.npy").is_file():
        return small_cnn_zoo.load(path, activation=activation, step=None, finite_only=True)
    files = sorted(path.glob(f"{activation}-*.safetensors"))
    if not files:
        got = f"the entries {sorted(file.name for file in path.iterdir())[:5]}" if path.is_dir() else "nothing"
        raise ValueError(
            f"{path}: expected a folder with weights.npy, metrics.csv.gz and layout.csv, a file of zoo.save, or the "
            f"folder 'zoo' of a former run with {activation} CNNs; got {got}. Name one of them by --zoo, and the "
            "activations that it has by --activations."
        )
    return _joined([zoo.load(file) for file in files])


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
        "scoring_accuracies": accuracy.tolist(),
    } | cnns.settings


# --- private ------------------------------------------------------------------------------------------------------


def _table(results: Mapping[str, Any]) -> tables.Table:
    rows = []
    for activation, cnns in results["zoos"].items():
        reached = [f"{100 * cnns['scoring_accuracy'][quantile]:.1f}" for quantile in ("5", "50", "100")]
        rows.append([activation, str(cnns["networks"]), *reached])
    return tables.Table("Accuracy % on unseen images", ("activation", "networks", "5 %", "median", "best"), rows)


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Networks at the end of training</h2>" + tables.page(_table(results))
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds")})


def _joined(parts: list[Zoo]) -> Zoo:
    """One zoo of its parts, which differ in how many diverged networks they left out."""
    left_out = {"left_out": sum(part.settings.get("left_out", 0) for part in parts)}
    return zoo.concatenate([dataclasses.replace(part, settings=part.settings | left_out) for part in parts])


def _sample(config: Config, activation: str) -> classifier_zoo.Hyperparameters:
    """What is sampled for each network."""
    settings = config.zoo
    entropy = [config.seed, config.activations.index(activation)]
    return classifier_zoo.sample(
        settings.networks,
        int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0]),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        init_scale=settings.init_scale,
        train_fractions=settings.train_fractions,
    )


def _without_step(path: Path, whole: Zoo, step: int | None) -> Zoo:
    if step is None:
        return whole
    steps = whole.records.get("step", np.zeros(0, int))
    if step not in steps:
        raise ValueError(
            f"{path}: no network has step {step}; steps are {np.unique(steps).tolist()}. Name one by --zoo-step."
        )
    return whole[steps == step]


def _check_fit(path: Path, whole: Zoo, activation: str, data: dict[str, Data]) -> None:
    """That the networks are CNNs of this activation for images like ours."""
    layers = [layer for _, layer in walk(whole.arch.layers) if isinstance(layer, Conv)]
    names = sorted({layer.activation.name for layer in layers if layer.activation is not None})
    channels, outputs = whole.arch.neuron_layers[0].width, whole.arch.neuron_layers[-1].width
    classes = num_classes(data)
    if names != [activation] or channels != 1 or outputs < classes:
        raise ValueError(
            f"{path}: its networks {whole.arch.name!r} map {channels} channels to {outputs} classes with the "
            f"activations {names}; expected CNNs of 1 channel, {classes} classes or more and {activation}. Name the "
            "images that they were trained on by --data, and their activation by --activations."
        )


def _plan(config: Config, path: Path, count: int, data: dict[str, Data]) -> fit_parts.Plan:
    settings = config.zoo
    chunk = settings.chunk or (1 if jax.default_backend() == "cpu" else 64)
    together = chunk * distributed.num_devices(runs.device_mesh(config))
    group = -(-16 // together) * together  # pieces of a few networks could hold none that did not diverge
    pixels = settings.steps * settings.batch_size * data["train"].x[0].size
    return fit_parts.Plan(path, count, group, pixels, "CNNs")


def _checked(path: Path, part: Zoo, arch: Architecture, count: int, checkpoints: np.ndarray) -> Zoo:
    """A part that a former run saved, if it is what this run would have trained there."""
    networks = len(np.unique(part.records["model"])) + part.settings["left_out"]
    steps = np.unique(part.records["step"])
    if part.arch != arch or networks != count or not np.array_equal(steps, checkpoints):
        raise ValueError(
            f"{path}: {networks} networks {part.arch.name!r} at steps {steps}; expected {count} networks {arch.name!r} "
            f"at steps {checkpoints}. It is of a run with other options: name another folder by --out, or delete it."
        )
    return part


if __name__ == "__main__":
    watch.command(main, PRESETS)
