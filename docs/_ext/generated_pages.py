"""Writes what the pages include before Sphinx reads them: the result tables, the picture of the packages, and the
page "Same function?"."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import picture
import tables
from sphinx.application import Sphinx

import jax_scalegmn as sg

SIZE = (24, 24)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(app: Sphinx) -> None:
    """Writes all generated files into docs/_generated."""
    tables.write(tables.Results())
    (tables.GENERATED / "packages.svg").write_text(picture.draw())
    frame = tables.GENERATED / "same_function.html"
    if app.builder.format == "html" or not frame.is_file():
        write_same_function(frame)


def write_same_function(path: Path) -> None:
    """Fits two networks 2-16-16-1 to one image, each from its own initial weights, and writes their page as a frame."""
    arch = sg.siren((2, 16, 16, 1))
    image = rings()
    fits = sg.zoo.fit_images(arch, image[None], np.zeros(1, int), image_index=np.zeros(2, int), num_steps=600)
    a, b = (jax.tree.map(lambda leaf, index=index: leaf[index], fits.params) for index in range(2))
    path.write_text(sg.report.same_function(arch, b, a, image=image, names=("network B", "network A")).iframe())


def rings() -> np.ndarray:
    """A gray image in [0, 1]: a disk, and a ring around it that is open on one side."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in SIZE), indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    disk = 1 / (1 + np.exp(30 * (radius - 0.25)))
    ring = np.exp(-(((radius - 0.65) / 0.12) ** 2)) * (1 - np.exp(-((angle / 0.5) ** 2)))
    return np.clip(disk + ring, 0, 1).astype(np.float32)
