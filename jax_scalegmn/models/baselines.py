"""What a ScaleGMN is compared with: encoders of a network's outputs or of its weights' statistics, of equal size."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture, network
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models._layers import MLP
from jax_scalegmn.types import Params

__all__ = ["QueryEncoder", "StatisticsEncoder", "match_size", "num_parameters", "standardization", "statistics"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the statistics


class QueryEncoder(nn.Module):
    """An embedding of a network's function: its outputs at learned inputs, read by mlps.

    Invariant under every symmetry of the function by construction; it knows no more than the queries ask for. Called as
    `models.Encoder` is. The literature calls it probing (Herrmann et al. 2024, arXiv 2403.11998; Kahana et al. 2024,
    arXiv 2410.10811).

    Attributes:
      arch: of the networks that it reads; it must say how to compute them.
      num_queries: inputs that every network is applied to.
      input_shape: of one input, as `network.apply` takes it: (in,), or (height, width, channels). The learned inputs
        start uniform in [-1, 1].
      hidden: width of the hidden layer of every mlp, and of what lies between them.
      latent: entries of the embedding.
      num_layers: mlps in sequence, silu between them.
      dropout: rate on the hidden layer of every mlp during training.
    """

    arch: Architecture
    num_queries: int
    input_shape: tuple[int, ...]
    hidden: int
    latent: int
    num_layers: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network of `arch`; training with dropout needs `rngs={"dropout": key}`.

        Raises:
          ValueError: if the architecture does not say how to compute its function, or the attributes do not fit it.
        """
        _check(self)
        shape = (self.num_queries, *self.input_shape)
        queries = self.param("queries", lambda key: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0))
        x = jax.vmap(lambda query: network.apply(self.arch, params, query))(queries).reshape(-1)
        return _read(self, x, train)


class StatisticsEncoder(nn.Module):
    """An embedding of a network's weights by their `statistics`, read by mlps.

    Invariant under permutations, since every neuron's weights count alike; rescalings and flipped signs change it. It
    computes no function, so that the architecture need not say how. Called as `models.Encoder` is. (Unterthiner et al.
    2020, arXiv 2002.11448.)

    Attributes:
      arch: of the networks that it reads.
      hidden: width of the hidden layer of every mlp, and of what lies between them.
      latent: entries of the embedding.
      num_layers: mlps in sequence, silu between them.
      dropout: rate on the hidden layer of every mlp during training.
      standard: the usual (mean, standard deviation) of every statistic, by which it is standardized: `standardization`.
        None: statistics as they come.
    """

    arch: Architecture
    hidden: int
    latent: int
    num_layers: int = 1
    dropout: float = 0.0
    standard: tuple[tuple[float, float], ...] | None = None

    @nn.compact
    def __call__(self, params: Params, *, train: bool = False) -> Float[Array, " latent"]:
        """The embedding of one network of `arch`; training with dropout needs `rngs={"dropout": key}`.

        Raises:
          ValueError: if the params are of another architecture, or the attributes do not fit it.
        """
        _check_sizes(self, "hidden", "latent", "num_layers")
        _check_standard(self)
        x = statistics(self.arch, params)
        if self.standard is not None:
            mean, std = jnp.asarray(self.standard, x.dtype).T
            x = (x - mean) / std
        return _read(self, x, train)


def statistics(arch: Architecture, params: Params) -> Float[Array, " statistics"]:
    """Mean, variance and quantiles 0, 25, 50, 75 and 100 % of every array's entries, one array behind another.

    (Unterthiner et al. 2020, arXiv 2002.11448.)

    Args:
      arch: of the network; the arrays come in the order of `arch.array_shapes`.
      params: of one network.

    Raises:
      ValueError: if the params are of another architecture.
    """
    architecture.unpack(arch, params)
    parts = []
    for path in arch.array_shapes:
        value: Any = functools.reduce(lambda node, key: node[key], path, params)
        parts += [jnp.stack([value.mean(), value.var()]), jnp.quantile(value, jnp.asarray(QUANTILES, value.dtype))]
    return jnp.concatenate(parts)


