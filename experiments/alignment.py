"""The learned matchers and frames of the INR and CNN experiments: options, training, and rows of the tables."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments import autoencoders, evaluation, inr_zoo, progress, runs
from experiments.autoencoders import Trained
from experiments.evaluation import Method
from experiments.moves import MoveConfig, moved
from jax_scalegmn import matching, models, symmetry, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.training import losses
from jax_scalegmn.types import LossFn, Params
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(autoencoders.TrainConfig):
    """The learned matcher and the learned frame, and their training on pairs of networks."""

    batch_size: int = 64
    """The number of pairs in a batch."""
    epochs: int = 14
    """The number of passes over all pairs of training networks; 0 trains none and leaves out their rows."""
    learning_rate: float = 2e-3
    """The learning rate after the warm-up."""
    warmup_steps: int = 50
    """The number of steps over which the learning rate rises to its value."""
    clip_norm: float = 1.0
    """The largest norm of a gradient; longer ones are scaled down to it."""
    micro_batch: int | None = None
    """The number of pairs differentiated at a time, which bounds the memory; None for the whole batch."""
    features: int = 48
    """The number of features of a neuron."""
    num_layers: int = 6
    """The number of message passing layers."""
    outputs: int = 32
    """The number of entries of the vector by which a neuron is matched."""
    num_iterations: int = 4
    """The number of Sinkhorn iterations in training."""
    end_weight: float = 0.1
    """The weight of the end points in the loss, which makes soft elements hard."""
    frame_start: Literal["random", "matcher"] = "random"
    """Whether the frame starts with random variables, or as the trained matcher next to the first training network."""
    frame_epochs: int | None = None
    """The number of passes in the training of the frame; None for `epochs`."""


KINDS = {"matcher": models.Matcher, "frame": models.Frame}

# Stacks of the networks of pairs: the ones that are moved, and their targets.
Pairs: TypeAlias = tuple[Params, Params]


def make_model(
    settings: AlignmentConfig, name: str, arch: Architecture, scales: tuple[float, ...] | None
) -> models.Matcher | models.Frame:
    """The model of a name of `KINDS`."""
    return KINDS[name](
        arch,
        models.alignment_encoder(arch, settings.features, num_layers=settings.num_layers),
        outputs=settings.outputs,
        scales=scales,
        num_iterations=settings.num_iterations,
    )


def check(config: runs.OnDevices, settings: AlignmentConfig) -> None:
    """Checks, before a zoo is fitted, the options of a training.

    Raises:
      ValueError: If the devices do not divide a batch.
    """
    if settings.epochs:
        runs.check_batch(config, settings.batch_size, "alignment.batch_size")


def reads_one(name: str) -> str | None:
    """The method by which a model of `KINDS` reads one network; None for `__call__`."""
    return "embed" if name == "matcher" else None


def fit(
    config: runs.RunConfig,
    settings: AlignmentConfig,
    networks: Zoo,
    rows: Mapping[str, Pairs],
    make_losses: Callable[[models.Matcher | models.Frame], Mapping[str, LossFn]],
    interruption: progress.Interruption,
    *,
    cure: str,
    name: str = "",
) -> dict[str, Trained]:
    """Trains a matcher and a frame on what merged networks compute, or continues with them.

    Empty where nothing is to be trained, or where there are too few pairs, which is printed.

    Args:
      config: The run's options; its folder receives the checkpoints.
      settings: The options of the models and their training.
      networks: The training networks, by which weights are divided.
      rows: The pairs of "train" and of "selection".
      make_losses: A model -> its losses on these two.
      interruption: Stops the training after an epoch.
      cure: What to change where there are too few pairs.
      name: What tells these networks from others of the run.
    """
    if settings.epochs == 0 or _are_few(settings, rows, cure):
        return {}
    trained: dict[str, Trained] = {}
    for kind in KINDS:
        model = make_model(settings, kind, networks.arch, zoo.scales(networks))
        from_matcher = kind == "frame" and settings.frame_start == "matcher"
        trained[kind] = autoencoders.fit(
            config,
            _frame_settings(settings) if kind == "frame" else settings,
            model,
            make_losses(model),
            rows,
            interruption,
            note=lambda metrics: f"midpoint {metrics['selection_merged']:.4f}",
            title=" ".join(filter(None, ("Learned", kind, name))),
            folder="/".join(filter(None, ("alignment", name, kind))),
            method=reads_one(kind),
            start=_frame_of(trained["matcher"], rows["train"]) if from_matcher else None,
        )
    return trained


def results(trained: Mapping[str, Trained]) -> dict[str, Any]:
    """Sizes and numbers of every epoch of the trained models, as JSON values."""
    return {name: {"parameters": one.parameters, "training": one.history} for name, one in trained.items()}


def make_methods(
    trained: Mapping[str, Trained],
    make_search: Callable[[evaluation.Align], Callable[[Params, Params], Params]],
    *,
    networks_at_once: int = 64,
    mesh: Mesh | None = None,
) -> dict[str, Method]:
    """The rows of the trained models, and of a search that begins at the learned matching."""
    rows: dict[str, Method] = {}
    if "matcher" in trained:
        matcher = trained["matcher"]
        match = functools.partial(matcher.model.apply, matcher.variables)
        align = evaluation.make_align(matcher.model.arch, match, networks_at_once=networks_at_once, mesh=mesh)
        rows["learned_matching"] = evaluation.pairwise("learned matching", lambda a, b: align(a, b).params)
    if "frame" in trained:
        framed = _make_framed(trained["frame"], mesh)
        rows["learned_frame"] = Method(
            "learned frame", lambda a, b: (framed(a.params), framed(b.params)), evaluation.itself
        )
    if "matcher" in trained:
        rows["learned_search"] = evaluation.pairwise("search from the learned matching", make_search(align))
    return rows


# --- INRs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class InrAlignmentConfig(AlignmentConfig):
    """The learned matcher and frame of INRs, and their training on pairs of fits of one image."""

    moves: MoveConfig = dataclasses.field(default_factory=MoveConfig)


MUON = InrAlignmentConfig(
    epochs=6, learning_rate=7e-3, optimizer="muon", moves=MoveConfig(turn=6.0, shift=0.06, stretch=0.06)
)
"""Fewer passes, with Muon, over networks that draw moved images; chosen on digits."""


def fit_on_inrs(
    config: runs.RunConfig,
    settings: InrAlignmentConfig,
    zoos: Mapping[str, Zoo],
    x: Float[Array, "examples inputs"],
    interruption: progress.Interruption,
) -> dict[str, Trained]:
    """Trains a matcher and a frame on what merged INRs draw at the coordinates x, or continues with them."""
    return fit(
        config,
        settings,
        zoos["train"],
        {split: pairs_of_fits(zoos[split]) for split in ("train", "selection")},
        functools.partial(inr_losses, settings, x),
        interruption,
        cure="Raise zoo.train_fits or zoo.train_images",
    )


def inr_losses(
    settings: InrAlignmentConfig, x: Float[Array, "examples inputs"], model: models.Matcher | models.Frame
) -> dict[str, LossFn]:
    """The losses of training, in which images are moved, and of selection."""
    loss = functools.partial(losses.alignment, model, x, end_weight=settings.end_weight)
    return {"train": moved(settings.moves, model.arch, loss()), "selection": loss(train=False)}


def pairs_of_fits(networks: Zoo) -> Pairs:
    """All pairs of fits of one image; none where records do not say a network's image."""
    found = [pair for rows in inr_zoo.rows_by_image(networks) for pair in itertools.combinations(rows, 2)]
    return _pairs(networks, np.array(found, int).reshape(-1, 2))


