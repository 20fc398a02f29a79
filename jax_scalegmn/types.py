"""The types that all packages share, and the axis names of shape annotations.

Axis names: ``networks`` of a stack or zoo, ``points`` on a path or pixels of an image, ``examples`` of a data set,
``n`` neurons of one layer, ``nodes`` and ``edges`` of a graph, ``features`` of a node or edge, ``latent`` entries of
an embedding.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

__all__ = ["Interpolate", "Key", "LossFn", "Metrics", "Params"]

#: A network's parameters: nested dicts of arrays, as Flax has them, like {"Dense_0": {"kernel": [in, out], ...}}, or
#: another container that `stacks.to_dict` reads: FrozenDict, a list, an NNX module or state, an Equinox module.
Params: TypeAlias = Any

#: A typed JAX key, as `jax.random.key` makes it.
Key: TypeAlias = jax.Array

#: Named numbers of a training step or of an evaluation.
Metrics: TypeAlias = dict[str, jax.Array]

#: A loss of one row of the data: (variables, row, key) -> (scalar loss, metrics).
LossFn: TypeAlias = Callable[[Any, Any, Key], tuple[jax.Array, Metrics]]

#: A path between two networks: (a, b, t) -> the network at t, which is a at t = 0 and b at t = 1.
Interpolate: TypeAlias = Callable[[Any, Any, Any], Any]
