"""Two networks of one architecture as the JSON values from which the page draws them."""

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jax_scalegmn import architecture, landscape, matching, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Dense, Parameter
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params

# Both networks in float32 and base64 are 11 bytes a parameter, so that this many stay well below the page's limit.
MOST_STORED = 25_000
# Of a larger network, what the heat maps and everything else may take together.
MOST_CHARACTERS = 400_000
IMAGE_SIZE = (32, 32)
MOST_PIXELS = 128 * 128
TITLE = "Same function?"


def page_data(
    arch: Architecture,
    params: Params,
    target: Params,
    *,
    element: Element | None = None,
    loss: Callable[[Any], Array] | None = None,
    image: Array | np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    num_points: int = 25,
    names: tuple[str, str] = ("params", "target"),
    title: str = TITLE,
) -> dict[str, Any]:
    """What the page knows; arguments and errors are those of `same_function`."""
    reason = why_not_drawn(arch)
    _check_options(arch, reason, image, size, num_points, names)
    given, goal = _unpacked(arch, params, "params"), _unpacked(arch, target, "target")
    element = matching.weight_matching(arch, params, target).element if element is None else element
    aligned_params = symmetry.act(arch, element, params)
    aligned = [np.asarray(value, np.float64) for value in architecture.unpack(arch, aligned_params)]
    stored = arch.num_parameters <= MOST_STORED
    data = {
        "title": title,
        "arch": arch.name,
        "names": {"params": names[0], "target": names[1]},
        "parameters": arch.num_parameters,
        "layers": [
            {"name": layer.name, "width": layer.width, "scaling": layer.scaling.value} for layer in arch.neuron_layers
        ],
        "element": _element_as_json(element),
        "distance": {"given": _distance(given, goal), "aligned": _distance(aligned, goal)},
        "shares": shares(arch, aligned, goal),
        "notDrawn": reason,
        "image": None if reason else _image(arch, image, size),
        "curve": None if loss is None else _curve(loss, params, aligned_params, target, num_points),
        "points": num_points,
        "stored": stored,
    }
    arrays = _stored_arrays(arch, given, goal) if stored else _averaged_arrays(arch, data, given, goal, aligned)
    return data | {"arrays": arrays, "left": len(arch.parameters) - len(arrays)}


def why_not_drawn(arch: Architecture) -> str | None:
    """Why the page cannot compute the network's image, as a sentence; None if it can."""
    inputs, outputs = arch.neuron_layers[0].width, arch.neuron_layers[-1].width
    others = sorted({type(layer).__name__ for layer in arch.layers if not isinstance(layer, Dense)})
    names = {layer.activation.name for layer in arch.layers if isinstance(layer, Dense) and layer.activation}
    unknown = sorted(names - set(architecture.SCALING_OF_ACTIVATION))
    if not arch.layers:
        return "its architecture says what the parameters are, but not how the network computes."
    if others:
        return f"it draws networks of dense layers, and this one has {', '.join(others)} layers."
    if inputs != 2 or outputs not in (1, 3):
        return f"an image maps 2 coordinates to 1 or 3 channels, and this network maps {inputs} inputs to {outputs}."
    if any(parameter.start for parameter in arch.parameters):
        return "some of its arrays are described in blocks."
    if unknown:
        return f"it does not know the activation {', '.join(unknown)}."
    if arch.num_parameters > MOST_STORED:
        return f"its {arch.num_parameters:,} parameters are too many to be stored in a page."
    return None