def standardization(arch: Architecture, stack: Params) -> tuple[tuple[float, float], ...]:
    """The mean and the standard deviation of every statistic over many networks, for `StatisticsEncoder.standard`.

    A statistic that is the same for all of them gets the deviation 1.

    Args:
      arch: of the networks.
      stack: params whose arrays have a leading axis [networks].
    """
    x = jax.jit(jax.vmap(functools.partial(statistics, arch)))(stack)
    return tuple((float(mean), float(std) or 1.0) for mean, std in zip(x.mean(0), x.std(0), strict=True))


def num_parameters(model: nn.Module, example: Any) -> int:
    """How many numbers a model of networks like `example` learns; nothing is computed."""
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


def match_size(make: Callable[[int], nn.Module], example: Any, target: int) -> int:
    """The width at which a model's number of parameters comes closest to the target; nothing is computed.

    Args:
      make: width -> model; a wider one has more parameters.
      example: one network, or its shapes, that the models can read.
      target: the number of parameters.

    Returns:
      The width, at least 1; the smaller of two that come equally close.

    Raises:
      ValueError: if the target is no positive number, or is out of reach since a wider model has no more parameters.
    """
    if target < 1:
        raise ValueError(f"target is {target}; expected a number of parameters >= 1.")
    count = functools.cache(lambda width: num_parameters(make(width), example))
    low, high = 1, 2
    while count(high) < target:
        if count(high) <= count(low):
            raise ValueError(
                f"The model has {count(low)} parameters at width {low} and {count(high)} at width {high}, so that no "
                f"width leads to {target}. Let make(width) use its width."
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return low if target - count(low) <= count(high) - target else high


# --- private ------------------------------------------------------------------------------------------------------


def _read(model: QueryEncoder | StatisticsEncoder, x: Array, train: bool) -> Array:
    """The embedding of what an encoder has seen of a network, by its mlps."""
    dropout = nn.Dropout(model.dropout, deterministic=not train)
    for index in range(model.num_layers):
        last = index + 1 == model.num_layers
        mlp = MLP(x.shape[0], model.hidden, model.latent if last else model.hidden, name=f"mlp_{index}")
        x = mlp.lower(dropout(mlp.activate(x @ mlp.centered_kernel)))
        if not last:
            x = nn.silu(x)
    return x


def _check_sizes(model: QueryEncoder | StatisticsEncoder, *fields: str) -> None:
    numbers = {field: getattr(model, field) for field in fields}
    if min(numbers.values()) < 1:
        raise ValueError(f"A {type(model).__name__} of {model.arch.name!r} has {numbers}; expected numbers >= 1.")


def _check_standard(model: StatisticsEncoder) -> None:
    count = (2 + len(QUANTILES)) * len(model.arch.array_shapes)
    given = model.standard
    if given is None:
        return
    right = len(given) == count and all(math.isfinite(mean) and math.isfinite(std) and std > 0 for mean, std in given)
    if not right:
        raise ValueError(
            f"standard is {given}; expected {count} pairs (mean, standard deviation > 0) of finite numbers, one for "
            f"each statistic of {model.arch.name!r}. Use baselines.standardization."
        )


def _check(model: QueryEncoder) -> None:
    arch, name = model.arch, model.arch.name
    if not arch.layers:
        raise ValueError(
            f"{name!r} does not say how to compute its function (layers is empty), so that there is nothing to query. "
            "Use models.Encoder, which reads the weights, or a builder: architecture.mlp, siren or cnn."
        )
    _check_sizes(model, "num_queries", "hidden", "latent", "num_layers")
    if min(model.input_shape, default=1) < 1:
        raise ValueError(f"input_shape is {model.input_shape}; expected numbers >= 1.")
    shapes = [jax.ShapeDtypeStruct(arch.shape(parameter), jnp.float32) for parameter in arch.parameters]
    query = jax.ShapeDtypeStruct(model.input_shape, jnp.float32)
    try:
        jax.eval_shape(functools.partial(network.apply, arch), architecture.pack(arch, shapes), query)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"input_shape is {model.input_shape}, which is no input of {name!r} ({error}). Give the shape of one "
            "example as network.apply takes it: (inputs,), or (height, width, channels)."
        ) from error
