"""Params as nested mappings: to and from Flax's variables, in which statistics stand apart; with arrays replaced."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from jax_scalegmn import architecture
from jax_scalegmn.types import Params

# What a batch normalization stores beside its weights: Flax's collection "batch_stats".
STATISTICS = ("mean", "var")


def merge(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a network with batch normalizations from Flax's variables: statistics stand beside weights.

    {"params": {"BatchNorm_0": {"scale", "bias"}, ...}, "batch_stats": {"BatchNorm_0": {"mean", "var"}, ...}} becomes
    {"BatchNorm_0": {"scale", "bias", "mean", "var"}, ...}. Without "batch_stats" it is variables["params"].

    Raises:
      ValueError: without "params", with a further collection, or if both collections have one path.
    """
    if "params" not in variables or set(variables) - {"params", "batch_stats"}:
        raise ValueError(
            f"variables has the collections {sorted(variables)}; expected 'params' and, with batch normalization, "
            "'batch_stats'. Pass what the module's init returned, and leave other collections out."
        )
    return _merged(variables["params"], variables.get("batch_stats", {}), ())


def split(params: Params) -> dict[str, Any]:
    """Flax's variables of params: the inverse of `merge`.

    What is called "mean" or "var" goes to "batch_stats", which is left out where there is nothing to put.
    """
    weights, statistics = _split(params)
    return {"params": weights} | ({"batch_stats": statistics} if statistics else {})


def replace(params: Params, values: Mapping[tuple[str, ...], Array]) -> dict[str, Any]:
    """The params with other arrays at some paths."""
    replaced = dict(params)
    for (key, *rest), value in values.items():
        replaced[key] = replace(replaced[key], {tuple(rest): value}) if rest else value
    return replaced


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


def _split(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    weights: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for key, node in params.items():
        if isinstance(node, Mapping):
            inner_weights, inner_statistics = _split(node)
            weights |= {key: inner_weights} if inner_weights else {}
            statistics |= {key: inner_statistics} if inner_statistics else {}
        else:
            (statistics if key in STATISTICS else weights)[key] = node
    return weights, statistics
