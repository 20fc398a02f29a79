"""Parallel coordinates as HTML: one vertical axis for each number, one line for each row of a table."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Literal

_HEIGHT, _TOP, _BOTTOM, _SIDE = 320, 34, 22, 70
_LABELS = 6  # the most values that an axis names each


def parallel_coordinates(
    axes: Mapping[str, Sequence[float | int | str]],
    *,
    labels: Sequence[str],
    log: Sequence[str] = (),
    best: Literal["minimize", "maximize"] = "minimize",
    width: int = 1000,
) -> str:
    """The HTML of a figure with one vertical axis for each column and one line for each row, for a `document`.

    Lines are colored by the rank of their value on the last axis; the pointer shows a line's label and values.

    Args:
      axes: Name -> the values of all rows, numbers or texts; texts are put at equal distances in their order. The
        last one holds numbers.
      labels: The name of every row.
      log: The names of the axes that are logarithmic.
      best: Whether small or large values of the last axis get the first color.
      width: In pixels.

    Returns:
      The figure.

    Raises:
      ValueError: If there is no axis or no row, lengths differ, a number is not finite, or one on a logarithmic axis is
        not above 0.

    >>> import jax_scalegmn as sg
    >>> axes = {"learning rate": [1e-3, 1e-2], "canonical": ["symmetrized", "absolute"], "loss": [0.2, 0.1]}
    >>> figure = sg.report.parallel_coordinates(axes, labels=["trial 0", "trial 1"], log=["learning rate"])
    >>> figure.count("<polyline")
    2
    """
    _check(axes, labels, log)
    lefts = [_SIDE + index * (width - 2 * _SIDE) / max(1, len(axes) - 1) for index in range(len(axes))]
    scales = [_scale(values, name in log) for name, values in axes.items()]
    last = [float(value) for value in list(axes.values())[-1]]
    order = sorted(range(len(labels)), key=lambda row: last[row], reverse=best == "maximize")
    drawn = []
    for rank, row in reversed(list(enumerate(order))):  # the best are drawn last, on top
        share = rank / max(1, len(order) - 1)
        corners = " ".join(f"{left:.1f},{heights[row]:.1f}" for left, (heights, _) in zip(lefts, scales, strict=True))
        values = ", ".join(f"{name} {_text(values[row])}" for name, values in axes.items())
        style = f"stroke: color-mix(in oklab, var(--aligned) {100 * (1 - share):.0f}%, var(--naive))"
        title = html.escape(f"{labels[row]}: {values}")
        drawn.append(f'<polyline class="curve" style="{style}" points="{corners}"><title>{title}</title></polyline>')
    drawn += [_axis(name, left, ticks) for name, left, (_, ticks) in zip(axes, lefts, scales, strict=True)]
    return f'<figure class="sg-chart sg-parallel"><svg viewBox="0 0 {width} {_HEIGHT}">{"".join(drawn)}</svg></figure>'


# --- private ------------------------------------------------------------------------------------------------------


def _check(axes: Mapping[str, Sequence[float | int | str]], labels: Sequence[str], log: Sequence[str]) -> None:
    lengths = {name: len(values) for name, values in axes.items()}
    if not axes or not len(labels) or set(lengths.values()) != {len(labels)}:
        raise ValueError(
            f"axes have the lengths {lengths} and there are {len(labels)} labels; expected one length >= 1."
        )
    for name, values in axes.items():
        numbers = [value for value in values if not isinstance(value, str)]
        if not all(math.isfinite(value) and (name not in log or value > 0) for value in numbers):
            wanted = "finite numbers above 0" if name in log else "finite numbers"
            raise ValueError(f"The axis {name!r} has {numbers}; expected {wanted}. Leave such rows out.")
    if any(isinstance(value, str) for value in list(axes.values())[-1]):
        raise ValueError(f"The last axis {list(axes)[-1]!r} has texts; expected numbers, by which lines are colored.")


def _scale(values: Sequence[float | int | str], log: bool) -> tuple[list[float], dict[str, float]]:
    """The height in pixels of every value, and the labels of the axis with theirs."""
    low, high = float(_TOP), float(_HEIGHT - _BOTTOM)
    if any(isinstance(value, str) for value in values):
        names = sorted({_text(value) for value in values})
        places = {name: high - (high - low) * index / max(1, len(names) - 1) for index, name in enumerate(names)}
        return [places[_text(value)] for value in values], places
    numbers = [math.log(float(value)) if log else float(value) for value in values]
    first, span = min(numbers), max(numbers) - min(numbers) or 1.0
    heights = [high - (high - low) * (number - first) / span for number in numbers]
    shown = set(heights) if len(set(heights)) <= _LABELS else {min(heights), max(heights)}
    return heights, {_text(value): height for value, height in zip(values, heights, strict=True) if height in shown}


def _axis(name: str, left: float, ticks: Mapping[str, float]) -> str:
    texts = [
        f'<text x="{left:.1f}" y="14" text-anchor="middle">{html.escape(name)}</text>',
        f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
    ]
    for label, height in ticks.items():
        halo = "paint-order: stroke; stroke: var(--paper); stroke-width: 4px"
        texts.append(f'<text x="{left + 8:.1f}" y="{height + 4:.1f}" style="{halo}">{html.escape(label)}</text>')
    return "".join(texts)


def _text(value: float | int | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
