"""Learned matchers and frames over seeds, and on networks of other data and widths than they were trained on.

    python -m experiments.aligners digits                      # three seeds of scikit-learn's digits, no files needed
    python -m experiments.aligners digits --data mnist.npz     # MNIST too, shrunk to the same size
    python -m experiments.aligners tiny                        # seconds

For every seed the INRs of `python -m experiments.inr digits` are fitted, and its matcher and frame are trained on
them, without its autoencoder. They are scored on pairs of fits of unseen images, next to weight matching and search.
Then the models of the first seed align networks that they were not trained for: wider ones, with the same variables,
and those of other images; and models that are trained on other images align the first. `--resume` continues a run that
stopped.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import alignment, evaluation, inr, inr_zoo, progress, runs, tables, watch
from experiments.alignment import InrAlignmentConfig
from experiments.autoencoders import Trained
from experiments.evaluation import Member, Method
from experiments.inr_zoo import ZooConfig
from jax_scalegmn import network, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.types import Params
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class Config(inr_zoo.Config):
    """One run. Options of an unfinished run must stay the same when it is resumed."""

    data: Path | None = None
    """Images of a second data set, as in the other experiments, which are shrunk to the size of the digits; None for
    none. The first data set is scikit-learn's digits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of the networks and of the training."""
    wide: tuple[int, ...] = (2, 32, 32, 1)
    """The widths of the wider networks."""
    few_images: int = 100
    """The number of images of networks that no model is trained on; each is fitted twice."""
    both_ways: bool = True
    """Whether models are trained on the second data set, too. Without it those of the first are tried on it."""
    alignment: InrAlignmentConfig = dataclasses.field(default_factory=InrAlignmentConfig)
    search_sweeps: int = 10
    """The most sweeps of search matching."""
    search_kicks: int = 0
    """The number of times that search matching goes on from its result with some neurons moved at random."""
    points: int = 21
    """The number of points of every path."""


PRESETS = {
    "digits": (
        "scikit-learn's digits, 8 x 8; half an hour on two cores",
        Config(Path("runs/aligners"), alignment=alignment.MUON),
    ),
    "tiny": (
        "a few digits in seconds, to try the machinery",
        Config(
            Path("runs/aligners-tiny"),
            quick_compilation=True,
            zoo=inr_zoo.TINY,
            seeds=(0, 1),
            wide=(2, 8, 8, 1),
            alignment=InrAlignmentConfig(16, epochs=1, warmup_steps=2, features=8, num_layers=1, num_iterations=3),
            search_sweeps=1,
            points=5,
        ),
    ),
}
DIGITS, WIDE, OTHER = "digits", "wider networks of digits", "other images"


class Networks(NamedTuple):
    """Networks with the images that they were fitted to."""

    zoos: dict[str, Zoo]
    images: dict[str, images.Images]


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and returns the results, which are also stored in config.out / "results.json"."""
    runs.refuse_topology(config, "experiments.inr", "trains the same models")
    runs.join(config)
    alignment.check(config, config.alignment)
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ValueError(f"seeds are {config.seeds}; expected one or more, each once.")
    if config.alignment.epochs < 1:
        raise ValueError(
            f"alignment.epochs is {config.alignment.epochs}; expected 1 or more: this is what is compared."
        )
    others = _shrunk(config)
    with runs.Run(config) as run:
        seeds, first = {}, None
        for seed in config.seeds:
            networks, trained = _trained(config, f"digits-{seed}", seed, None, run.interruption)
            first = first or (networks, trained)
            seeds[str(seed)] = {
                "training": {name: one.history[-1] for name, one in trained.items()},
                "methods": _scored(config, f"digits-{seed}", networks, _methods(config, networks, trained)),
            }
            run.interruption.stop_if_requested(f"seed {seed}")
        assert first is not None  # checked
        transfer = _transfer(config, *first, others, run.interruption)
        return run.finish(
            {"seeds": seeds, "transfer": transfer}, "Learned matchers and frames", _sections, result_tables
        )


# --- networks and training ----------------------------------------------------------------------------------------


def _shrunk(config: Config) -> dict[str, images.Images] | None:
    """The second data set's images of every split, as large as the digits."""
    if config.data is None:
        return None
    digits = runs.load_images(inr_zoo.Config(config.out), config.zoo)["train"].images
    settings = dataclasses.replace(config.zoo, train_images=len(digits), size=None)
    given, size = runs.load_images(config, settings), digits.shape[1:3]
    return {
        split: images.Images(
            np.asarray(jax.image.resize(part.images, (len(part.images), *size), "linear")), part.labels
        )
        for split, part in given.items()
    }


