"""Params as nested mappings: to and from Flax's variables, which keep statistics apart; with arrays replaced."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from jax_scalegmn import architecture, stacks
from jax_scalegmn.types import Params

# What a batch normalization stores next to its weights: Flax's collection "batch_stats".
STATISTICS = ("mean", "var")


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Turns Flax's variables of a network with batch normalizations into params: statistics next to weights.

    {"params": {"BatchNorm_0": {"scale", "bias"}, ...}, "batch_stats": {"BatchNorm_0": {"mean", "var"}, ...}} becomes
    {"BatchNorm_0": {"scale", "bias", "mean", "var"}, ...}. Without "batch_stats" it is variables["params"].

    Args:
      variables: What the module's `init` returned.

    Returns:
      The params.

    Raises:
      ValueError: Without "params", with a further collection, or if both collections have one path.

    >>> import jax_scalegmn as sg
    >>> variables = {"params": {"BatchNorm_0": {"scale": 1}}, "batch_stats": {"BatchNorm_0": {"mean": 0}}}
    >>> sg.network.merge_variables(variables)
    {'BatchNorm_0': {'scale': 1, 'mean': 0}}
    """
    if "params" not in variables or set(variables) - {"params", "batch_stats"}:
        raise ValueError(
            f"variables has the collections {sorted(variables)}; expected 'params' and, with batch normalization, "
            "'batch_stats'. Pass what the module's init returned, and leave other collections out."
        )
    return _merged(variables["params"], variables.get("batch_stats", {}), ())


def split(params: Params) -> dict[str, Any]:
    """Turns params into Flax's variables: the inverse of `merge`.

    Arrays with the name "mean" or "var" go to "batch_stats", which is left out where there are none.

    Args:
      params: The network.

    Returns:
      The variables: {"params": ...}, with batch normalizations also {"batch_stats": ...}.

    >>> import jax_scalegmn as sg
    >>> sg.network.split_variables({"BatchNorm_0": {"scale": 1, "mean": 0}})
    {'params': {'BatchNorm_0': {'scale': 1}}, 'batch_stats': {'BatchNorm_0': {'mean': 0}}}
    """
    leaves = architecture.flatten(params)
    weights = {path: leaf for path, leaf in leaves.items() if path[-1] not in STATISTICS}
    statistics = {path: leaf for path, leaf in leaves.items() if path[-1] in STATISTICS}
    variables = {"params": architecture.unflatten(weights)}
    return variables | ({"batch_stats": architecture.unflatten(statistics)} if statistics else {})


@stacks.any_container("params", returns=True)
def replace(params: Params, values: Mapping[tuple[str, ...], Array]) -> dict[str, Any]:
    """Replaces the arrays at some paths.

    Args:
      params: The network; it is not changed.
      values: The new arrays by path.

    Returns:
      The params with the new arrays.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> sg.network.replace_variables(params, {("Dense_0", "bias"): jnp.zeros(3)})["Dense_0"]["bias"].tolist()
    [0.0, 0.0, 0.0]
    """
    return architecture.unflatten({**architecture.flatten(params), **values})


# --- private ------------------------------------------------------------------------------------------------------


def _merged(weights: Any, statistics: Any, path: tuple[str, ...]) -> dict[str, Any]:
    merged = dict(weights)
    for key, node in statistics.items():
        where = (*path, key)
        if key not in merged:
            merged[key] = node
        elif isinstance(node, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _merged(merged[key], node, where)
        else:
            raise ValueError(
                f"params and batch_stats both have {architecture.describe(where)}; expected each path in one. Rename "
                "it in the module."
            )
    return merged
