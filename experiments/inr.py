"""INRs of images are canonicalized by a ScaleGMN autoencoder and merged (Boufalis et al. 2025, arXiv 2511.12601).

    python -m experiments.inr digits                      # scikit-learn's digits, no files needed
    python -m experiments.inr mnist --data mnist.npz      # the published setting; a GPU helps
    python -m experiments.inr tiny                        # seconds

Zoo, autoencoder, canonicalization, merging, evaluation, report. Everything lands in `--out`: the zoos, the
checkpoints, results.json with every number, report.html with every picture. `--resume` goes on where a run stopped.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_scalegmn as sg
from experiments import autoencoders, evaluation, progress, report, runs
from experiments.runs import ZooConfig
from jax_scalegmn import models, network
from jax_scalegmn.io import images
from jax_scalegmn.training import losses
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class TrainConfig(autoencoders.TrainConfig):
    """The training of the autoencoder."""

    orbit_weight: float = 0.3
    """Weight of the orbit-distance term, in units of the training images' variance; 0 as published."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The scoring."""

    noises: tuple[float, ...] = (0.0, 0.001, 0.002, 0.005)
    """Standard deviations of the perturbation of transformed copies."""
    points: int = 40
    orbits: int = 20
    """Networks whose orbits are embedded."""
    orbit_size: int = 32


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    model: autoencoders.ModelConfig = dataclasses.field(default_factory=autoencoders.ModelConfig)
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


