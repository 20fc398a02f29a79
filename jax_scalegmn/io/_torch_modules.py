"""PyTorch's modules: their tensors by kind, whatever parametrization stores the weight, and tensors that are one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

COUNTERS = ("num_batches_tracked", "n_averaged")
KINDS = ("weight", "bias", "running_mean", "running_var")
PARTS = ("weight_g", "weight_v")  # of weight normalization
SPECTRAL = ("weight_orig", "weight_u", "weight_v")  # of spectral normalization: the weight, and its singular vectors
_PARAMETRIZED = {
    "weight.original0": "weight_g",
    "weight.original1": "weight_v",
    "weight.original": "weight_orig",
    "weight.0._u": "weight_u",
    "weight.0._v": "weight_v",
}
_REMOVE = "Call {call} on the module, and save it again."
_CAUSES = {
    r"weight_u|weight\.\d+\._[uv]": "is of spectral normalization, whose weight and two vectors are not all there. "
    + _REMOVE.format(call="torch.nn.utils.remove_spectral_norm or parametrize.remove_parametrizations"),
    r"\w+_mask": "is the mask of a pruned tensor. " + _REMOVE.format(call="torch.nn.utils.prune.remove"),
    r"weight_orig|\w+\.original\d*|weight\.\d+\..*": "is of a parametrization that is not weight normalization. "
    + _REMOVE.format(call="torch.nn.utils.parametrize.remove_parametrizations"),
    r"_packed_params.*|zero_point": "is of a quantized module. Save the network before its quantization.",
}


def split(key: str) -> tuple[str, str]:
    """The module of a tensor, and the kind of the tensor: one of `KINDS` or `PARTS`, or the rest of its name."""
    module, found, rest = key.rpartition("parametrizations.")
    if found:
        return module.rstrip("."), _PARAMETRIZED.get(rest, rest)
    module, _, kind = key.rpartition(".")
    return module, kind


def cause(state_dict: Mapping[str, Any]) -> str | None:
    """Why the tensors are not those of plain modules: the first name that tells, and what to do; None if none does."""
    for pattern, reason in _CAUSES.items():
        for key in state_dict:
            if re.fullmatch(pattern, split(key)[1]):
                return f"state_dict[{key!r}] {reason}"
    return None


def grouped(state_dict: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The names of the tensors by module and kind, in their order, without counters."""
    modules: dict[str, dict[str, str]] = {}
    for key in state_dict:
        module, kind = split(key)
        if kind not in COUNTERS:
            modules.setdefault(module, {})[kind] = key
    return modules


def stored_in(keys: Mapping[str, str]) -> tuple[str, ...]:
    """The kinds of tensors in which a module stores its weight: `PARTS`, `SPECTRAL`, or the weight itself."""
    return next((kinds for kinds in (SPECTRAL, PARTS) if keys.keys() >= set(kinds)), ("weight",))


def shapes(state_dict: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors by kind, with the weight in place of what it is stored in."""
    got = {kind: np.shape(state_dict[key]) for kind, key in keys.items()}
    whole = {PARTS: "weight_v", SPECTRAL: "weight_orig"}.get(stored_in(keys))
    if whole is not None:
        weight = got[whole]
        got = {kind: shape for kind, shape in got.items() if kind not in stored_in(keys)} | {"weight": weight}
    return got


def weight_of(size: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Weight normalization's weight g v / |v|, with |v| over the axes along which g has one entry."""
    wide = np.result_type(direction.dtype, np.float32)
    v = direction.astype(wide)
    norm = np.sqrt(np.sum(v**2, _axes(size, direction), keepdims=True))
    if (norm == 0).any():
        raise ValueError("a direction v of weight normalization is 0, so g v / |v| is not defined. Train it again.")
    return v * (size.astype(wide).reshape(norm.shape) / norm)


def parts_of(weight: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight normalization's g = |v| and v of a weight; a row of zeros has v = 1 and g = 0. g is shaped like `size`."""
    norm = np.sqrt(np.sum(weight.astype(np.result_type(weight, np.float32)) ** 2, _axes(size, weight), keepdims=True))
    return norm.reshape(size.shape), np.where(norm == 0, 1, weight)


def divided(original: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Spectral normalization's weight W / (u^T W v) in evaluation mode, where u and v stay as they are.

    W is [out, ...] and counts as a matrix [out, rest] (Miyato et al. 2018, arXiv 1802.05957, equation 8).
    """
    wide = np.result_type(original.dtype, np.float32)
    size = u.astype(wide) @ original.astype(wide).reshape(len(original), -1) @ v.astype(wide)
    if size == 0 or not np.isfinite(size):
        raise ValueError(f"spectral normalization divides by u W v = {size}; expected another number. Train it again.")
    return original.astype(wide) / size


def spectral_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, u and v of which `divided` makes a weight: its largest singular vectors, u divided by the singular value.

    A merged weight has another norm than 1. PyTorch in evaluation mode computes it by these; training begins with u and
    v of length 1 again, and divides it by its norm.
    """
    wide = weight.astype(np.result_type(weight.dtype, np.float32))
    left, sizes, right = np.linalg.svd(wide.reshape(len(wide), -1), full_matrices=False)
    if sizes[0] == 0:
        raise ValueError("a weight of zeros has no spectral normalization; expected another number in it.")
    return wide, left[:, 0] / sizes[0], right[0]


def ties(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Pairs of names whose arrays are one in memory, and whether the second is the transpose of the first.

    Raises:
      ValueError: If two arrays overlap in another way.
    """
    spans = []
    for key, value in state_dict.items():
        array = np.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.floating) and array.size:
            low, high = np.lib.array_utils.byte_bounds(array)
            spans.append((low, high, key, array))
    spans.sort(key=lambda span: span[:2])
    for index, (start, high, key, array) in enumerate(spans):
        for low, _, other, second in spans[index + 1 :]:
            if low >= high:
                break
            if not np.shares_memory(array, second):
                continue
            if low == start and array.shape == second.shape and array.strides == second.strides:
                yield key, other, False
            elif low == start and array.shape == second.shape[::-1] and array.strides == second.strides[::-1]:
                yield key, other, True
            else:
                raise ValueError(
                    f"state_dict[{key!r}] and state_dict[{other!r}] overlap in memory without being one tensor or its "
                    "transpose, so that neither can change alone. Copy them, and save the network again."
                )


def tied(state_dict: Mapping[str, Any], groups: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """The tensors, with those of each group, which are one in a file, as views of the first one's array.

    Raises:
      ValueError: If two of a group are neither equal nor each other's transpose.
    """
    views = dict(state_dict)
    for first, *others in groups:
        for other in others:
            same, array = np.asarray(views[first]), np.asarray(views[other])
            candidates = [view for view in (same, same.T) if view.shape == array.shape and np.array_equal(view, array)]
            if not candidates:
                raise ValueError(
                    f"{first!r} and {other!r} share memory in the file without being one tensor or its transpose, so "
                    "that neither can change alone. Copy them (.clone()), and save the network again."
                )
            views[other] = candidates[0]
    return views


# --- private ------------------------------------------------------------------------------------------------------


def _axes(size: np.ndarray, direction: np.ndarray) -> tuple[int, ...]:
    lengths = size.shape if size.ndim == direction.ndim else (1,) * direction.ndim
    if size.size != np.prod(lengths) or any(
        n not in (1, full) for n, full in zip(lengths, direction.shape, strict=True)
    ):
        raise ValueError(
            f"weight normalization has g {size.shape} for v {direction.shape}; expected one size for all, or for each "
            "entry of an axis."
        )
    return tuple(axis for axis, n in enumerate(lengths) if n == 1)