def _trained(
    config: Config,
    name: str,
    seed: int,
    given: dict[str, images.Images] | None,
    interruption: progress.Interruption,
) -> tuple[Networks, dict[str, Trained]]:
    """The INRs of one seed, and the matcher and the frame that are trained on them."""
    own = inr_zoo.Config(config.out / name, seed=seed, zoo=config.zoo)
    given = runs.load_images(own, own.zoo) if given is None else given
    networks = Networks(inr_zoo.fit_all(own, given, interruption), given)
    x = inr.coordinates(given["train"])
    return networks, alignment.fit_on_inrs(own, config.alignment, networks.zoos, x, interruption)


def _scoring(
    config: Config, name: str, settings: ZooConfig, given: images.Images, interruption: progress.Interruption
) -> Networks:
    """INRs of a few scoring images alone."""
    few = images.Images(given.images[: config.few_images], given.labels[: config.few_images])
    own = inr_zoo.Config(config.out / name, seed=config.seeds[0], zoo=settings)
    arch = inr_zoo.architecture_of(settings)
    return Networks({"scoring": inr_zoo.fit_split(own, arch, "scoring", few, interruption)}, {"scoring": few})


def _transfer(
    config: Config,
    networks: Networks,
    trained: Mapping[str, Trained],
    others: dict[str, images.Images] | None,
    interruption: progress.Interruption,
) -> dict[str, Any]:
    """By what is aligned: weights, search, and the rows of models trained on it and on something else."""
    settings = dataclasses.replace(config.zoo, widths=config.wide)
    wide = _scoring(config, "digits-wide", settings, networks.images["scoring"], interruption)
    resized = {"matcher": _resized(trained["matcher"], wide)}
    found = {WIDE: _scored(config, WIDE, wide, _methods(config, wide, resized))}
    if others is None:
        return found
    if not config.both_ways:
        tried = _scoring(config, "others-few", config.zoo, others["scoring"], interruption)
        return found | {OTHER: _scored(config, OTHER, tried, _methods(config, tried, trained))}
    foreign, own = _trained(config, "others", config.seeds[0], others, interruption)
    labels = ("trained on digits", "trained on other images")
    for name, scored, models in (
        (OTHER, foreign, dict(zip(labels, (trained, own), strict=True))),
        (DIGITS, networks, dict(zip(labels, (trained, own), strict=True))),
    ):
        rows = _baselines(config, scored)
        for label, several in models.items():
            rows |= {
                f"{method}, {label}": one._replace(label=f"{one.label}, {label}")
                for method, one in _learned(config, scored, several).items()
            }
        found[name] = _scored(config, f"{name}, both", scored, rows)
    return found


def _resized(trained: Trained, networks: Networks) -> Trained:
    """A matcher for networks of another width, with the same variables."""
    part = networks.zoos["scoring"]
    return trained._replace(model=trained.model.resized(part.arch, zoo.scales(part)))


# --- scoring ------------------------------------------------------------------------------------------------------


def _methods(config: Config, networks: Networks, trained: Mapping[str, Trained]) -> dict[str, Method]:
    return _baselines(config, networks) | _learned(config, networks, trained)


def _baselines(config: Config, networks: Networks) -> dict[str, Method]:
    arch, mesh = networks.zoos["scoring"].arch, runs.device_mesh(config)
    align = evaluation.make_align(arch, mesh=mesh)
    search = _make_search(config, networks)(align)
    return {
        "naive": Method("naive", lambda a, b: (a.params, b.params), evaluation.itself),
        "weights": evaluation.pairwise("weights", lambda a, b: align(a, b).params),
        "search": evaluation.pairwise("search", search),
    }


def _learned(config: Config, networks: Networks, trained: Mapping[str, Trained]) -> dict[str, Method]:
    return alignment.make_methods(trained, _make_search(config, networks), mesh=runs.device_mesh(config))


