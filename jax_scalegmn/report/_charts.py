"""Line charts as HTML: values at the pointer, and a legend that picks one line out where many overlap."""

import html
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
      label: Its name in the legend.
      x: The places, ascending, [points].
      y: The values, [points].
      low: The lower edge of a band around it, [points]; None for no band.
      high: The upper edge.

    >>> from jax_scalegmn import report
    >>> report.Line("loss", [0.0, 0.5, 1.0], [1.0, 2.0, 1.0]).label
    'loss'
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(lines: Sequence[Line], *, x: str, y: str, log: bool = False, height: int = 300) -> str:
    """The HTML of a chart, to be a section of `document`, whose script draws it.

    Args:
      lines: What is drawn; labels differ.
      x: The name of the horizontal axis.
      y: The name of the vertical axis.
      log: Whether values are drawn on a logarithmic axis.
      height: In pixels.

    Raises:
      ValueError: If there is no line, two have one label, or a line is empty, not finite, or its parts differ in
        length; on a logarithmic axis, if a value is not above 0.

    >>> import jax_scalegmn as sg
    >>> chart = sg.report.line_chart([sg.report.Line("naive", [0, 1], [1.0, 2.0])], x="t", y="loss")
    >>> chart.startswith('<figure class="sg-chart" data-chart="')
    True
    """
    labels = [line.label for line in lines]
    if not lines or len(set(labels)) != len(labels):
        raise ValueError(f"lines are labeled {labels}; expected one line or more, each with a label of its own.")
    series = [_checked(line, log) for line in lines]
    spec = {"x": x, "y": y, "log": log, "height": height, "series": series}
    text = html.escape(json.dumps(spec, separators=(",", ":"), allow_nan=False))
    return f'<figure class="sg-chart" data-chart="{text}"></figure>'


# --- private ------------------------------------------------------------------------------------------------------


def _checked(line: Line, log: bool) -> dict[str, object]:
    parts = {"x": line.x, "y": line.y, "low": line.low, "high": line.high}
    values = {name: np.asarray(part, np.float64) for name, part in parts.items() if part is not None}
    shapes = {name: value.shape for name, value in values.items()}
    if values["x"].ndim != 1 or not values["x"].size or len(set(shapes.values())) != 1 or len(values) == 3:
        raise ValueError(
            f"The line {line.label!r} has shapes {shapes}; expected x, y and, for a band, low and high, all "
            "vectors of one length."
        )
    for name, value in values.items():
        if not np.isfinite(value).all() or (log and name == "y" and value.min() <= 0):
            wanted = "finite numbers" + (" above 0 on a logarithmic axis" if log else "")
            raise ValueError(f"{name} of the line {line.label!r} is {value}; expected {wanted}. Leave such points out.")
    return {"label": line.label} | {name: value.tolist() for name, value in values.items()}
