"""Losses of one network, for `training.make_step`: (variables, row of the data, key) -> (loss, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float

from jax_scalegmn import matching, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import Autoencoder, Editor, Frame, Matcher
from jax_scalegmn.types import Key, LossFn, Metrics, Params

__all__ = [
    "alignment",
    "classification",
    "distillation",
    "editing",
    "inr_reconstruction",
    "regression",
    "teacher_logits",
]

# The number of images that a network classifies at once. Thousands would need gigabytes for their patches.
_IMAGES_AT_ONCE = 250


def inr_reconstruction(
    model: Autoencoder,
    *,
    size: tuple[int, int],
    orbit_weight: float | Array = 0.0,
    max_sweeps: int = 3,
    train: bool = True,
) -> LossFn:
    """Mean squared error between the images that the original and the decoded INR draw (arXiv 2511.12601, section 3).

        mean over pixels and channels of (render(decoded) - render(params))^2 + orbit_weight * orbit distance

    Args:
      model: The autoencoder of INRs, of gray images or of images with several channels.
      size: (height, width) of the images, in pixels.
      orbit_weight: The weight of `matching.orbit_distance` from the decoded network to the original's orbit, in units
        of the squared image values; 0 as published. An array, like that of a trial of a population, counts as
        weighted whatever its value.
      max_sweeps: The number of sweeps of the matching for that term.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, params, key) with the metrics reconstruction and, where it is weighted, orbit_distance.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.autoencoder(arch, features=4, num_layers=1)
    >>> loss_fn = sg.training.losses.inr_reconstruction(model, size=(3, 3))
    >>> variables, params = sg.models.abstract_variables(model), sg.architecture.abstract_params(arch)
    >>> loss, metrics = jax.eval_shape(loss_fn, variables, params, jax.random.key(0))
    >>> loss.shape, list(metrics)
    ((), ['reconstruction'])
    """

    def loss_fn(variables: Any, params: Params, key: Key) -> tuple[Array, Metrics]:
        decoded = model.apply(variables, params, train=train, rngs={"dropout": key})
        gap = network.render(model.arch, decoded, size) - network.render(model.arch, params, size)
        metrics = {"reconstruction": jnp.square(gap).mean()}
        loss = metrics["reconstruction"]
        if isinstance(orbit_weight, jax.Array) or orbit_weight:
            metrics["orbit_distance"] = matching.orbit_distance(model.arch, params, decoded, max_sweeps=max_sweeps)
            loss += orbit_weight * metrics["orbit_distance"]
        return loss, metrics

    return loss_fn


def distillation(
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
      model: The autoencoder of a classifier.
      images: The images that both networks classify, each as `network.apply` takes it.
      temperature: T; published: 0.6.
      images_per_step: The number of images on which every network is compared, drawn anew each time; None for all, as
        published.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, params, key), or of (variables, (params, logits), key) with the originals' own logits on
      all the images, computed before by `teacher_logits`. Its metrics are distillation and agreement, the share of
      the images to which both networks assign the same class.

    Raises:
      ValueError: If images_per_step is not a number from 1 to the number of images.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 3))
    >>> model = sg.autoencoder(arch, features=4, num_layers=1)
    >>> loss_fn = sg.training.losses.distillation(model, jnp.ones((5, 2)))
    >>> variables, params = sg.models.abstract_variables(model), sg.architecture.abstract_params(arch)
    >>> loss, metrics = jax.eval_shape(loss_fn, variables, params, jax.random.key(0))
    >>> sorted(metrics)
    ['agreement', 'distillation']
    """
    _check_drawn("images_per_step", images_per_step, images, "images")

    def loss_fn(variables: Any, row: Params | tuple[Params, Array], key: Key) -> tuple[Array, Metrics]:
        params, known = row if isinstance(row, tuple) else (row, None)
        decoded = model.apply(variables, params, train=train, rngs={"dropout": key})
        shown = images
        if images_per_step is not None:
            rows = _drawn_rows(key, images_per_step, images)
            shown, known = images[rows], None if known is None else known[rows]
        teacher = _logits(model.arch, params, shown) if known is None else known
        student = _logits(model.arch, decoded, shown)
        soft, learned = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
        loss = temperature**2 * (jnp.exp(soft) * (soft - learned)).sum(-1).mean()
        agreement = (teacher.argmax(-1) == student.argmax(-1)).mean(dtype=loss.dtype)
        return loss, {"distillation": loss, "agreement": agreement}

    return loss_fn


