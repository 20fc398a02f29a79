"""Pages of one HTML file that fetches nothing: the "Same function?" page, and documents in its style."""

import dataclasses
import html
import json
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jax_scalegmn import io, stacks
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.report import _assets, _networks
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of one HTML file; the last expression of a notebook cell, it shows itself.

    Attributes:
      html: The whole file.

    >>> import jax_scalegmn as sg
    >>> sg.report.Page("<p>hello</p>").iframe().startswith('<iframe srcdoc="&lt;p&gt;hello&lt;/p&gt;"')
    True
    """

    html: str

    def save(self, path: str | Path) -> Path:
        """Writes the file, completely or not at all, and returns its path. It replaces a file that exists."""
        path = Path(path)
        with io.atomic_path(path, overwrite=True) as scratch:
            scratch.write_text(self.html, encoding="utf-8")
        return path

    def iframe(self, *, height: int = 1150) -> str:
        """The page as a frame for another page, which carries the whole of it; `height` in pixels is where it begins.

        A page of the same origin lets it grow to the height of its content, and hands it its own light or dark theme.
        """
        style = f"width: 100%; height: {height}px; border: 0"
        return f'<iframe srcdoc="{html.escape(self.html)}" title="{_networks.TITLE}" style="{style}"></iframe>'

    def _repr_html_(self) -> str:
        return self.iframe()


@stacks.any_container("params", "target", calls=("loss",))
def same_function(
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
    title: str = _networks.TITLE,
) -> Page:
    """Writes a page on which a reader moves one network through its symmetries, aligns it with another and merges them.

    It shows the weights of both as heat maps; buttons for the moves that the architecture's group has; every neuron's
    partner and its share of the remaining squared distance; and what lies between the networks at
    (1 - t) params + t target, naive and aligned: the loss with its barrier (Frankle et al. 2020, arXiv 1912.05671) and,
    of networks that map (column, row) to 1 or 3 channels through dense layers, the image.

    Args:
      arch: The networks' architecture.
      params: The network that the page moves.
      target: The network that it is aligned with.
      element: What aligns them; None for that of `matching.weight_matching`.
      loss: The loss of params, as in `landscape.barrier`, computed here for both curves. None for the loss that the
        page itself can compute of an image: the mean squared difference from `image`, or without one from the two
        networks' images blended at t; of other networks there are then no curves.
      image: The true image, [height, width] or [height, width, channels], of networks that draw one.
      size: Height and width of the image that is drawn; None for that of `image`, or else (32, 32).
      num_points: Points of each curve, at least 2.
      names: What the page calls params and target.
      title: The page's heading.

    Returns:
      The page, below 500 kB. Of a network of more than 25,000 parameters, or one that it cannot draw, it says what is
      missing.

    Raises:
      ValueError: If a network or the element does not fit the architecture or is not finite, the image or its size
        does not fit, or the loss is not finite.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> a, b = (sg.network.init(arch, jax.random.key(seed)) for seed in (0, 1))
    >>> page = sg.report.same_function(arch, a, b, element=sg.symmetry.identity(arch))
    >>> page.html.startswith("<!doctype html>"), len(page.html) < 500_000
    (True, True)
    """
    options: dict[str, Any] = {"element": element, "loss": loss, "image": image, "size": size}
    data = _networks.page_data(arch, params, target, num_points=num_points, names=names, title=title, **options)
    # "<" would end the script element that holds the data, whatever a network's name says.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body = f'<main id="same-function"></main>\n<script type="application/json" id="networks">{values}</script>'
    start = (
        'const root = document.getElementById("same-function");\n'
        'root.page = sameFunction(root, JSON.parse(document.getElementById("networks").textContent));\nfitFrame();\n'
    )
    return Page(_whole(title, body, _assets.same_function_style(), _assets.same_function_script() + start))


def document(title: str, sections: Iterable[str]) -> Page:
    """Puts sections of HTML on one page in the style of `same_function`, with the script that `line_chart` needs.

    Args:
      title: The page's heading, as text.
      sections: HTML each; tables, figures, `<p class="note">` and `line_chart` are styled.

    >>> import jax_scalegmn as sg
    >>> page = sg.report.document("A run & its numbers", ["<p>Fine.</p>"])
    >>> "<h1>A run &amp; its numbers</h1>" in page.html
    True
    """
    body = "\n".join([f"<main>\n<h1>{html.escape(title)}</h1>", *sections, "</main>"])
    draw = 'document.querySelectorAll("[data-chart]").forEach((f) => lineChart(f, JSON.parse(f.dataset.chart)));\n'
    return Page(_whole(title, body, _assets.read("_style.css"), _assets.read("_chart.js") + draw))


@stacks.any_container("params", "target")
def widget(arch: Architecture, params: Params, target: Params, **options: Any) -> Any:
    """The page of `same_function` as a notebook widget, whose trait `t` is the slider's place, to be read and set.

    Args:
      arch: The networks' architecture.
      params: The network that the page moves.
      target: The network that it is aligned with.
      options: Those of `same_function`.

    Returns:
      An anywidget.AnyWidget; the last expression of a cell, it shows itself.

    Raises:
      ImportError: If anywidget is not installed.
      ValueError: As `same_function`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> a, b = (sg.network.init(arch, jax.random.key(seed)) for seed in (0, 1))
    >>> sg.report.widget(arch, a, b, element=sg.symmetry.identity(arch)).t
    0.5
    """
    try:
        from jax_scalegmn.report import _widget
    except ImportError as error:
        raise ImportError(
            f"report.widget needs anywidget, which cannot be imported ({error}); expected it to be installed. Run "
            'pip install "jax-scalegmn[notebook]", or use report.same_function, which needs no more than a browser.'
        ) from error
    return _widget.SameFunction(networks=_networks.page_data(arch, params, target, **options))


# --- private ------------------------------------------------------------------------------------------------------


def _whole(title: str, body: str, style: str, code: str) -> str:
    template = string.Template(_assets.read("_page.html"))
    return template.substitute(title=html.escape(title), body=body, style=style, script=code)
