"""The learned matcher and the learned frame of the INR experiment: their options, training, and rows in its tables."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments import autoencoders, evaluation, inr_zoo, progress, runs
from experiments.autoencoders import Trained
from experiments.evaluation import Method
from experiments.moves import MoveConfig, moved
from jax_scalegmn import models, symmetry, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.training import losses
from jax_scalegmn.types import LossFn, Params
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(autoencoders.TrainConfig):
    """The learned matcher and the learned frame, and their training on pairs of fits of one image."""

    batch_size: int = 64
    """The number of pairs in a batch."""
    epochs: int = 14
    """The number of passes over all pairs of fits of one training image; 0 trains none and leaves out their rows."""
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
    moves: MoveConfig = dataclasses.field(default_factory=MoveConfig)


MUON = AlignmentConfig(
    epochs=6, learning_rate=7e-3, optimizer="muon", moves=MoveConfig(turn=6.0, shift=0.06, stretch=0.06)
)
"""Fewer passes, with Muon, over networks that draw moved images; chosen on digits."""

KINDS = {"matcher": models.Matcher, "frame": models.Frame}


def fit(
    config: runs.RunConfig,
    settings: AlignmentConfig,
    zoos: Mapping[str, Zoo],
    x: Float[Array, "examples inputs"],
    interruption: progress.Interruption,
) -> dict[str, Trained]:
    """Trains a matcher and a frame on what merged networks compute at x, or continues with them.

    Empty where nothing is to be trained, or where training or selection has no two fits of one image.
    """
    if settings.epochs == 0:
        return {}
    rows = {split: pairs(zoos[split]) for split in ("train", "selection")}
    fewest = {"train": settings.batch_size, "selection": 1}
    short = {split: found for split, several in rows.items() if (found := _count(several)) < fewest[split]}
    if short:
        found = ", ".join(f"{count} for {split}" for split, count in short.items())
        progress.console.print(
            f"No matcher and no frame are learned: of pairs of fits of one image there are {found}, fewer than one "
            "batch. Raise zoo.train_fits or zoo.train_images, or lower alignment.batch_size.",
            soft_wrap=True,
        )
        return {}
    return {name: _fit(config, settings, name, zoos["train"], rows, x, interruption) for name in KINDS}


def subject(
    settings: AlignmentConfig, name: str, arch: Architecture, scales: tuple[float, ...], x: Array
) -> tuple[Any, Callable[..., LossFn], str | None]:
    """The model of a name of `KINDS`, its loss, and the method by which it reads one network."""
    model = KINDS[name](
        arch,
        models.alignment_encoder(arch, settings.features, num_layers=settings.num_layers),
        outputs=settings.outputs,
        scales=scales,
        num_iterations=settings.num_iterations,
    )
    loss = functools.partial(losses.alignment, model, x, end_weight=settings.end_weight)
    return model, loss, "embed" if name == "matcher" else None


def pairs(networks: Zoo) -> tuple[Params, Params]:
    """All pairs of fits of one image, as two stacks; none where records do not say a network's image."""
    found = [pair for rows in inr_zoo.rows_by_image(networks) for pair in itertools.combinations(rows, 2)]
    sides = np.array(found, int).reshape(-1, 2)
    first, second = (jax.tree.map(lambda leaf, at=at: np.asarray(leaf)[at], networks.params) for at in sides.T)
    return first, second


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


# --- private ------------------------------------------------------------------------------------------------------


def _count(several: Any) -> int:
    return len(jax.tree.leaves(several)[0])


def _fit(
    config: runs.RunConfig,
    settings: AlignmentConfig,
    name: str,
    networks: Zoo,
    rows: Mapping[str, tuple[Params, Params]],
    x: Array,
    interruption: progress.Interruption,
) -> Trained:
    model, loss, method = subject(settings, name, networks.arch, zoo.scales(networks), x)
    return autoencoders.fit(
        config,
        settings,
        model,
        {"train": moved(settings.moves, networks.arch, loss()), "selection": loss(train=False)},
        rows,
        interruption,
        note=lambda metrics: f"midpoint {metrics['selection_merged']:.4f}",
        title=f"Learned {name}",
        folder=f"alignment/{name}",
        method=method,
    )


def _make_framed(trained: Trained, mesh: Mesh | None) -> Callable[[Params], Params]:
    """Stacked params -> the same functions in the learned frame."""
    arch = trained.model.arch

    def one(params: Params) -> Params:
        return symmetry.act(arch, trained.model.apply(trained.variables, params), params)

    return runs.by_rows(jax.vmap(one), mesh)
