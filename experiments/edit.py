"""INRs are edited so that they draw the dilated image, by editors that write one network or average several.

    python -m experiments.edit digits                            # scikit-learn's digits, no files needed
    python -m experiments.edit mnist-small --data mnist.npz      # INRs of 28 x 28 images, on two cores
    python -m experiments.edit mnist --data mnist.npz            # the published setting; needs a GPU
    python -m experiments.edit tiny                              # a minute

Every pixel of the goal is the largest of its 3 x 3 neighborhood in the true image (arXiv 2302.14040, 2406.10685). An
editor reads a network's weights and writes k networks whose outputs are averaged (arXiv 2602.01083), all equivariant;
editors of every k have as many parameters as that of the first k. The folder `--out` receives everything: the zoos,
the checkpoints, results.json and report.html. `--resume` continues a run that stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import ndimage

from experiments import autoencoders, compile_only, evaluation, inr, inr_zoo, report, runs, tables, watch
from experiments.inr_zoo import ZooConfig
from jax_scalegmn import architecture, models, network, zoo
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.io import images
from jax_scalegmn.training import losses
from jax_scalegmn.types import Params
from jax_scalegmn.zoo import Zoo

PUBLISHED = {"ScaleGMN, both ways": 1.89, "GMN": 1.96, "GMN, 8 networks": 1.06}
"""MSE x 100 on 60,000 published INRs of MNIST (arXiv 2406.10685, 2602.01083)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(autoencoders.ScaleGMNConfig):
    """The editors: the first, whose number of parameters the others match by their features."""

    features: int = 16
    """The number of entries of a node or edge feature."""
    bidirectional: bool = True
    """Whether messages also run from receivers to senders, with parameters of their own."""
    tolerance: float = 0.1
    """The largest relative difference between the editors' numbers of parameters."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(autoencoders.TrainConfig):
    """The training of every editor."""

    epochs: int = 20
    learning_rate: float = 4e-3
    warmup_steps: int = 100


@dataclasses.dataclass(frozen=True)
class Config(inr_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    networks: tuple[int, ...] = (1, 2, 4, 8)
    """The numbers k of networks that an editor writes, each trained by itself."""
    symmetry: Literal["equivariant", "permutation"] = "equivariant"
    """What the editors follow: the whole group of the networks, or permutations alone."""
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


PRESETS = {
    "digits": (
        "scikit-learn's digits, 8 x 8; minutes on two cores",
        Config(Path("runs/edit-digits"), zoo=ZooConfig(selection_images=100, train_fits=2)),
    ),
    "mnist-small": (
        "8,192 INRs of 28 x 28 images on two cores; needs --data",
        Config(
            Path("runs/edit-mnist-small"),
            zoo=inr.PRESETS["mnist-small"][1].zoo,  # so that the folder "zoo" of that run can be copied
            model=ModelConfig(num_layers=3),
            train=TrainConfig(16, epochs=8, micro_batch=4),
        ),
    ),
    "mnist": (
        "the published setting on 28 x 28 images; needs --data, and a GPU",
        Config(
            Path("runs/edit-mnist"),
            zoo=inr_zoo.PUBLISHED,
            model=ModelConfig(64, 10, io=models.IO.SEPARATE),
            train=TrainConfig(128, epochs=100, learning_rate=1e-3, warmup_steps=1000, micro_batch=None),
        ),
    ),
    "tiny": (
        "a few digits in a minute or two, to try the machinery",
        Config(
            Path("runs/edit-tiny"),
            zoo=dataclasses.replace(inr_zoo.TINY, train_fits=1),
            quick_compilation=True,
            networks=(1, 2),
            model=ModelConfig(6, 1, tolerance=0.2),
            train=TrainConfig(16, epochs=2, warmup_steps=2, micro_batch=None),
        ),
    ),
}

OBJECTIVE = ("editors.1.mse.mean", "minimize")  # advised to sweeps

zoo_key, fit_zoo = inr_zoo.zoo_key, inr_zoo.fit_zoo  # of a sweep


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    if not config.networks or min(config.networks) < 1 or len(set(config.networks)) < len(config.networks):
        raise ValueError(f"networks are {config.networks}; expected one or more different numbers >= 1.")
    if config.compile_only is not None:
        return compile_only.run(config.compile_only, functools.partial(programs, config))
    runs.join(config)
    runs.check_batch(config, config.train.batch_size)
    given = runs.load_images(config, config.zoo)
    inr_zoo.check_fits(config.zoo, given["train"], config.train.batch_size)
    arch = inr_zoo.architecture_of(config.zoo)
    matched_features(config, arch)
    with runs.Run(config) as run:
        with run.timed("zoo"):
            zoos = inr_zoo.fit_all(config, given, run.interruption)
        goals = {split: dilated(part) for split, part in given.items()}
        editors = make_editors(config, arch, zoo.scales(zoos["train"]))
        results: dict[str, Any] = {
            "zoo": {split: inr_zoo.describe(part) for split, part in zoos.items()},
            "baselines": _baselines(zoos, given, goals),
            "editors": {},
        }
        for networks, model in editors.items():
            with run.timed(f"editor of {networks}"):
                trained = fit(config, networks, model, zoos, goals, run.interruption)
            results["editors"][str(networks)] = score(config, trained, zoos["scoring"], goals["scoring"])
        return run.finish(results, "Editing INRs", _sections, lambda results: [_table(results)])


def programs(config: Config, mesh: Mesh) -> Iterator[compile_only.Program]:
    """The programs of the experiment, to be compiled and not run."""
    arch, size = inr_zoo.architecture_of(config.zoo), runs.unread_images(config, config.zoo).images.shape[1:3]
    row = compile_only.params_of(arch), jax.ShapeDtypeStruct(size, np.float32)
    for networks, model in make_editors(config, arch, (1.0,) * len(arch.parameters)).items():
        name = f"editor of {networks}, training step"
        yield compile_only.training_step(mesh, name, model, losses.editing(model), config.train, row)
    yield compile_only.fitting_step(mesh, arch, size, config.zoo.chunk)


# --- editors ------------------------------------------------------------------------------------------------------


def matched_features(config: Config, arch: Architecture) -> dict[int, int]:
    """The features of the editor of every k, by which all have as many parameters as the first has.

    Raises:
      ValueError: If no number of features comes within the tolerance.
    """
    settings, example = config.model, architecture.abstract_params(arch)
    first = config.networks[0]

    def count(features: int, networks: int) -> int:
        return models.num_parameters(_editor(config, arch, features, networks, None), example)

    target, found = count(settings.features, first), {first: settings.features}
    for networks in config.networks[1:]:
        found[networks] = models.match_size(
            lambda features, networks=networks: _editor(config, arch, features, networks, None), example, target
        )
        got = count(found[networks], networks)
        if abs(got / target - 1) > settings.tolerance:
            raise ValueError(
                f"The editor of {networks} networks has {got} parameters at best for the {target} of that of {first}, "
                f"which model.tolerance={settings.tolerance:g} does not allow. Raise model.features or the tolerance."
            )
    return found


def make_editors(config: Config, arch: Architecture, scales: tuple[float, ...]) -> dict[int, models.Editor]:
    """The editor of every k."""
    return {
        networks: _editor(config, arch, features, networks, scales)
        for networks, features in matched_features(config, arch).items()
    }


def _editor(
    config: Config, arch: Architecture, features: int, networks: int, scales: tuple[float, ...] | None
) -> models.Editor:
    read, options = arch, config.model.options() | {"features": features}
    if config.symmetry == "permutation":
        read = architecture.restrict(arch, Scaling.PERMUTATION)
        for name in ("canonical", "io", "encoding_features", "message_layers", "update_layers"):
            options.pop(name)  # of no meaning without signs and scales
    return models.Editor(models.ScaleGMN(read, **options), scales=scales, networks=networks)


def fit(
    config: Config,
    networks: int,
    model: models.Editor,
    zoos: Mapping[str, Zoo],
    goals: Mapping[str, np.ndarray],
    interruption: Any,
) -> autoencoders.Trained:
    """Trains the editor of k networks, or continues with it."""
    rows = {split: (zoos[split].params, _goals(zoos[split], goals[split])) for split in ("train", "selection")}
    return autoencoders.fit(
        config,
        config.train,
        model,
        {"train": losses.editing(model), "selection": losses.editing(model, train=False)},
        rows,
        interruption,
        note=lambda metrics: f"MSE x 100 {100 * metrics['selection_loss']:.2f}",
        title=f"Editor of {networks}",
        folder=f"checkpoints/{networks}",
    )


# --- scoring ------------------------------------------------------------------------------------------------------


def dilated(given: images.Images) -> np.ndarray:
    """Images whose every pixel is the largest of its 3 x 3 neighborhood."""
    return ndimage.grey_dilation(given.images, size=(1, 3, 3))


def score(config: Config, trained: autoencoders.Trained, scoring: Zoo, goals: np.ndarray) -> dict[str, Any]:
    """The errors on networks of unseen images, and on copies of them moved by random elements."""
    model, arch, seed, mesh = trained.model, scoring.arch, config.seed, runs.device_mesh(config)
    goal = _goals(scoring, goals)
    draw = make_draw(model, trained.variables, goal.shape[1:], mesh)
    keys = evaluation.each_split(jax.random.split(jax.random.key(seed), len(scoring)), 2)
    copies = evaluation.make_transformed_copies(arch, mesh=mesh)
    moved = copies(scoring.params, keys[:, 0], keys[:, 1], permute=True, scale=True)
    errors, of_moved = (evaluation.squared_error(draw(stack), goal) for stack in (scoring.params, moved))
    return {
        "parameters": trained.parameters,
        "features": model.gmn.features,
        "mse": evaluation.intervals(errors[None], jax.random.key(seed))[0],
        "moved_mse": float(of_moved.mean()),
        "training": trained.history,
    }


def make_draw(
    model: models.Editor, variables: Any, size: tuple[int, int], mesh: Mesh | None = None
) -> Callable[[Params], np.ndarray]:
    """A stack of INRs -> what their edited networks draw on average, [networks, height, width]."""

    def one(params: Params) -> jax.Array:
        edited = model.apply(variables, params)
        return jax.vmap(lambda params: network.render(model.gmn.arch, params, size))(edited).mean(0).reshape(size)

    return runs.in_chunks(one, 64, mesh)


def _goals(networks: Zoo, goals: np.ndarray) -> jax.Array:
    return jnp.asarray(goals[networks.records["image_index"]])


def _baselines(
    zoos: Mapping[str, Zoo], given: Mapping[str, images.Images], goals: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The errors of what needs no editor: the networks unchanged, their true images, and the mean of the goals."""
    scoring, size = zoos["scoring"], goals["scoring"].shape[1:]
    goal = np.asarray(_goals(scoring, goals["scoring"]))
    draw = runs.in_chunks(lambda params: network.render(scoring.arch, params, size).reshape(size), 64)
    drawn = {
        "unedited": draw(scoring.params),
        "true_image": given["scoring"].images[scoring.records["image_index"]],
        "mean_goal": np.broadcast_to(goals["train"].mean(0), goal.shape),
    }
    return {name: float(evaluation.squared_error(several, goal).mean()) for name, several in drawn.items()}