PRESETS = {
    "digits": ("scikit-learn's digits, 8 x 8; minutes on two cores", Config(Path("runs/digits"))),
    "mnist": (
        "the published setting on 28 x 28 images; needs --data",
        Config(
            Path("runs/mnist"),
            zoo=ZooConfig(
                widths=(2, 32, 32, 1), steps=1000, train_fits=1, selection_images=5000, scoring_images=500, chunk=32
            ),
            model=autoencoders.ModelConfig(128, 4, dropout=0.2),
            train=TrainConfig(128, epochs=150, learning_rate=1e-3, warmup_steps=1000, micro_batch=2),
        ),
    ),
    "tiny": (
        "a few digits in seconds, to try the machinery",
        Config(
            Path("runs/tiny"),
            zoo=ZooConfig(
                widths=(2, 6, 6, 1), steps=60, train_fits=2, train_images=32, selection_images=8, scoring_images=8
            ),
            model=autoencoders.ModelConfig(8, 2),
            train=TrainConfig(16, epochs=3, warmup_steps=2, micro_batch=8),
            evaluation=EvaluationConfig((0.0, 0.005), points=5, orbits=3, orbit_size=4),
        ),
    ),
}


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which also stand in config.out / "results.json"."""
    start = time.perf_counter()
    images = runs.load_images(config, config.zoo)
    runs.claim(config)
    arch = sg.siren(config.zoo.widths, w0=config.zoo.w0)
    with progress.Interruption() as interruption:
        zoos = {split: runs.fit_zoo(config, arch, split, images[split], interruption) for split in images}
        zoo_seconds = time.perf_counter() - start
        size = images["train"].images.shape[1:]
        trained = fit_autoencoder(config, zoos, size, float(images["train"].images.var()), interruption)
    train_seconds = time.perf_counter() - start - zoo_seconds
    results = {
        "config": runs.plain(config),
        "environment": runs.environment(),
        "zoo": {split: runs.describe_zoo(one) for split, one in zoos.items()},
        "model": {"parameters": sum(leaf.size for leaf in jax.tree.leaves(trained["variables"]))},
        "training": trained["history"],
        **score(config, trained["model"], trained["variables"], zoos, images),
    }
    pictures = results.pop("pictures")
    results["seconds"] = {"zoo": zoo_seconds, "training": train_seconds, "total": time.perf_counter() - start}
    runs.write_json(config.out / "results.json", results)
    report.write(config.out / "report.html", results, pictures)
    progress.console.print(report.table(results))
    progress.console.print(f"Report: {config.out / 'report.html'}, numbers: {config.out / 'results.json'}")
    return results


# --- autoencoder --------------------------------------------------------------------------------------------------


def fit_autoencoder(
    config: Config, zoos: dict[str, Zoo], size: tuple[int, int], variance: float, interruption: progress.Interruption
) -> dict[str, Any]:
    """Trains the autoencoder, or goes on with it: model, best variables on the selection split, and history."""
    settings = config.train
    model = autoencoders.make_model(config.model, zoos["train"])
    loss = functools.partial(losses.autoencoder_loss, model, size=size, orbit_weight=settings.orbit_weight * variance)
    return autoencoders.fit(
        config,
        settings,
        model,
        {"train": loss(), "selection": loss(train=False)},
        {split: zoos[split].params for split in ("train", "selection")},
        interruption,
        note=lambda metrics: f"reconstruction {metrics['selection_reconstruction'] / variance:.1%} of the variance",
    )


# --- scoring ------------------------------------------------------------------------------------------------------


def score(
    config: Config, model: models.Autoencoder, variables: Any, zoos: dict[str, Zoo], images: dict[str, images.Images]
) -> dict[str, Any]:
    """All numbers of the report on networks and images that neither training nor selection has seen."""
    settings, arch = config.evaluation, model.arch
    keys = iter(jax.random.split(jax.random.key(config.seed + 1), 1000))
    count = len(zoos["scoring"]) // 2
    first, second = zoos["scoring"][:count].params, zoos["scoring"][count:].params
    truth = jnp.asarray(images["scoring"].images)
    size = truth.shape[1:]
    recognize = _recognizer(images["train"])
    fixed = jax.tree.map(lambda leaf: leaf[0], zoos["train"].params)
    methods = evaluation.methods(arch, model, variables, fixed)

    pairs = {report.INDEPENDENT: second}
    groups = {"P": (True, False), "D": (False, True), "PD": (True, True)}
    for group, (permute, flip) in groups.items():
        transform = jax.jit(functools.partial(evaluation.transformed_copies, arch, permute=permute, flip=flip))
        for noise in settings.noises:
            pairs[f"{group}, noise {noise:g}"] = transform(first, jax.random.split(next(keys), count), noise=noise)

    read = evaluation.make_read(model, variables)
    readers = {method.network for method in methods.values()}
    follow = {reader: evaluation.make_follow(arch, reader, num_points=settings.points) for reader in readers}
    film = {reader: evaluation.make_filmstrip(arch, reader, size) for reader in readers}
    member = read(first)
    merging: dict[str, Any] = {}
    pictures: dict[str, Any] = {"paths": {}}
    with progress.bar("Merging", len(pairs) * len(methods), "tables") as advance:
        for kind, stack in pairs.items():
            other = read(stack)
            merging[kind] = {}
            for name, method in methods.items():
                start, end = method.end_points(member, other)
                paths = follow[method.network](start, end, member, other, truth)
                merging[kind][name] = {
                    "label": method.label,
                    **evaluation.summary(paths, next(keys)),
                    "recognized": float((recognize(paths.middle) == images["scoring"].labels).mean()),
                }
                if kind == report.INDEPENDENT:
                    some = jax.tree.map(lambda leaf: leaf[:3], (start, end))
                    pictures["paths"][name] = np.asarray(film[method.network](*some))
                advance(1)

    drawn = jax.jit(jax.vmap(lambda params: network.render(arch, params, size)))
    original, decoded = drawn(member.params), drawn(member.decoded)
    error = float(jnp.square(decoded - original).mean())
    variance = float(images["train"].images.var())
    spread = evaluation.orbit_spread(
        arch, read, jax.tree.map(lambda leaf: leaf[: settings.orbits], first), next(keys), settings.orbit_size
    )
    orbit_latent = np.asarray(spread.pop("latent"))
    pictures |= {
        "truth": np.asarray(truth[:12]),
        "original": np.asarray(original[:12]),
        "decoded": np.asarray(decoded[:12]),
        "latent": np.asarray(member.latent),
        "labels": images["scoring"].labels,
        "orbits": orbit_latent,
        "orbit_labels": images["scoring"].labels[: settings.orbits],
    }
    return {
        "reconstruction": {
            "mse": error,
            "image_variance": variance,
            "share_of_variance": error / variance,
            "mean_image_mse": float(jnp.square(truth - images["train"].images.mean(0)).mean()),
            "recognized": {
                "images": float((recognize(truth) == images["scoring"].labels).mean()),
                "original": float((recognize(original) == images["scoring"].labels).mean()),
                "decoded": float((recognize(decoded) == images["scoring"].labels).mean()),
            },
        },
        "orbit": spread,
        "merging": merging,
        "pictures": pictures,
    }


# --- private ------------------------------------------------------------------------------------------------------


def _recognizer(given: images.Images) -> Any:
    """A digit classifier trained on the training images: an outside judge of whether a drawn digit can be read."""
    from sklearn.svm import SVC

    count = min(len(given.images), 5000)
    judge = SVC(gamma="scale").fit(given.images[:count].reshape(count, -1), given.labels[:count])
    return lambda drawn: judge.predict(np.asarray(drawn).reshape(len(drawn), -1))


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
