"""Checks, after the build, every link, picture, script and frame of the built pages that leads into the site.

Sphinx itself reports cross-references that do not resolve. This finds what it does not read: raw HTML, links to files,
and anchors. Links to other sites are not fetched.
"""

from pathlib import Path
from typing import Any

from checks import broken_links
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


def check(app: Sphinx, exception: Exception | None) -> None:
    """Fails the build with all broken links."""
    if exception is None and app.builder.format == "html":
        broken = broken_links(Path(app.outdir))
        if broken:
            raise ExtensionError("Links that lead nowhere:\n" + "\n".join(broken))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
