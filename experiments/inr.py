"""INRs of images are merged by a ScaleGMN autoencoder (Boufalis et al. 2025, arXiv 2511.12601) and learned alignments.

    python -m experiments.inr digits                      # scikit-learn's digits, no files needed
    python -m experiments.inr mnist --data mnist.npz      # the published setting; a GPU helps
    python -m experiments.inr mnist-small --data mnist.npz  # fewer networks of that size; hours on two cores
    python -m experiments.inr mnist --zoo mnist-inrs      # published INRs in place of fitted ones
    python -m experiments.inr tiny                        # seconds

Zoo, autoencoder, learned matcher and frame, canonicalization, merging, evaluation, report. The folder `--out` receives
everything: the zoos, the checkpoints, results.json with every number, report.html with every picture. `--resume`
continues a run that stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments import (
    alignment,
    autoencoders,
    compile_only,
    controls,
    encoders,
    evaluation,
    inr_report,
    inr_zoo,
    populations,
    progress,
    runs,
    watch,
)
from experiments.alignment import InrAlignmentConfig
from experiments.autoencoders import Trained
from experiments.compile_only import Program
from experiments.evaluation import Member, Method, Paths
from experiments.moves import MoveConfig, moved
from jax_scalegmn import models, network
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.training import losses
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class TrainConfig(autoencoders.TrainConfig):
    """The training of the autoencoder."""

    orbit_weight: float = 0.3
    """The weight of the orbit-distance term, in units of the training images' variance; 0 as published."""
    moves: MoveConfig = dataclasses.field(default_factory=MoveConfig)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The scoring."""

    noises: tuple[float, ...] = (0.0, 0.001, 0.002, 0.005)
    """The standard deviations of the perturbation of transformed copies."""
    points: int = 40
    """The number of points of every path."""
    copies: int | None = 100
    """The number of scoring networks whose transformed copies are merged; None for all. Other fits of their images are
    always merged with all of them."""
    search_sweeps: int = 10
    """The most sweeps over all neurons of search matching, which ends when one changes nothing."""
    search_kicks: int = 0
    """The number of times that search matching goes on from its result with some neurons moved at random."""
    search_pixels: int | None = None
    """The number of pixels, drawn at random, at which search matching computes; None for all. Its time grows with them.
    On a regular grid of few pixels a search ends at networks that agree there and nowhere else."""
    orbits: int = 20
    """The number of networks whose orbits are embedded."""
    orbit_size: int = 32
    """The number of members of each of these orbits."""


@dataclasses.dataclass(frozen=True)
class Config(inr_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    zoo_path: Annotated[Path | None, tyro.conf.arg(name="zoo")] = None
    """INRs that are read in place of fitting some: a folder of published INRs or the JSON file of its split, a file of
    `zoo.save`, or the folder "zoo" of a former run. No images are read then: what a network draws counts as its true
    image. Of the options of the zoo, the numbers of images, and for published INRs widths, w0 and offset, hold."""
    drawn_size: tuple[int, int] = (28, 28)
    """Height and width of the images that networks of `--zoo` draw; fitted ones draw images as large as theirs."""
    encoder: Literal["equivariant", "permutation"] = "equivariant"
    """What the autoencoder's encoder follows: the whole group of the networks, or permutations alone, as the paper's
    baseline does. The latter has the same decoder, and features so that both have as many parameters."""
    model: autoencoders.ModelConfig = dataclasses.field(default_factory=autoencoders.ModelConfig)
    train: TrainConfig = TrainConfig()
    alignment: InrAlignmentConfig = dataclasses.field(default_factory=InrAlignmentConfig)
    evaluation: EvaluationConfig = EvaluationConfig()


PRESETS = {
    "digits": (
        "scikit-learn's digits, 8 x 8; minutes on two cores",
        Config(
            Path("runs/digits"),
            train=TrainConfig(
                32, 14, 8e-3, warmup_steps=175, optimizer="muon", moves=MoveConfig(turn=4.0, shift=0.04, stretch=0.04)
            ),
            alignment=dataclasses.replace(alignment.MUON, frame_start="matcher", frame_epochs=3),
        ),
    ),
    "mnist": (
        "the published setting on 28 x 28 images; needs --data or --zoo",
        Config(
            Path("runs/mnist"),
            zoo=dataclasses.replace(inr_zoo.PUBLISHED, scoring_images=500),
            model=autoencoders.ModelConfig(128, 4, dropout=0.2),
            train=TrainConfig(128, epochs=150, learning_rate=1e-3, warmup_steps=1000, micro_batch=2),
            alignment=InrAlignmentConfig(epochs=0),  # one fit of an image makes no pair
        ),
    ),
    "mnist-small": (
        "8,192 INRs of 28 x 28 images, about two hours on two cores; needs --data",
        Config(
            Path("runs/mnist-small"),
            zoo=inr_zoo.SMALL,
            model=autoencoders.ModelConfig(64, 2),
            train=TrainConfig(16, 24, 4e-3, warmup_steps=100, micro_batch=4, orbit_weight=0.0),
            alignment=dataclasses.replace(alignment.MUON, epochs=8, micro_batch=8),
            evaluation=EvaluationConfig(copies=50, search_sweeps=1, search_pixels=196),
        ),
    ),
    "tiny": (
        "a few digits in seconds, to try the machinery",
        Config(
            Path("runs/tiny"),
            quick_compilation=True,
            zoo=inr_zoo.TINY,
            model=autoencoders.ModelConfig(8, 1),
            train=TrainConfig(16, epochs=3, warmup_steps=2, micro_batch=8, orbit_weight=0.0),
            alignment=InrAlignmentConfig(16, epochs=0, warmup_steps=2, features=8, num_layers=1, num_iterations=3),
            evaluation=EvaluationConfig((0.0, 0.005), points=5, orbits=3, orbit_size=4),
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    alignment.check(config, config.alignment)
    zoos, given = _given(config)
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = inr_zoo.fit_all(config, given, run.interruption) if zoos is None else zoos
            given = drawn_images(zoos, config.drawn_size) if given is None else given
        with run.timed("training"):
            trained = fit_autoencoder(config, zoos, given["train"], run.interruption)
        with run.timed("alignment"):
            x = coordinates(given["train"])
            aligners = alignment.fit_on_inrs(config, config.alignment, zoos, x, run.interruption)
        scores, pictures = score(config, trained, aligners, zoos, given)
        results = {
            "zoo": {split: inr_zoo.describe(part) for split, part in zoos.items()},
            "model": {"parameters": trained.parameters},
            "training": trained.history,
            "alignment": alignment.results(aligners),
            **scores,
        }
        widths = "-".join(str(layer.width) for layer in zoos["train"].arch.neuron_layers)
        return run.finish(
            results,
            f"Merging INRs {widths} by a ScaleGMN autoencoder",
            functools.partial(inr_report.sections, pictures=pictures),
            inr_report.result_tables,
        )


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The programs of the experiment, to be compiled and not run."""
    arch, size = inr_zoo.architecture_of(config.zoo), config.drawn_size
    if config.zoo_path is None:
        size = runs.unread_images(config, config.zoo).images.shape[1:3]
    row = compile_only.params_of(arch)
    scales = (1.0,) * len(arch.parameters)
    whole = models.autoencoder(arch, scales=scales if config.model.normalized else None, **config.model.options())
    model = encoders.autoencoder(config.model, whole, config.encoder)
    loss = losses.inr_reconstruction(model, size=size, orbit_weight=config.train.orbit_weight)
    loss = moved(config.train.moves, arch, loss)
    yield compile_only.training_step(mesh, "training step", model, loss, config.train, row)
    x = jnp.asarray(network.coordinates(*size)).reshape(-1, 2)
    for name in alignment.KINDS if config.alignment.epochs else ():
        settings, method = config.alignment, alignment.reads_one(name)
        aligner = alignment.make_model(settings, name, arch, scales)
        loss = alignment.inr_losses(settings, x, aligner)["train"]
        yield compile_only.training_step(mesh, f"{name}'s step", aligner, loss, settings, (row, row), method=method)
    yield compile_only.fitting_step(mesh, arch, size, config.zoo.chunk)
    yield compile_only.weight_matching(mesh, "matching", arch, config.zoo.chunk)


