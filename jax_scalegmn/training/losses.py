"""Losses of one network each, for `training.make_step`: (variables, row of the data, key) -> (loss, metrics)."""

from typing import Any

import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float

from jax_scalegmn import matching, network
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import Autoencoder
from jax_scalegmn.types import Key, LossFn, Metrics, Params

__all__ = ["autoencoder_loss", "classification_loss", "distillation_loss", "regression_loss", "teacher_logits"]

# Images that a network classifies at once. Thousands would take gigabytes for their patches, and be slower.
AT_ONCE = 250


def autoencoder_loss(
    model: Autoencoder, *, size: tuple[int, int], orbit_weight: float = 0.0, max_sweeps: int = 3, train: bool = True
) -> LossFn:
    """Mean squared error between the images that the original and the decoded INR draw (arXiv 2511.12601, section 3).

    Args:
      model: the autoencoder.
      size: (height, width) of the images.
      orbit_weight: weight of `matching.orbit_distance` from the decoded network to the original's orbit, in units of
        the squared image values; 0 as published.
      max_sweeps: of the matching for that term.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, params, key) with the metrics reconstruction and, where it is weighted, orbit_distance.
    """

    def loss_fn(variables: Any, params: Params, key: Key) -> tuple[Array, Metrics]:
        decoded = model.apply(variables, params, train=train, rngs={"dropout": key})
        gap = network.render(model.arch, decoded, size) - network.render(model.arch, params, size)
        metrics = {"reconstruction": jnp.square(gap).mean()}
        loss = metrics["reconstruction"]
        if orbit_weight:
            metrics["orbit_distance"] = matching.orbit_distance(model.arch, params, decoded, max_sweeps=max_sweeps)
            loss += orbit_weight * metrics["orbit_distance"]
        return loss, metrics

    return loss_fn


def distillation_loss(
    model: Autoencoder,
    images: Float[Array, " images *image"],
    *,
    temperature: float = 0.6,
    images_per_step: int | None = None,
    train: bool = True,
) -> LossFn:
    """T^2 KL(teacher || student) between the logits of the original and of the decoded network on images.

    The softmax has temperature T, the mean is over images (arXiv 2511.12601, section 3; Hinton et al. 2015,
    arXiv 1503.02531).

    Args:
      model: the autoencoder of a classifier.
      images: what both networks classify, as `network.apply` takes one.
      temperature: T; published: 0.6.
      images_per_step: how many of them every network is asked for, drawn anew each time; None for all, as published.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, params, key), or of (variables, (params, logits), key) with the originals' own logits on
      all the images, of `teacher_logits`, which need not be computed again then. Its metrics are distillation and
      agreement, the share of the images to which both give the same class.

    Raises:
      ValueError: if images_per_step is no number of the images.
    """
    if images_per_step is not None and not 1 <= images_per_step <= len(images):
        raise ValueError(f"images_per_step is {images_per_step}; expected 1 to {len(images)}, the images given.")

    def loss_fn(variables: Any, row: Params | tuple[Params, Array], key: Key) -> tuple[Array, Metrics]:
        params, known = row if isinstance(row, tuple) else (row, None)
        decoded = model.apply(variables, params, train=train, rngs={"dropout": key})
        shown = images
        if images_per_step is not None:
            image_key = jax.random.fold_in(key, 1)
            rows = jax.random.randint(image_key, (images_per_step,), 0, len(images))
            shown, known = images[rows], None if known is None else known[rows]
        teacher = _logits(model.arch, params, shown) if known is None else known
        student = _logits(model.arch, decoded, shown)
        soft, learned = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
        distillation = temperature**2 * (jnp.exp(soft) * (soft - learned)).sum(-1).mean()
        agreement = (teacher.argmax(-1) == student.argmax(-1)).mean(dtype=distillation.dtype)
        return distillation, {"distillation": distillation, "agreement": agreement}

    return loss_fn


def teacher_logits(
    arch: Architecture, stack: Params, images: Float[Array, " images *image"], *, batch_size: int = 16
) -> Float[Array, "networks images outputs"]:
    """The logits of every network of a stack on all the images, computed once, `batch_size` networks at a time."""
    return jax.jit(
        lambda stack, images: jax.lax.map(lambda one: _logits(arch, one, images), stack, batch_size=batch_size)
    )(stack, images)


def classification_loss(model: Any, *, train: bool = True) -> LossFn:
    """Cross-entropy of a label that a model predicts from a network, with the accuracy as metric.

    Args:
      model: of params, or of graphs, to logits, like an `Encoder` with `latent` classes.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, (params or graph, label), key).
    """

    def loss_fn(variables: Any, row: tuple[Any, Array], key: Key) -> tuple[Array, Metrics]:
        logits = _read(model, variables, row[0], key, train)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, row[1])
        return loss, {"accuracy": (logits.argmax() == row[1]).astype(loss.dtype)}

    return loss_fn


def regression_loss(model: Any, *, train: bool = True) -> LossFn:
    """Squared error of a property that a model predicts from a network, like its test accuracy.

    Args:
      model: of params, or of graphs, to one number, like an `Encoder` with latent=1.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, (params or graph, property), key), with the metric absolute_error.
    """

    def loss_fn(variables: Any, row: tuple[Any, Array], key: Key) -> tuple[Array, Metrics]:
        gap = _read(model, variables, row[0], key, train)[0] - row[1]
        return jnp.square(gap), {"absolute_error": jnp.abs(gap)}

    return loss_fn


# --- private ------------------------------------------------------------------------------------------------------


def _logits(arch: Architecture, params: Params, images: Array) -> Array:
    def one(x: Array) -> Array:
        # By patches, since a zoo's kernels are all different and the loss stands inside a compiled loop.
        return network.apply_with(arch, params, x, network.ByPatches())

    return jax.vmap(one)(images) if len(images) <= AT_ONCE else jax.lax.map(one, images, batch_size=AT_ONCE)


def _read(model: Any, variables: Any, subject: Any, key: Key, train: bool) -> Array:
    method = "read" if isinstance(subject, jraph.GraphsTuple) else None
    read: Array = model.apply(variables, subject, train=train, rngs={"dropout": key}, method=method)
    return read
