"""CNNs are canonicalized by a ScaleGMN autoencoder and merged (Boufalis et al. 2025, arXiv 2511.12601, section 5).

    python -m experiments.cnn digits                             # scikit-learn's digits, no files needed
    python -m experiments.cnn cifar --data cifar10_gray.npz      # CIFAR-10 in gray; a GPU helps
    python -m experiments.cnn tiny                               # a few minutes, to try the machinery

For relu (positive scales) and tanh (signs): a zoo of small CNNs over sampled hyper-parameters, an autoencoder that
distils them, and pairs of the best of them merged by every method, each without and with REPAIR (arXiv 2211.08403).
Images and networks of training, of selection and of scoring are disjoint. Everything lands in `--out`: the zoos, the
checkpoints, results.json and report.html. `--resume` goes on where a run stopped.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
import tyro
from jaxtyping import Array
from matplotlib.figure import Figure
from scipy import stats

from experiments import autoencoders, cnn_zoo, evaluation, progress, report, runs
from experiments.cnn_zoo import Data, ZooConfig
from experiments.evaluation import Member, Method
from jax_scalegmn import landscape, matching, merge, models, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.training import losses
from jax_scalegmn.types import Key, Params
from jax_scalegmn.zoo import Zoo, classifiers


@dataclasses.dataclass(frozen=True)
class TrainConfig(autoencoders.TrainConfig):
    """The training of the autoencoders."""

    epochs: int = 60
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    clip_norm: float = 5.0
    temperature: float = 0.6
    """Of the distillation."""
    distillation_images: int | None = None
    """At most so many of the training images; None for all."""
    images_per_step: int = 64
    """Of these, drawn anew for every network of every batch."""
    least_accuracy: float = 0.0
    """On their training images; networks below it are left out of the autoencoder's training."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The merging."""

    best: int = 30
    """So many of the scoring networks, by their accuracy on the images for selection, at the end of their training."""
    pairs: int = 20
    """Random pairs of them."""
    points: int = 21
    examples: int = 256
    """Training images whose activations are matched and repaired."""
    orbits: int = 8
    """Networks whose orbits are embedded."""
    orbit_size: int = 16