# --- CNNs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CnnAlignmentConfig(AlignmentConfig):
    """The learned matcher and frame of CNNs, and their training on random pairs."""

    pairs: int = 2048
    """The most random pairs of the networks that the autoencoder is trained on, at the end of their training."""
    selection_pairs: int = 64
    """The most random pairs of networks for selection."""
    images_per_step: int = 64
    """The number of training images on which functions are compared, drawn anew for every pair of every batch."""
    selection_images: int = 200
    """The most images for selection on which functions are compared."""


def fit_on_cnns(
    config: runs.RunConfig,
    settings: CnnAlignmentConfig,
    networks: Mapping[str, Zoo],
    images: Mapping[str, Float[Array, "images height width channels"]],
    interruption: progress.Interruption,
    *,
    name: str,
) -> dict[str, Trained]:
    """Trains a matcher and a frame on what merged CNNs say of images, or continues with them; no labels are read."""
    most = {"train": settings.pairs, "selection": settings.selection_pairs}
    return fit(
        config,
        settings,
        networks["train"],
        {split: random_pairs(networks[split], most[split], config.seed) for split in most},
        functools.partial(cnn_losses, settings, images),
        interruption,
        cure="Raise zoo.networks",
        name=name,
    )


def cnn_losses(
    settings: CnnAlignmentConfig, images: Mapping[str, Array], model: models.Matcher | models.Frame
) -> dict[str, LossFn]:
    """The losses of training and of selection, cross-entropies of what networks say of these images."""
    loss = functools.partial(losses.alignment, model, distance=matching.cross_entropy, end_weight=settings.end_weight)
    shown = min(settings.images_per_step, len(images["train"]))
    return {
        "train": loss(images["train"], examples_per_step=shown),
        "selection": loss(images["selection"][: settings.selection_images], train=False),
    }


