"""Names of the types that every floor shares, and the axis words of shape annotations.

Axis words: ``networks`` of a batch or zoo, ``points`` positions on a path or pixels, ``n`` neurons of
one layer, ``nodes`` and ``edges`` of a graph, ``features`` of a node or edge, ``latent`` entries of an embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

__all__ = ["Interpolate", "Key", "LossFn", "Metrics", "Params"]

# Nested mappings of arrays in Flax's own shape: {"Dense_0": {"kernel": [in, out], "bias": [out]}, ...}.
Params: TypeAlias = Mapping[str, Any]

# A typed JAX key, as `jax.random.key` makes it.
Key: TypeAlias = jax.Array

# Named numbers of a training step or an evaluation.
Metrics: TypeAlias = dict[str, jax.Array]

# (variables, one row of the data, key) -> (scalar loss, metrics)
LossFn: TypeAlias = Callable[[Any, Any, Key], tuple[jax.Array, Metrics]]

# (a, b, t) -> the point between them.
Interpolate: TypeAlias = Callable[[Any, Any, Any], Any]