def _given(config: Config) -> tuple[dict[str, Zoo] | None, dict[str, images.Images] | None]:
    """The networks or the images that a config names, which fit its other options."""
    noises = [f"{noise:g}" for noise in config.evaluation.noises]
    if not noises or len(set(noises)) < len(noises):
        raise ValueError(f"evaluation.noises are {config.evaluation.noises}; expected one or more, each once.")
    if config.zoo.scoring_images < 2:
        raise ValueError(f"zoo.scoring_images is {config.zoo.scoring_images}; expected 2 or more, to compare orbits.")
    if config.zoo_path is None:
        given = runs.load_images(config, config.zoo)
        inr_zoo.check_fits(config.zoo, given["train"], config.train.batch_size)
        return None, given
    zoos = inr_zoo.read(config.zoo_path, config.zoo, config.seed)
    inr_zoo.check_batch(len(zoos["train"]), config.train.batch_size)
    return zoos, None


# --- sweeps -------------------------------------------------------------------------------------------------------


zoo_key, program = inr_zoo.zoo_key, populations.program


def fit_zoo(config: Config) -> None:
    """Fits the INRs of a config, or what is left of them, into its folder; none if it reads others."""
    if config.zoo_path is None:
        inr_zoo.fit_zoo(config)


def population(configs: Sequence[Config | None]) -> Iterator[list[dict[str, Any]]]:
    """Trains the autoencoders of configs of one program; see `populations.train`."""
    config = next(one for one in configs if one is not None)
    zoos, given = _given(config)
    with runs.compilation(config), progress.Interruption() as interruption:
        zoos = inr_zoo.fit_all(config, given, interruption) if zoos is None else zoos
        given = drawn_images(zoos, config.drawn_size) if given is None else given
        model, size = _model(config, zoos["train"]), given["train"].images.shape[1:3]
        variance, weighted = float(given["train"].images.var()), config.train.orbit_weight != 0

        def make_loss(trial: Any, *, train: bool = True) -> Any:
            weight = trial.orbit_weight * variance if weighted else 0.0
            loss = losses.inr_reconstruction(model, size=size, orbit_weight=weight, train=train)
            return moved(config.train.moves, model.arch, loss) if train else loss

        settings = [None if one is None else one.train for one in configs]
        rows = {split: zoos[split].params for split in ("train", "selection")}
        yield from populations.train(configs, settings, model, make_loss, rows, interruption)