@dataclasses.dataclass(frozen=True)
class Config(cnn_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    model: autoencoders.ModelConfig = dataclasses.field(default_factory=autoencoders.ModelConfig)
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


PRESETS = {
    "digits": ("scikit-learn's digits, 16 x 16; minutes on two cores", Config(Path("runs/cnn-digits"))),
    "cifar": (
        "CIFAR-10 in gray, 32 x 32, the published networks; needs --data, a GPU helps",
        Config(
            Path("runs/cnn-cifar"),
            zoo=cnn_zoo.CIFAR,
            model=autoencoders.ModelConfig(64, 4),
            train=TrainConfig(epochs=60, distillation_images=5000),
        ),
    ),
    "tiny": (
        "a few digits in minutes, to try the machinery",
        Config(
            Path("runs/cnn-tiny"),
            zoo=ZooConfig(
                train_images=64,
                selection_images=16,
                scoring_images=16,
                channels=(1, 3, 4),
                networks=12,
                steps=6,
                checkpoints=2,
                batch_size=8,
                part=8,
            ),
            model=autoencoders.ModelConfig(4, 1),
            train=TrainConfig(4, epochs=2, warmup_steps=2, micro_batch=None, images_per_step=8),
            evaluation=EvaluationConfig(best=3, pairs=2, points=3, examples=16, orbits=2, orbit_size=3),
        ),
    ),
}

ACTIVATIONS = "activations"


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which also stand in config.out / "results.json"."""
    start = time.perf_counter()
    _check(config)
    data = cnn_zoo.load_data(config)
    runs.claim(config)
    results: dict[str, Any] = {"config": runs.plain(config), "environment": runs.environment(), "activations": {}}
    pictures = {}
    with progress.Interruption() as interruption:
        zoos = {
            activation: cnn_zoo.fit_zoo(config, activation, data, config.out / "zoo", interruption)
            for activation in config.activations
        }
        zoo_seconds = time.perf_counter() - start
        for activation, cnns in zoos.items():
            begin = time.perf_counter()
            parts = cnn_zoo.split(cnns, config.seed)
            trained = fit_autoencoder(config, activation, parts, data, interruption)
            train_seconds = time.perf_counter() - begin
            scored = score(config, trained["model"], trained["variables"], parts, data)
            pictures[activation] = scored.pop("pictures")
            results["activations"][activation] = {
                "zoo": cnn_zoo.describe(cnns),
                "model": {"parameters": sum(leaf.size for leaf in jax.tree.leaves(trained["variables"]))},
                "training": trained["history"],
                **scored,
                "seconds": {
                    "training": train_seconds,
                    "scoring": time.perf_counter() - begin - train_seconds,
                },
            }
    results["seconds"] = {"zoo": zoo_seconds, "total": time.perf_counter() - start}
    runs.write_json(config.out / "results.json", results)
    report.write_page(
        config.out / "report.html", "Merging CNNs by a ScaleGMN autoencoder", _sections(results, pictures)
    )
    for activation, one in results["activations"].items():
        progress.console.print(_table(activation, one))
    progress.console.print(f"Report: {config.out / 'report.html'}, numbers: {config.out / 'results.json'}")
    return results


# --- autoencoder --------------------------------------------------------------------------------------------------


def fit_autoencoder(
    config: Config,
    activation: str,
    parts: Mapping[str, Zoo],
    data: Mapping[str, Data],
    interruption: progress.Interruption,
) -> dict[str, Any]:
    """Trains the autoencoder of one activation, or goes on with it: model, best variables and history."""
    settings = config.train
    usable = parts["train"].records["train_accuracy"] >= settings.least_accuracy
    if usable.sum() < settings.batch_size:
        raise ValueError(
            f"{usable.sum()} {activation} networks reach train.least_accuracy={settings.least_accuracy:g}, fewer than "
            f"one batch of {settings.batch_size}. Lower it or train.batch_size, or raise zoo.networks."
        )
    networks = {"train": parts["train"][usable], "selection": parts["selection"]}
    model = autoencoders.make_model(config.model, networks["train"])
    shown = {"train": data["train"].x[: settings.distillation_images], "selection": data["selection"].x}
    loss = functools.partial(losses.distillation_loss, model, temperature=settings.temperature)
    return autoencoders.fit(
        config,
        settings,
        model,
        {
            "train": loss(shown["train"], images_per_step=min(settings.images_per_step, len(shown["train"]))),
            "selection": loss(shown["selection"], train=False),
        },
        {
            split: (cnns.params, losses.teacher_logits(cnns.arch, cnns.params, shown[split]))
            for split, cnns in networks.items()
        },
        interruption,
        name=activation,
        note=lambda metrics: f"agreement {metrics['selection_agreement']:.1%}",
    )


# --- scoring ------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """What one method does to a pair, at every point of the path [points], as it is and with REPAIR.

    Attributes:
      loss, accuracy: on the images for scoring.
      repaired_loss, repaired_accuracy: with REPAIR by the path's own end points.
    """

    loss: Array
    accuracy: Array
    repaired_loss: Array
    repaired_accuracy: Array


def score(
    config: Config, model: models.Autoencoder, variables: Any, parts: Mapping[str, Zoo], data: Mapping[str, Data]
) -> dict[str, Any]:
    """All numbers of one activation, on networks and images that neither training nor selection has seen."""
    settings, arch = config.evaluation, model.arch
    last = {name: one[one.records["step"] == one.records["step"].max()] for name, one in parts.items()}
    keys = iter(jax.random.split(jax.random.key(config.seed + 1), 1000))
    ranked = np.argsort(-last["scoring"].records["selection_accuracy"], kind="stable")[: settings.best]
    rng = np.random.default_rng(config.seed)
    drawn = [rng.choice(ranked, 2, replace=False) for _ in range(settings.pairs)]
    first, second = (last["scoring"][np.array([pair[side] for pair in drawn])] for side in (0, 1))
    best_of_training = int(np.argmax(last["train"].records["selection_accuracy"]))
    fixed = stacks.member(last["train"].params, best_of_training)

    read = evaluation.make_read(model, variables)
    a, b = read(first.params), read(second.params)
    examples = data["train"].x[: settings.examples]
    methods = all_methods(arch, model, variables, fixed, examples)
    follow = {
        reader: make_follow(arch, reader, data["scoring"], examples, settings.points)
        for reader in {method.network for method in methods.values()}
    }
    whole = np.mean([one.records["scoring_accuracy"] for one in (first, second)], 0)
    merging = {}
    with progress.bar("Merging", len(methods) * settings.pairs, "pairs") as advance:
        for name, method in methods.items():
            start, end = method.end_points(a, b)
            rows = []
            for pair in range(settings.pairs):
                rows.append(jax.block_until_ready(follow[method.network](*stacks.member((start, end), pair))))
                advance(1, method.label)
            paths = Scored(*(jnp.stack(values) for values in zip(*rows, strict=True)))
            merging[name] = {"label": method.label, **summary(paths, jnp.asarray(whole), next(keys))}

    originals = last["scoring"]
    score_all = jax.jit(lambda stack: jax.lax.map(lambda one: classifiers.score(arch, one, *data["scoring"]), stack))
    decoded = np.asarray(score_all(read(originals.params).decoded).accuracy)
    recorded = originals.records["scoring_accuracy"]
    spread = evaluation.orbit_spread(
        arch,
        read,
        jax.tree.map(lambda leaf: leaf[ranked[: settings.orbits]], originals.params),
        next(keys),
        settings.orbit_size,
    )
    spread.pop("latent")
    tau = stats.kendalltau(decoded, recorded).statistic
    return {
        "distillation": {
            "accuracy_error": float(np.abs(decoded - recorded).mean()),
            "kendall_tau": float(tau) if np.isfinite(tau) else None,
        },
        "orbit": spread,
        "end_points": float(whole.mean()),
        "merging": merging,
        "pictures": {"decoded": decoded, "recorded": recorded},
    }


def all_methods(
    arch: Architecture, model: models.Autoencoder, variables: Any, fixed: Params, examples: Array
) -> dict[str, Method]:
    """Those of `evaluation.methods`, and matching by activations."""

    @jax.jit
    def by_activations(stack: Params, targets: Params) -> Params:
        def one(pair: tuple[Params, Params]) -> Params:
            found = matching.activation_matching(arch, *pair, examples)
            return symmetry.act(arch, found.element, pair[0])

        return jax.lax.map(one, (stack, targets))

    def end_points(a: Member, b: Member) -> tuple[Params, Params]:
        return a.params, by_activations(b.params, a.params)

    found = evaluation.methods(arch, model, variables, fixed)
    itself = found["naive"].network
    return {"naive": found["naive"], ACTIVATIONS: Method("matching by activations", end_points, itself)} | found


def make_follow(arch: Architecture, read: Any, given: Data, examples: Array, points: int) -> Any:
    """(start, end) of one pair -> `Scored`; compiled. `read` gives the network at a point of the path."""

    def follow(start: Any, end: Any) -> Scored:
        ends = stacks.stack(dict(read(start)), dict(read(end)))

        def at(t: Array) -> tuple[Array, ...]:
            params = read(merge.lerp(start, end, t))
            mended = merge.repair(arch, params, ends, examples, weights=jnp.stack([1 - t, t]))
            return *classifiers.score(arch, params, *given), *classifiers.score(arch, mended, *given)

        return Scored(*jax.lax.map(at, jnp.linspace(0, 1, points)))

    return jax.jit(follow)


def summary(paths: Scored, original: Array, key: Key) -> dict[str, Any]:
    """Means over pairs, with 95 % bootstrap intervals: at t = 1/2, of the barriers, of what the end points lost."""
    found: dict[str, Any] = {}
    for kind, loss, accuracy in (
        ("plain", paths.loss, paths.accuracy),
        ("repaired", paths.repaired_loss, paths.repaired_accuracy),
    ):
        half = accuracy.shape[1] // 2
        found[kind] = {
            "accuracy": evaluation.interval(accuracy[:, half], key),
            "loss": evaluation.interval(loss[:, half], key),
            "barrier": evaluation.interval(jax.vmap(landscape.height)(loss), key),
            "end_point_gap": evaluation.interval(original - accuracy[:, jnp.asarray([0, -1])].mean(1), key),
            "path_accuracy": accuracy.mean(0).tolist(),
            "path_loss": loss.mean(0).tolist(),
        }
    return found


# --- private ------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    settings = config.evaluation
    if settings.points % 2 == 0 or settings.points < 3 or settings.pairs < 1 or settings.best < 2:
        raise ValueError(
            f"evaluation.points is {settings.points}, pairs {settings.pairs}, best {settings.best}; expected an odd "
            "number of points >= 3, so that one of them is t = 1/2, a pair or more, and two networks or more."
        )
    if not set(config.activations) <= {"relu", "tanh"} or not config.activations:
        raise ValueError(f"activations are {config.activations}; expected 'relu', 'tanh' or both.")


def _rows(one: Mapping[str, Any]) -> list[list[str]]:
    """Accuracies in % at t = 1/2, losses and barriers in nats, without and with REPAIR; gaps of the end points in %."""
    rows = [["method", "accuracy", "REPAIR", "loss", "REPAIR", "barrier", "REPAIR", "end-point gap"]]
    rows.append(["end points", f"{100 * one['end_points']:.1f}", *[""] * 6])
    for method in one["merging"].values():
        cells = [method["label"]]
        cells += [_with_interval(method[kind]["accuracy"], 100, 1) for kind in ("plain", "repaired")]
        cells += [f"{method[kind]['loss']['mean']:.3f}" for kind in ("plain", "repaired")]
        cells += [_with_interval(method[kind]["barrier"], 1, 3) for kind in ("plain", "repaired")]
        rows.append([*cells, f"{100 * method['plain']['end_point_gap']['mean']:.1f}"])
    return rows


def _with_interval(value: Mapping[str, float], factor: float, digits: int) -> str:
    mean, low, high = (f"{factor * value[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _table(activation: str, one: Mapping[str, Any]) -> rich.table.Table:
    """The means, as wide as a terminal."""
    head, *body = [[cell.split(" [")[0] for cell in row] for row in _rows(one)]
    shown = rich.table.Table(title=f"Pairs of {activation} CNNs: accuracy %, loss", box=rich.box.SIMPLE)
    for name in head:
        shown.add_column(name, justify="left" if name == head[0] else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def _sections(results: Mapping[str, Any], pictures: Mapping[str, Any]) -> Iterable[str]:
    for activation, one in results["activations"].items():
        zoo, lost, reached = one["zoo"], one["distillation"], one["zoo"]["scoring_accuracy"]
        yield f"<h2>{activation}</h2>"
        yield (
            f"<p>{zoo['networks']} networks at {zoo['checkpoints']} checkpoints in all ({zoo['left_out']} diverged and "
            f"are left out); accuracy at the end {reached['5']:.1%}, {reached['50']:.1%} and {reached['95']:.1%} (5th, "
            f"50th and 95th percentile). The autoencoder has {one['model']['parameters']:,} parameters. The accuracy "
            f"of decoded networks differs from their originals' by {lost['accuracy_error']:.1%} in the mean (Kendall's "
            f"tau {lost['kendall_tau'] or 0:.2f}). Embeddings of one orbit spread {one['orbit']['ratio']:.1e} times "
            "as far as those of different networks.</p>"
        )
        yield report.html_table(_rows(one))
        yield report.html_image(_curves(one)) + report.html_image(_training(one, pictures[activation]))
    yield (
        "<p class=note>Pairs of the best scoring networks, with 95 % bootstrap intervals over pairs. Accuracy in % and "
        "loss in nats at t = 1/2, on images that served for nothing else. Barrier: maximum of the loss above the chord "
        "between the end points. REPAIR: with the end points' statistics of activations on training images. End-point "
        "gap: accuracy in % that the path's end points lost against their originals.</p>"
    )
    yield report.html_settings({name: results[name] for name in ("config", "environment", "seconds")})


def _curves(one: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 4.2))
    kinds = {"plain": "as it is", "repaired": "with REPAIR"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
        for method in one["merging"].values():
            path = method[kind]["path_accuracy"]
            axes.plot(np.linspace(0, 1, len(path)), path, label=method["label"])
        axes.set(title=title, xlabel="t", ylabel="accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0))
    return figure


def _training(one: Mapping[str, Any], drawn: Mapping[str, Any]) -> Figure:
    """The losses of training, and the accuracies of decoded networks over their originals'."""
    figure = Figure(figsize=(13, 3.8))
    left, right = figure.subplots(1, 2)
    history = one["training"]
    for name in ("train_distillation", "selection_distillation"):
        left.plot([epoch["step"] for epoch in history], [epoch[name] for epoch in history], label=name)
    left.set(xlabel="step", yscale="log")
    left.legend()
    right.plot([0, 1], [0, 1], color="#bbb")
    right.scatter(drawn["recorded"], drawn["decoded"], s=12)
    right.set(xlabel="accuracy of the original", ylabel="of the decoded")
    return figure


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