def shares(arch: Architecture, values: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Every hidden neuron's share of the squared distance between two networks.

    A weight between two hidden neurons counts half for each, so that the shares of all hidden neurons, and those of the
    weights without a hidden neuron, add up to 1.
    """
    hidden = {layer.name: np.zeros(layer.width) for layer in arch.hidden}
    total = 0.0
    for parameter, value, wanted in zip(arch.parameters, values, target, strict=True):
        gaps = np.square(value - wanted)
        total += gaps.sum()
        named = [(i, axis.neurons) for i, axis in enumerate(parameter.axes) if isinstance(axis, Axis)]
        axes = [(i, neurons) for i, neurons in named if neurons in hidden]
        for i, neurons in axes:
            along = gaps.sum(tuple(other for other in range(gaps.ndim) if other != i))
            hidden[neurons] += along.reshape(-1, len(hidden[neurons])).sum(0) / len(axes)
    return {name: np.round(parts / (total or 1), 6).tolist() for name, parts in hidden.items()}


# --- private ------------------------------------------------------------------------------------------------------


def _check_options(
    arch: Architecture, reason: str | None, image: Any, size: Any, num_points: int, names: tuple[str, str]
) -> None:
    if len(set(names)) != 2:
        raise ValueError(f"names are {names}; expected two different words, one for params and one for target.")
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; a path has at least its 2 end points.")
    if reason and not (image is None and size is None):
        raise ValueError(
            f"image and size are for networks that draw an image; {arch.name!r} cannot be drawn: {reason} "
            "Pass loss, a function of the params, for the barrier curve."
        )


def _unpacked(arch: Architecture, params: Params, name: str) -> list[np.ndarray]:
    try:
        architecture.check_params(arch, params, name=name)
    except ValueError as error:
        raise ValueError(
            f"{error} Both networks of a page have the one architecture {arch.name!r}: for another, write a page of "
            "its own."
        ) from error
    return [np.asarray(value, np.float64) for value in architecture.unpack(arch, params)]


def _distance(values: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> float:
    """|target - values|^2 / |target|^2."""
    gap = sum(float(np.square(value - wanted).sum()) for value, wanted in zip(values, target, strict=True))
    return gap / (sum(float(np.square(wanted).sum()) for wanted in target) or 1)


def _element_as_json(element: Element) -> dict[str, dict[str, list[int | float]]]:
    # Signs and ones as integers, which take fewer characters; float32 values survive Python's shortest form exactly.
    def numbers(values: Any) -> list[int | float]:
        return [int(value) if value in (1, -1) else value for value in np.asarray(values, np.float64).tolist()]

    return {
        "permutation": {name: np.asarray(order).tolist() for name, order in element.permutation.items()},
        "scale": {name: numbers(scale) for name, scale in element.scale.items()},
    }


def _image(arch: Architecture, image: Any, size: tuple[int, int] | None) -> dict[str, Any]:
    """How the page computes the image, and the true one if there is any."""
    truth = None if image is None else _truth(arch, image)
    if truth is not None and size is not None and tuple(size) != truth.shape[:2]:
        raise ValueError(
            f"size is {tuple(size)}, the image's {truth.shape[:2]}; expected one of the two. Leave out size."
        )
    height, width = truth.shape[:2] if truth is not None else size or IMAGE_SIZE
    if min(height, width) < 1 or height * width * arch.neuron_layers[-1].width > MOST_PIXELS:
        raise ValueError(
            f"The image's size is {(height, width)}; expected 1 to {MOST_PIXELS:,} values, which a "
            "browser draws at once. Pass a smaller image, or a size like (32, 32)."
        )
    index = {parameter.path: number for number, parameter in enumerate(arch.parameters)}
    return {
        "size": [int(height), int(width)],
        "channels": arch.neuron_layers[-1].width,
        "truth": None if truth is None else _as_base64(truth),
        "layers": [
            {
                "kernel": index[layer.name, "kernel"],
                "bias": index.get((layer.name, "bias")),
                "activation": layer.activation and dataclasses.asdict(layer.activation),
                "offset": layer.offset,
            }
            for layer in arch.layers
            if isinstance(layer, Dense)
        ],
    }


def _truth(arch: Architecture, image: Any) -> np.ndarray:
    channels = arch.neuron_layers[-1].width
    truth = np.asarray(image, np.float32)
    truth = truth[..., None] if truth.ndim == 2 else truth
    if truth.ndim != 3 or truth.shape[-1] != channels or not truth.size or not np.isfinite(truth).all():
        raise ValueError(
            f"image has shape {np.shape(image)}; {arch.name!r} draws [height, width, {channels}], of finite numbers. "
            "Pass the picture that both networks were fitted to, or none."
        )
    return truth


def _curve(
    loss: Callable[[Any], Array], params: Params, aligned: Params, target: Params, num_points: int
) -> dict[str, Any]:
    label = getattr(loss, "__name__", type(loss).__name__)
    # One point at a time: all at once would be num_points times the memory of the loss.
    paths = [landscape.path(loss, start, target, num_points=num_points, batch_size=1) for start in (params, aligned)]
    naive, matched = (np.asarray(path.metrics, np.float64) for path in paths)
    if not (np.isfinite(naive).all() and np.isfinite(matched).all()):
        raise ValueError(
            f"loss ({label}) is NaN or infinite on the path between params and target; expected finite numbers. Bound "
            "it, like a cross-entropy of clipped probabilities."
        )
    ts = np.linspace(0, 1, num_points)
    return {"label": label, "ts": ts.tolist(), "naive": naive.tolist(), "aligned": matched.tolist()}


def _stored_arrays(arch: Architecture, params: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> list[Any]:
    return [
        _head(parameter, value, wanted)
        | {"shape": value.shape, "params": _as_base64(value), "target": _as_base64(wanted)}
        for parameter, value, wanted in zip(arch.parameters, params, target, strict=True)
    ]


def _averaged_arrays(
    arch: Architecture,
    data: Mapping[str, Any],
    params: Sequence[np.ndarray],
    target: Sequence[np.ndarray],
    aligned: Sequence[np.ndarray],
) -> list[Any]:
    """Heat maps of means over blocks of weights, as fine as fit into the page."""
    room = MOST_CHARACTERS - len(json.dumps(data))
    count = len(arch.parameters)
    arrays: list[Any] = []
    # At worst 4 x 4 cells of as many arrays as there is room for.
    for side, most in ((48, count), (32, count), (24, count), (16, count), (8, count), (4, max(room, 0) // 420)):
        arrays = []
        for parameter, *values in list(zip(arch.parameters, params, target, aligned, strict=True))[:most]:
            head = _head(parameter, *values[:2])
            maps = [_block_means(parameter, value, side) for value in values]
            levels = [_levels(table, max(float(np.abs(maps).max()), 1e-30)) for table in maps]
            head |= {"shape": values[0].shape, "rows": maps[0].shape[0], "columns": maps[0].shape[1]}
            arrays.append(head | dict(zip(("params", "target", "aligned"), levels, strict=True)))
        if len(json.dumps(arrays)) <= room:
            return arrays
    if not arrays:
        raise ValueError(
            f"{arch.name!r} has {sum(layer.width for layer in arch.hidden):,} hidden neurons; a page of 500 kB holds "
            "some 15,000. landscape.barrier and matching.similarity have its numbers."
        )
    return arrays


def _head(parameter: Parameter, value: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    axes = [
        axis
        if isinstance(axis, int)
        else {"layer": axis.neurons, "power": axis.power, "repeat": axis.repeat, "unsigned": axis.unsigned}
        for axis in parameter.axes
    ]
    label = "/".join(parameter.path) + (f" from {list(parameter.start)}" if parameter.start else "")
    # The target's, since positive scales may have made params' as large as can be; the largest would leave others pale.
    sizes = np.abs(wanted if wanted.any() else value)
    return {
        "label": label,
        "module": "/".join(parameter.path[:-1] or parameter.path),
        "axes": axes,
        "range": float(np.quantile(sizes, 0.99)) if sizes.size else 0.0,
    }


def _block_means(parameter: Parameter, value: np.ndarray, side: int) -> np.ndarray:
    """A table of at most side x side: means over spatial axes and over blocks of neurons."""
    spatial = tuple(i for i, axis in enumerate(parameter.axes) if isinstance(axis, int))
    table = value.mean(spatial) if spatial else value
    table = table.reshape(-1, table.shape[-1]) if table.ndim > 1 else table.reshape(1, -1)
    for axis in (0, 1):
        edges = np.linspace(0, table.shape[axis], min(side, table.shape[axis]), endpoint=False).astype(int)
        sizes = np.diff([*edges, table.shape[axis]])
        table = np.add.reduceat(table, edges, axis) / (sizes[:, None] if axis == 0 else sizes)
    return table


def _levels(table: np.ndarray, most: float) -> str:
    return base64.b64encode(np.round(127 * table / most).astype(np.int8).tobytes()).decode()


def _as_base64(values: Float[np.ndarray, "..."]) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