# --- images -------------------------------------------------------------------------------------------------------


def make_draw(
    arch: Architecture, size: tuple[int, int], *, networks_at_once: int = 512, mesh: Mesh | None = None
) -> Callable[[Params], Any]:
    """A stack of INRs -> their images [networks, height, width], of three outputs [networks, height, width, 3]."""

    def draw_one(params: Params) -> jax.Array:
        image = network.render(arch, params, size)
        return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image

    return runs.in_chunks(draw_one, networks_at_once, mesh)


def coordinates(given: images.Images, count: int | None = None, seed: int = 0) -> jax.Array:
    """The positions of the images' pixels, or of some that are drawn at random, [pixels, 2]."""
    whole = jnp.asarray(network.coordinates(*given.images.shape[1:3])).reshape(-1, 2)
    return whole if count is None else whole[np.random.default_rng(seed).permutation(len(whole))[:count]]


def drawn_images(zoos: Mapping[str, Zoo], size: tuple[int, int]) -> dict[str, images.Images]:
    """What the networks of every split draw, with their labels."""
    draw = make_draw(zoos["train"].arch, size)
    return {split: images.Images(draw(part.params), part.records["label"]) for split, part in zoos.items()}


# --- autoencoder --------------------------------------------------------------------------------------------------


def _model(config: Config, networks: Zoo) -> models.Autoencoder:
    return encoders.autoencoder(config.model, autoencoders.make_model(config.model, networks), config.encoder)


def fit_autoencoder(
    config: Config, zoos: Mapping[str, Zoo], given: images.Images, interruption: progress.Interruption
) -> Trained:
    """Trains the autoencoder, or continues with it, on networks of these training images."""
    settings, variance = config.train, float(given.images.var())
    model = _model(config, zoos["train"])
    size = given.images.shape[1:3]
    loss = functools.partial(losses.inr_reconstruction, model, size=size, orbit_weight=settings.orbit_weight * variance)
    return autoencoders.fit(
        config,
        settings,
        model,
        {"train": moved(settings.moves, model.arch, loss()), "selection": loss(train=False)},
        {split: zoos[split].params for split in ("train", "selection")},
        interruption,
        note=lambda metrics: f"reconstruction {metrics['selection_reconstruction'] / variance:.1%} of the variance",
    )


# --- scoring ------------------------------------------------------------------------------------------------------

GROUPS = {
    "P": {"permute": True, "scale": False},
    "D": {"permute": False, "scale": True},
    "PD": {"permute": True, "scale": True},
}


