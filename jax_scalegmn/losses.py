"""Losses of one network each, for `train.make_step`: (variables, row of the data, key) -> (loss, metrics)."""

from typing import Any

import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float

from jax_scalegmn import matching, network
from jax_scalegmn.models import Autoencoder
from jax_scalegmn.types import Key, LossFn, Metrics, Params


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
    model: Autoencoder, images: Float[Array, " images *image"], *, temperature: float = 0.6, train: bool = True
) -> LossFn:
    """T^2 KL(teacher || student) between the logits of the original and of the decoded network on images.

    The softmax has temperature T, the mean is over images (arXiv 2511.12601, section 3; Hinton et al. 2015,
    arXiv 1503.02531).

    Args:
      model: the autoencoder of a classifier.
      images: what both networks classify, as `network.apply` takes one.
      temperature: T; published: 0.6.
      train: False for validation, without dropout.
    """

    def loss_fn(variables: Any, params: Params, key: Key) -> tuple[Array, Metrics]:
        decoded = model.apply(variables, params, train=train, rngs={"dropout": key})
        teacher, student = (
            jax.nn.log_softmax(jax.vmap(lambda x, p=p: network.apply(model.arch, p, x))(images) / temperature)
            for p in (params, decoded)
        )
        distillation = temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1).mean()
        return distillation, {"distillation": distillation}

    return loss_fn


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


def _read(model: Any, variables: Any, subject: Any, key: Key, train: bool) -> Array:
    method = "read" if isinstance(subject, jraph.GraphsTuple) else None
    read: Array = model.apply(variables, subject, train=train, rngs={"dropout": key}, method=method)
    return read