# --- report -------------------------------------------------------------------------------------------------------


def _table(results: Mapping[str, Any]) -> tables.Table:
    rows = [
        [
            f"{networks} network{'s' if networks != '1' else ''}",
            f"{one['parameters']:,}",
            str(one["features"]),
            str(len(one["training"])),
            f"{100 * one['mse']['mean']:.2f} [{100 * one['mse']['low']:.2f}, {100 * one['mse']['high']:.2f}]",
            f"{100 * one['moved_mse']:.2f}",
        ]
        for networks, one in results["editors"].items()
    ]
    return tables.Table(
        "Dilation of INRs of unseen images, mean squared error x 100",
        ("editor of", "parameters", "features", "epochs", "MSE x 100", "moved"),
        rows,
    )


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    base = results["baselines"]
    counts = ", ".join(
        f"{part['networks']} networks of {part['images']} images for {name}" for name, part in results["zoo"].items()
    )
    yield (
        f"<p>{counts}; no image is used twice. Without an editor: the networks unchanged {100 * base['unedited']:.2f}, "
        f"their true images {100 * base['true_image']:.2f}, the mean dilated image {100 * base['mean_goal']:.2f}.</p>"
    )
    yield "<h2>Dilation</h2>" + tables.page(_table(results))
    published = ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED.items())
    yield (
        "<p class=note>Mean squared error x 100 against the dilated image, with 95 % bootstrap intervals over "
        "networks. Moved: the same networks moved by random group elements. Published, on 60,000 networks: "
        f"{published}.</p>"
    )
    lines = []
    for networks, one in results["editors"].items():
        epochs = list(range(1, len(one["training"]) + 1))
        errors = [100 * epoch["selection_loss"] for epoch in one["training"]]
        lines.append(report.Line(f"{networks} networks", epochs, errors))
    yield "<h2>Training</h2>" + report.chart(lines, x="epoch", y="MSE x 100 on selection networks", log=True)
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


if __name__ == "__main__":
    watch.command(main, PRESETS)