class Subject(NamedTuple):
    """The scoring networks: one of every pair, another fit of the same image where there is one, and the truth."""

    first: Params
    second: Params | None
    truth: np.ndarray
    labels: np.ndarray


class Instruments(NamedTuple):
    """What scoring computes with: compiled once each."""

    methods: dict[str, Method]
    follow: dict[Callable[[Any], Params], Callable[..., Paths]]
    read: Callable[[Params], Member]
    draw: Callable[[Params], np.ndarray]
    recognize: Callable[[np.ndarray], np.ndarray]
    copies: Callable[..., Params]
    align: evaluation.Align


def score(
    config: Config,
    trained: Trained,
    aligners: Mapping[str, Trained],
    zoos: Mapping[str, Zoo],
    given: Mapping[str, images.Images],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers and pictures of the report, on networks and images that neither training nor selection has seen."""
    settings = config.evaluation
    keys = runs.keys(config.seed + 1)
    subject = _subject(zoos["scoring"], given["scoring"])
    tools = _instruments(config, trained, aligners, zoos["train"], given["train"], len(subject.truth))
    kinds = _kinds(config, tools, subject, keys)
    member = tools.read(subject.first)
    original, decoded = tools.draw(member.params), tools.draw(member.decoded)
    merging, paths = _merge(tools, kinds, member, original, subject, keys)
    orbits = _first_rows(subject.first, settings.orbits)
    spreads = {
        group: evaluation.orbit_spread(tools.copies, tools.read, orbits, next(keys), settings.orbit_size, **moves)
        for group, moves in GROUPS.items()
    }
    members = {group: spread.pop("latent") for group, spread in spreads.items()}
    spread = spreads["PD"]
    pictures = {
        "paths": paths,
        "truth": subject.truth[:12],
        "original": original[:12],
        "decoded": decoded[:12],
        "latent": member.latent,
        "labels": subject.labels,
        "orbits": members["PD"],
        "orbit_labels": subject.labels[: settings.orbits],
    }
    reconstruction = _reconstruction(tools, subject, original, decoded, given["train"])
    simple = controls.score(
        tools.draw, tools.align, zoos["train"], given["train"].images, subject.first, original, next(keys)
    )
    reconstruction["controls"] = {
        name: controls.numbers(drawn, original, given["train"].images, tools.recognize, subject.labels)
        for name, drawn in simple.items()
    }
    return {"reconstruction": reconstruction, "orbit": spread, "orbits": spreads, "merging": merging}, pictures


def _subject(networks: Zoo, given: images.Images) -> Subject:
    """Fitted networks have the images that they were fitted to; others the ones that they draw."""
    rows = inr_zoo.pair_rows(networks)
    if rows is None:
        return Subject(networks.params, None, given.images, given.labels)
    networks = dataclasses.replace(networks, params=jax.tree.map(np.asarray, networks.params))
    first, second = (networks[side] for side in rows)
    if len(given.images) == len(networks):  # an image for every network: the truth of a pair lies between its two
        truth = (given.images[rows[0]] + given.images[rows[1]]) / 2
    else:
        truth = given.images[first.records["image_index"]]
    return Subject(first.params, second.params, truth, first.records["label"])


def _instruments(
    config: Config,
    trained: Trained,
    aligners: Mapping[str, Trained],
    train: Zoo,
    given: images.Images,
    count: int,
) -> Instruments:
    model, variables, arch, mesh = trained.model, trained.variables, train.arch, runs.device_mesh(config)
    fixed = jax.tree.map(lambda leaf: np.asarray(leaf)[0], train.params)
    scoring = config.evaluation
    x = coordinates(given, scoring.search_pixels, config.seed)
    at_once = min(64, count)
    align = evaluation.make_align(arch, networks_at_once=at_once, mesh=mesh)
    make_search = evaluation.make_search(arch, x, mesh, max_sweeps=scoring.search_sweeps, kicks=scoring.search_kicks)
    search = evaluation.pairwise("search on what merged networks compute", make_search(align))
    learned = alignment.make_methods(aligners, make_search, networks_at_once=at_once, mesh=mesh)
    methods = evaluation.methods(arch, model, variables, fixed, {"search": search} | learned, align, mesh)
    points = scoring.points
    draw = make_draw(arch, given.images.shape[1:3], networks_at_once=min(512, count * points), mesh=mesh)
    follow = {
        reader: evaluation.make_follow(draw, reader, num_points=points, pairs_at_once=min(32, count), mesh=mesh)
        for reader in {method.network for method in methods.values()}
    }
    read = evaluation.make_read(model, variables, networks_at_once=at_once, mesh=mesh)
    copies = evaluation.make_transformed_copies(arch, networks_at_once=at_once, mesh=mesh)
    return Instruments(methods, follow, read, draw, _recognizer(given), copies, align)


def _kinds(config: Config, tools: Instruments, subject: Subject, keys: Iterator[Key]) -> dict[str, Params]:
    """The other network of every pair, by kind: another fit, and copies moved by each group with each noise."""
    kinds = {} if subject.second is None else {inr_report.INDEPENDENT: subject.second}
    copied = _first_rows(subject.first, config.evaluation.copies)
    for group, moves in GROUPS.items():
        for noise in config.evaluation.noises:
            pair_keys = evaluation.each_split(jax.random.split(next(keys), _count(copied)), 2)
            moved = tools.copies(copied, pair_keys[:, 0], pair_keys[:, 1], **moves, noise=noise)
            kinds[f"{group}, noise {noise:g}"] = moved
    return kinds


def _merge(
    tools: Instruments,
    kinds: Mapping[str, Params],
    member: Member,
    original: np.ndarray,
    subject: Subject,
    keys: Iterator[Key],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every method on every kind of pair, and the images along a few paths of the first kind."""
    merging: dict[str, Any] = {}
    pictures: dict[str, np.ndarray] = {}
    with progress.bar("Merging", len(kinds) * len(tools.methods), "tables") as advance:
        for kind, stack in kinds.items():
            other = tools.read(stack)
            drawn = tools.draw(other.params)
            one, images, pairs = _first_rows((member, original, subject), len(drawn))
            merging[kind] = {}
            for name, method in tools.methods.items():
                start, end = method.end_points(one, other)
                paths = tools.follow[method.network](start, end, images, drawn, pairs.truth)
                merging[kind][name] = _method_scores(method, paths, tools, pairs, next(keys))
                if len(merging) == 1:
                    pictures[name] = paths.images[:3, _nine_columns(len(paths.ts))]
                    merging[kind][name]["milliseconds"] = _milliseconds(tools, method, one, other)
                advance(1)
    return merging, pictures


def _method_scores(method: Method, paths: Paths, tools: Instruments, subject: Subject, key: Key) -> dict[str, Any]:
    recognized = float((tools.recognize(paths.middle) == subject.labels).mean())
    return {"label": method.label, **evaluation.summary(paths, key), "recognized": recognized}


def _milliseconds(tools: Instruments, method: Method, member: Member, other: Member) -> float:
    """The time that a pair takes by programs that are compiled, all pairs at once."""
    begin = time.perf_counter()
    if method.reads:
        member, other = tools.read(member.params), tools.read(other.params)
    jax.block_until_ready(method.end_points(member, other))
    return 1e3 * (time.perf_counter() - begin) / _count(member.params)


def _count(stack: Any) -> int:
    return len(jax.tree.leaves(stack)[0])


def _first_rows(stack: Any, count: int | None) -> Any:
    return jax.tree.map(lambda leaf: leaf[:count], stack)


def _nine_columns(points: int) -> np.ndarray:
    return np.unique(np.linspace(0, points - 1, 9).round().astype(int))


def _reconstruction(
    tools: Instruments, subject: Subject, original: np.ndarray, decoded: np.ndarray, train: images.Images
) -> dict[str, Any]:
    """How well decoded networks draw what their originals draw, and what a classifier still reads."""
    error, variance = float(np.square(decoded - original).mean()), float(train.images.var())
    drawn = {"images": subject.truth, "original": original, "decoded": decoded}
    return {
        "mse": error,
        "image_variance": variance,
        "share_of_variance": error / variance,
        "mean_image_mse": float(np.square(subject.truth - train.images.mean(0)).mean()),
        "recognized": {
            name: float((tools.recognize(several) == subject.labels).mean()) for name, several in drawn.items()
        },
    }


def _recognizer(given: images.Images) -> Callable[[np.ndarray], np.ndarray]:
    """A digit classifier trained on the training images: an outside judge of whether a drawn digit can be read."""
    from sklearn.svm import SVC

    count = min(len(given.images), 5000)
    judge = SVC(gamma="scale").fit(given.images[:count].reshape(count, -1), given.labels[:count])
    return lambda drawn: judge.predict(drawn.reshape(len(drawn), -1))


if __name__ == "__main__":
    watch.command(main, PRESETS)
