"""Writes what the pages include before Sphinx reads them: the result tables, the picture of the packages, and the
page "Same function?"."""

from pathlib import Path
from typing import Any

import make_same_function
import picture
import tables
from sphinx.application import Sphinx


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
    """Fits two networks 2-16-16-1 that draw the moon, and writes their page as a frame."""
    path.write_text(make_same_function.page().iframe())