def _make_search(
    config: Config, networks: Networks
) -> Callable[[evaluation.Align], Callable[[Params, Params], Params]]:
    """As `evaluation.make_search`, on the pixels of the scoring images."""
    arch, x = networks.zoos["scoring"].arch, inr.coordinates(networks.images["scoring"])
    options = {"max_sweeps": config.search_sweeps, "kicks": config.search_kicks}
    return evaluation.make_search(arch, x, runs.device_mesh(config), **options)


def _scored(config: Config, name: str, networks: Networks, methods: Mapping[str, Method]) -> dict[str, Any]:
    """The scores of all methods on some networks; read where a former run stored them."""
    path = config.out / "scores" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    if (found := runs.read_json(path)) is None:
        runs.write_json(path, _scores(config, networks, methods))
    return found or json.loads(path.read_text())


def _scores(config: Config, networks: Networks, methods: Mapping[str, Method]) -> dict[str, Any]:
    """By method the errors of merged networks to the true images, and between the pixels to the mean of the ends'."""
    part, given = networks.zoos["scoring"], networks.images["scoring"]
    rows = inr_zoo.pair_rows(part)
    assert rows is not None  # scoring images have two fits each
    first, second = (part[side] for side in rows)
    truth, size = given.images[first.records["image_index"]], given.images.shape[1:3]
    draw = inr.make_draw(part.arch, size, networks_at_once=512)
    follow = evaluation.make_follow(draw, evaluation.itself, num_points=config.points)
    between = _make_between(part.arch, size)
    drawn, keys = [draw(one.params) for one in (first, second)], runs.keys(config.seed + 1)
    members = [Member(one.params, one.params, jnp.zeros((len(one), 0))) for one in (first, second)]
    found = {}
    with progress.bar("Scoring", len(methods), "methods") as advance:
        for name, method in methods.items():
            start, end = method.end_points(*members)
            paths = follow(start, end, *drawn, truth)
            scores = {"label": method.label, **evaluation.summary(paths, next(keys))}
            found[name] = scores | {"between_pixels": float(between(start, end).mean()), "pairs": len(truth)}
            advance(1, method.label)
    return found


def _make_between(arch: Architecture, size: tuple[int, int]) -> Any:
    """(start, end) -> the squared error of the midpoint to the mean of the end points' outputs, half way to pixels."""
    fine = [2 * side - 1 for side in size]
    x = jnp.asarray(network.coordinates(*fine)).reshape(*fine, 2)[1::2, 1::2].reshape(-1, 2)

    def outputs(params: Params) -> jax.Array:
        return jax.vmap(functools.partial(network.apply, arch, params))(x)

    def error(start: Params, end: Params) -> jax.Array:
        middle = jax.tree.map(lambda a, b: (a + b) / 2, dict(start), dict(end))
        return jnp.square(outputs(middle) - (outputs(start) + outputs(end)) / 2).mean()

    return runs.in_chunks(error, 64)


# --- what is shown ------------------------------------------------------------------------------------------------


def result_tables(results: Mapping[str, Any]) -> list[tables.Table]:
    """The midpoint's error of every seed; and of every kind of network that was not trained for."""
    seeds = results["seeds"]
    first = next(iter(seeds.values()))["methods"]
    rows = []
    for name, method in first.items():
        values = [one["methods"][name]["midpoint"]["mean"] for one in seeds.values()]
        spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        rows.append([method["label"], f"{np.mean(values):.4f}", spread, *(f"{value:.4f}" for value in values)])
    head = ("method", "mean", "deviation", *(f"seed {seed}" for seed in seeds))
    shown = [tables.Table("Midpoints of INRs of digits", head, rows)]
    for name, methods in results["transfer"].items():
        rows = [[one["label"], f"{one['midpoint']['mean']:.4f}"] for one in methods.values()]
        shown.append(tables.Table(f"Midpoints: {name}", ("method", "midpoint"), rows))
    return shown


def _sections(results: Mapping[str, Any]) -> Iterable[str]:
    for table in result_tables(results):
        yield f"<h2>{table.title}</h2>" + tables.page(table)


if __name__ == "__main__":
    watch.command(main, PRESETS)