@stacks.any_container("stack")
def teacher_logits(
    arch: Architecture, stack: Params, images: Float[Array, " images *image"], *, batch_size: int = 16
) -> Float[Array, "networks images outputs"]:
    """The logits of every network of a stack on all the images, to compute them once for `distillation`.

    Args:
      arch: The networks' architecture.
      stack: The networks, every array with a leading axis [networks].
      images: The images, each as `network.apply` takes it.
      batch_size: The number of networks that are computed at a time.

    Returns:
      The logits [networks, images, outputs].

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 3))
    >>> stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 2))
    >>> sg.training.losses.teacher_logits(arch, stack, jnp.ones((5, 2))).shape
    (2, 5, 3)
    """
    return jax.jit(
        lambda stack, images: jax.lax.map(lambda params: _logits(arch, params, images), stack, batch_size=batch_size)
    )(stack, images)


def alignment(
    model: Matcher | Frame,
    x: Float[Array, " examples *example"],
    *,
    distance: Callable[[Array, Array], Array] = matching.squared_error,
    end_weight: float = 0.3,
    examples_per_step: int | None = None,
    train: bool = True,
) -> LossFn:
    """What is wrong with the function of the network between two that a learned matcher or frame aligns.

        d(f(lerp(goal, moved, t)), (1 - t) f(target) + t f(params))
            + end_weight * [d(f(moved), f(params)) + d(f(goal), f(target))],    t ~ U(0, 1)

    The objective of `matching.search_matching`, without labels, for soft elements. The second term makes them hard: a
    network whose neurons are mixed or shrunken cannot compute what it did. With a Matcher the goal is the target
    itself, with a Frame both networks are moved.

    Args:
      model: The matcher or the frame.
      x: The inputs on which functions are compared, as `network.apply` takes one.
      distance: (outputs, expected outputs) -> a scalar: `matching.squared_error`, or `matching.cross_entropy`.
      end_weight: The weight of the second term.
      examples_per_step: The number of inputs on which every pair is compared, drawn anew each time; None for all.
      train: False for validation: hard elements, t = 1/2, and no second term, which is 0 then.

    Returns:
      A loss of (variables, (params, target), key) with the metrics merged and, in training, ends.

    Raises:
      ValueError: If x does not fit the model's architecture, on a negative weight, or if examples_per_step is not a
        number from 1 to the number of inputs.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.Matcher(arch, sg.models.alignment_encoder(arch, features=4, num_layers=1))
    >>> loss_fn = sg.training.losses.alignment(model, jnp.ones((3, 2)), train=False)
    >>> variables = sg.models.abstract_variables(model)
    >>> params = sg.architecture.abstract_params(arch)
    >>> loss, metrics = jax.eval_shape(loss_fn, variables, (params, params), jax.random.key(0))
    >>> loss.shape, list(metrics)
    ((), ['merged'])
    """
    network.check_examples(model.arch, x)
    if end_weight < 0:
        raise ValueError(f"end_weight is {end_weight}; expected a number >= 0.")
    _check_drawn("examples_per_step", examples_per_step, x, "inputs")

    def loss_fn(variables: Any, row: tuple[Params, Params], key: Key) -> tuple[Array, Metrics]:
        shown = x if examples_per_step is None else x[_drawn_rows(key, examples_per_step, x)]
        last, first = (_logits(model.arch, params, shown) for params in row)
        moved, goal = model.apply(variables, *row, method="brought_together", hard=not train)
        t = jax.random.uniform(key, dtype=first.dtype) if train else jnp.asarray(0.5, first.dtype)
        merged = _logits(model.arch, stacks.lerp(goal, moved, t), shown)
        metrics = {"merged": distance(merged, (1 - t) * first + t * last)}
        if not train:
            return metrics["merged"], metrics
        ends = [distance(_logits(model.arch, params, shown), own) for params, own in ((moved, last), (goal, first))]
        metrics["ends"] = ends[0] + ends[1]
        return metrics["merged"] + end_weight * metrics["ends"], metrics

    return loss_fn


