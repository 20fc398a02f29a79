"""Parts of the report of a run: one self-contained HTML page of tables, charts and pictures."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import jax_scalegmn as sg
from jax_scalegmn.report import Line

__all__ = ["Line", "chart", "image_rows", "scatter", "settings", "write"]


def write(path: Path, title: str, sections: Iterable[str]) -> None:
    """Writes one page of sections that are HTML already."""
    sg.report.document(title, sections).save(path)


def chart(lines: Sequence[Line], *, x: str, y: str, log: bool = False) -> str:
    """A line chart with the values at the pointer; on a logarithmic axis only points above 0 are drawn."""
    kept = [_above_zero(line) if log else line for line in lines]
    return sg.report.line_chart([line for line in kept if len(line.x)], x=x, y=y, log=log)


def image_rows(rows: Mapping[str, Sequence[Any]]) -> str:
    """Rows of pictures, each row under its label.

    Args:
      rows: For every label its pictures: arrays [height, width] or [height, width, channels], values in [0, 1].
    """
    lines = []
    for label, pictures in rows.items():
        cells = "".join(f"<td>{_picture(picture)}</td>" for picture in pictures)
        lines.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def side_by_side(images: Any) -> np.ndarray:
    """Images [n, height, width, ...] in one row, a white line between them."""
    framed = np.clip(np.asarray(images, np.float32), 0, 1)
    framed = np.pad(framed, [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (framed.ndim - 3), constant_values=1.0)
    return np.concatenate(list(framed), 1)


def scatter(
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str = "",
    y: str = "",
    limits: tuple[float, float] | None = None,
    size: int = 420,
) -> str:
    """Points in groups, each with a color; the pointer shows a point's group and values.

    Args:
      groups: The points (x, y) of every label.
      x: The name of the horizontal axis.
      y: The name of the vertical axis.
      limits: The ends of both axes, between which a diagonal is drawn; None for those of the points.
      size: Height and width in pixels.
    """
    points = np.concatenate([np.reshape(group, (-1, 2)) for group in groups.values()]).astype(float)
    low, high = (points.min(0), points.max(0)) if limits is None else (np.full(2, limits[0]), np.full(2, limits[1]))
    places = (np.array([30, 10]), np.array([size - 10, size - 30]))  # left, top; right, bottom

    def place(point: Any) -> np.ndarray:
        share = (np.asarray(point, float) - low) / np.where(high > low, high - low, 1)
        return places[0] + np.array([share[0], 1 - share[1]]) * (places[1] - places[0])

    drawn = []
    if limits is not None:
        (x0, y0), (x1, y1) = place(low), place(high)
        drawn.append(f'<line class="grid" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    for index, (label, group) in enumerate(groups.items()):
        for point in group:
            (left, top), (first, second) = place(point), point
            title = html.escape(f"{label}: {first:.3g}, {second:.3g}")
            drawn.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" style="fill: var(--series-{index % 9})" opacity=".7">'
                f"<title>{title}</title></circle>"
            )
    names = (
        f'<text x="{size / 2:.0f}" y="{size - 8}" text-anchor="middle">{html.escape(x)}</text>'
        f'<text transform="translate(16 {size / 2:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>'
    )
    svg = f'<svg viewBox="0 0 {size} {size}" style="max-width: {size}px">{"".join(drawn)}{names}</svg>'
    return f'<figure class="sg-chart">{svg}</figure>'


def settings(values: Mapping[str, Any]) -> str:
    """Nested settings as text under a heading."""
    return f"<h2>Settings</h2><pre>{html.escape(json.dumps(values, indent=1, ensure_ascii=False))}</pre>"


# --- private ------------------------------------------------------------------------------------------------------


def _above_zero(line: Line) -> Line:
    kept = np.asarray(line.y) > 0
    parts = [None if part is None else np.asarray(part)[kept].tolist() for part in line[1:]]
    return Line(line.label, *parts)


def _picture(image: Any) -> str:
    """A picture as part of the page, every pixel some screen pixels wide."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    height = max(40, np.shape(image)[0])
    style = f"height: {height}px; max-width: none; image-rendering: pixelated"
    return f'<img alt="" style="{style}" src="data:image/png;base64,{data}">'