def random_pairs(networks: Zoo, most: int, seed: int) -> Pairs:
    """Random pairs of different networks at the end of their training, no pair twice; all if they are not more."""
    last = networks[networks.records["step"] == networks.records["step"].max()]
    others = max(len(last) - 1, 1)
    drawn = np.random.default_rng(seed).permutation(len(last) * (len(last) - 1))[:most]
    first, second = drawn // others, drawn % others
    return _pairs(last, np.stack([first, second + (second >= first)], 1))


# --- private ------------------------------------------------------------------------------------------------------


def _are_few(settings: AlignmentConfig, rows: Mapping[str, Pairs], cure: str) -> bool:
    """Whether there are too few pairs, which is printed then."""
    fewest = {"train": settings.batch_size, "selection": 1}
    short = {split: found for split, pairs in rows.items() if (found := _count(pairs)) < fewest[split]}
    if short:
        found = ", ".join(f"{count} for {split}" for split, count in short.items())
        progress.console.print(
            f"No matcher and no frame are learned: of pairs of networks there are {found}, fewer than one batch. "
            f"{cure}, or lower alignment.batch_size.",
            soft_wrap=True,
        )
    return bool(short)


def _frame_settings(settings: AlignmentConfig) -> AlignmentConfig:
    epochs = settings.epochs if settings.frame_epochs is None else settings.frame_epochs
    return dataclasses.replace(settings, epochs=epochs)


def _frame_of(matcher: Trained, pairs: Pairs) -> Any:
    """The variables of the frame of the first network, by a trained matcher."""
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], pairs[0])
    return jax.jit(lambda variables, params: matcher.model.as_frame(variables, params)[1])(matcher.variables, first)


def _pairs(networks: Zoo, rows: np.ndarray) -> Pairs:
    """Stacks of the networks of pairs [pairs, 2] of rows."""
    first, second = (jax.tree.map(lambda leaf, at=at: np.asarray(leaf)[at], networks.params) for at in rows.T)
    return first, second


def _count(pairs: Pairs) -> int:
    return len(jax.tree.leaves(pairs)[0])


def _make_framed(trained: Trained, mesh: Mesh | None) -> Callable[[Params], Params]:
    """Stacked params -> the same functions in the learned frame."""
    arch = trained.model.arch

    def one(params: Params) -> Params:
        return symmetry.act(arch, trained.model.apply(trained.variables, params), params)

    return runs.by_rows(jax.vmap(one), mesh)
