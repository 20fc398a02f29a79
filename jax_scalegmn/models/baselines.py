"""Encoders to compare a ScaleGMN with: of a network's outputs, and of its weights' statistics."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture, network, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models._layers import MLP
from jax_scalegmn.types import Params

__all__ = ["QueryEncoder", "StatisticsEncoder", "standardization", "statistics"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the statistics


class QueryEncoder(nn.Module):
    """An embedding of a network's function: its outputs at learned inputs, read by mlps.

        z = mlp([f(x_1), ..., f(x_n)]), the x_i learned

    It is invariant under every symmetry of the function by construction, and knows no more than the queries ask for.
    Called as `models.Encoder` is. The literature calls it probing (Herrmann et al. 2024, arXiv 2403.11998; Kahana et
    al. 2024, arXiv 2410.10811).

    Attributes:
      arch: The architecture of the networks that it reads; it must say how to compute them.
      num_queries: The number of inputs that every network is applied to.
      input_shape: The shape of one input, as `network.apply` takes it: (in,), or (height, width, channels). The
        learned inputs start uniform in [-1, 1].
      hidden: The width of the hidden layer of every mlp, and of the vectors between them.
      latent: The number of entries of the embedding.
      num_layers: The number of mlps in sequence, silu between them.
      dropout: The rate on the hidden layer of every mlp during training.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.baselines.QueryEncoder(arch, num_queries=5, input_shape=(2,), hidden=8, latent=3)
    >>> params = sg.architecture.abstract_params(arch)
    >>> z, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> z.shape, variables["params"]["queries"].shape
    ((3,), (5, 2))
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
          ValueError: If the architecture does not say how to compute its function, or the attributes do not fit it.
        """
        _check(self)
        shape = (self.num_queries, *self.input_shape)
        queries = self.param("queries", lambda key: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0))
        x = jax.vmap(lambda query: network.apply(self.arch, params, query))(queries).reshape(-1)
        return _read(self, x, train)


class StatisticsEncoder(nn.Module):
    """An embedding of a network's weights by their `statistics`, read by mlps (Unterthiner et al. 2020,
    arXiv 2002.11448).

    It is invariant under permutations, since every neuron's weights count alike; rescalings and flipped signs change
    it. It computes no function, so that the architecture need not say how. Called as `models.Encoder` is.

    Attributes:
      arch: The architecture of the networks that it reads.
      hidden: The width of the hidden layer of every mlp, and of the vectors between them.
      latent: The number of entries of the embedding.
      num_layers: The number of mlps in sequence, silu between them.
      dropout: The rate on the hidden layer of every mlp during training.
      standard: The usual (mean, standard deviation) of every statistic, by which it is standardized:
        `standardization`. None: statistics unchanged.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.baselines.StatisticsEncoder(arch, hidden=8, latent=3)
    >>> params = sg.architecture.abstract_params(arch)
    >>> z, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params)
    >>> z.shape
    (3,)
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
          ValueError: If the params are of another architecture, or the attributes do not fit it.
        """
        _check_sizes(self, "hidden", "latent", "num_layers")
        _check_standard(self)
        x = statistics(self.arch, params)
        if self.standard is not None:
            mean, std = jnp.asarray(self.standard, x.dtype).T
            x = (x - mean) / std
        return _read(self, x, train)


@stacks.any_container("params")
def statistics(arch: Architecture, params: Params) -> Float[Array, " statistics"]:
    """Mean, variance and quantiles 0, 25, 50, 75 and 100 % of the entries of every array, array after array.

    (Unterthiner et al. 2020, arXiv 2002.11448.)

    Args:
      arch: The network's architecture; its arrays are taken in the order of `arch.array_shapes`.
      params: One network's params.

    Returns:
      [7 * arrays], in the units of the weights, the variances in their square.

    Raises:
      ValueError: If the params are of another architecture.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((1, 5, 1))
    >>> first = {"kernel": jnp.arange(5.0)[None], "bias": jnp.zeros(5)}
    >>> params = sg.network.init(arch, jax.random.key(0)) | {"Dense_0": first}
    >>> sg.models.baselines.statistics(arch, params)[:7].tolist()
    [2.0, 2.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    """
    architecture.unpack(arch, params)
    leaves = architecture.flatten(params)
    parts = []
    for path in arch.array_shapes:
        value = jnp.asarray(leaves[path])
        parts += [jnp.stack([value.mean(), value.var()]), jnp.quantile(value, jnp.asarray(QUANTILES, value.dtype))]
    return jnp.concatenate(parts)


@stacks.any_container("stack")
def standardization(arch: Architecture, stack: Params) -> tuple[tuple[float, float], ...]:
    """The mean and the standard deviation of every statistic over many networks, for `StatisticsEncoder.standard`.

    A statistic that is the same for all of them gets the deviation 1.

    Args:
      arch: The networks' architecture.
      stack: The networks, every array with a leading axis [networks].

    Returns:
      One pair of Python numbers for each of `statistics`, so that a model can hold them.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 3))
    >>> len(sg.models.baselines.standardization(arch, stack))  # 7 statistics of 4 arrays
    28
    """
    x = jax.jit(jax.vmap(functools.partial(statistics, arch)))(stack)
    return tuple((float(mean), float(std) or 1.0) for mean, std in zip(x.mean(0), x.std(0), strict=True))


# --- private ------------------------------------------------------------------------------------------------------


def _read(model: QueryEncoder | StatisticsEncoder, x: Array, train: bool) -> Array:
    """The embedding of the numbers that an encoder has taken from a network, by its mlps."""
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
    query = jax.ShapeDtypeStruct(model.input_shape, jnp.float32)
    try:
        jax.eval_shape(functools.partial(network.apply, arch), architecture.abstract_params(arch), query)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"input_shape is {model.input_shape}, which is no input of {name!r} ({error}). Give the shape of one "
            "example as network.apply takes it: (inputs,), or (height, width, channels)."
        ) from error