def editing(model: Editor, *, train: bool = True) -> LossFn:
    """Mean squared error between what edited INRs draw and an image, the average of what the editor's networks draw.

        mean over pixels of (mean over i of render(edited_i) - image)^2

    Args:
      model: The editor of INRs; the average is over its `networks`.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, (params, image), key), the image [height, width] or [height, width, channels], with the
      metric unedited, the error of the network that was given.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.Editor(sg.ScaleGMN(arch, features=4, num_layers=1), networks=2)
    >>> loss_fn = sg.training.losses.editing(model)
    >>> variables, params = sg.models.abstract_variables(model), sg.architecture.abstract_params(arch)
    >>> loss, metrics = jax.eval_shape(loss_fn, variables, (params, jnp.ones((3, 3))), jax.random.key(0))
    >>> loss.shape, list(metrics)
    ((), ['unedited'])
    """

    def draw(params: Params, image: Array) -> Array:
        """What an INR draws, in the shape of an image."""
        if not isinstance(model.arch, Architecture):
            raise ValueError(f"The editor is for a {model.arch.name}; expected one for INRs of one architecture.")
        return network.render(model.arch, params, (image.shape[0], image.shape[1])).reshape(image.shape)

    def loss_fn(variables: Any, row: tuple[Params, Array], key: Key) -> tuple[Array, Metrics]:
        params, image = row
        edited = model.apply(variables, params, train=train, rngs={"dropout": key})
        drawn = draw(edited, image) if model.networks is None else jax.vmap(draw, (0, None))(edited, image).mean(0)
        return jnp.square(drawn - image).mean(), {"unedited": jnp.square(draw(params, image) - image).mean()}

    return loss_fn


def classification(model: Any, *, train: bool = True) -> LossFn:
    """Cross-entropy of a label that a model predicts from a network: -log softmax(logits)[label].

    Args:
      model: A model from params or graphs to logits, like an `Encoder` with `latent` classes.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, (params or graph, label), key) with the metric accuracy, 0 or 1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> model = sg.models.baselines.StatisticsEncoder(arch, hidden=4, latent=2)
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), params)
    >>> variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    >>> loss_fn = sg.training.losses.classification(model, train=False)
    >>> loss, _ = loss_fn(variables, (params, jnp.asarray(1)), jax.random.key(0))
    >>> round(float(loss), 4)  # of two classes that are equally likely
    0.6931
    """

    def loss_fn(variables: Any, row: tuple[Any, Array], key: Key) -> tuple[Array, Metrics]:
        logits = _read(model, variables, row[0], key, train)
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, row[1])
        return loss, {"accuracy": (logits.argmax() == row[1]).astype(loss.dtype)}

    return loss_fn


def regression(model: Any, *, train: bool = True) -> LossFn:
    """Squared error of a property that a model predicts from a network, like its test accuracy.

    Args:
      model: A model from params or graphs to one number, like an `Encoder` with latent=1.
      train: False for validation, without dropout.

    Returns:
      A loss of (variables, (params or graph, property), key), in the property's units squared, with the metric
      absolute_error in its units.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> model = sg.models.baselines.StatisticsEncoder(arch, hidden=4, latent=1)
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), params)
    >>> variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    >>> loss_fn = sg.training.losses.regression(model, train=False)
    >>> loss, metrics = loss_fn(variables, (params, jnp.asarray(0.5)), jax.random.key(0))
    >>> float(loss), float(metrics["absolute_error"])
    (0.25, 0.5)
    """

    def loss_fn(variables: Any, row: tuple[Any, Array], key: Key) -> tuple[Array, Metrics]:
        gap = _read(model, variables, row[0], key, train)[0] - row[1]
        return jnp.square(gap), {"absolute_error": jnp.abs(gap)}

    return loss_fn


# --- private ------------------------------------------------------------------------------------------------------


def _check_drawn(name: str, number: int | None, given: Array, what: str) -> None:
    if number is not None and not 1 <= number <= len(given):
        raise ValueError(f"{name} is {number}; expected 1 to {len(given)}, the {what} given.")


def _drawn_rows(key: Key, number: int, given: Array) -> Array:
    """Random rows of what is given, with replacement, apart from other draws of the same key."""
    return jax.random.randint(jax.random.fold_in(key, 1), (number,), 0, len(given))


def _logits(arch: Architecture, params: Params, images: Array) -> Array:
    """[images, outputs], some hundred images at a time."""

    def logits(x: Array) -> Array:
        # By patches, since a zoo's kernels are all different and the loss runs inside a compiled loop.
        return network.apply(arch, params, x, convolve=network.convolve_by_patches)

    if len(images) <= _IMAGES_AT_ONCE:
        return jax.vmap(logits)(images)
    return jax.lax.map(logits, images, batch_size=_IMAGES_AT_ONCE)


def _read(model: Any, variables: Any, subject: Any, key: Key, train: bool) -> Array:
    method = "read" if isinstance(subject, jraph.GraphsTuple) else None
    read: Array = model.apply(variables, subject, train=train, rngs={"dropout": key}, method=method)
    return read
