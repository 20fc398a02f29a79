"""What the build of the documentation checks besides Sphinx: that every public name has a page, and internal links."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

PACKAGE = "jax_scalegmn"
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src", "source": "src"}


# --- public names ---------------------------------------------------------------------------------------------------


@functools.cache
def public_modules(package: str = PACKAGE) -> list[str]:
    """The package and all modules below it without a leading underscore in their path, the shortest paths last.

    Raises:
      ValueError: If one of them has no `__all__`.
    """
    names = [package, *_below(importlib.import_module(package))]
    for name in names:
        if not hasattr(importlib.import_module(name), "__all__"):
            raise ValueError(f"{name}: expected __all__ with its public names, got none. Add it, or an underscore.")
    return sorted(names, key=lambda name: (-name.count("."), name))


def _below(module: ModuleType) -> Iterator[str]:
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not info.name.startswith("_"):
            name = f"{module.__name__}.{info.name}"
            yield name
            if info.ispkg:
                yield from _below(importlib.import_module(name))


@functools.cache
def home(module: str, name: str, package: str = PACKAGE) -> str:
    """The full name under which a public name is documented: "jax_scalegmn.Axis" at "jax_scalegmn.architecture.Axis".

    Args:
      module: A public module.
      name: One of the names in its `__all__`.
      package: The package whose modules are public.
    """
    value = getattr(importlib.import_module(module), name)
    if inspect.ismodule(value):
        return value.__name__
    public = public_modules(package)
    defining = str(getattr(value, "__module__", ""))
    while "._" in defining:
        defining = defining.rpartition(".")[0]
    for candidate in (defining, *public):
        if candidate in public:
            face = importlib.import_module(candidate)
            if name in face.__all__ and getattr(face, name, None) is value:
                return f"{candidate}.{name}"
    raise ValueError(f"{module}.{name}: expected it in the __all__ of a public module, found it in none.")


def undocumented(documented: set[str], package: str = PACKAGE) -> list[str]:
    """All public names that no page documents.

    Args:
      documented: The full names of all documented objects and modules.
      package: The package whose public modules are asked.

    Returns:
      One line for each, with the module that exports it.
    """
    lacking = []
    for module in public_modules(package):
        if module not in documented:
            lacking.append(f"{module}: no page documents this module")
        for name in importlib.import_module(module).__all__:
            if home(module, name, package) not in documented:
                lacking.append(f"{module}.{name}: no page documents it")
    return lacking


# --- links --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The anchors and the links of one page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.anchors |= {value for value in (attributes.get("id"), attributes.get("name")) if value}
        target = attributes.get(LINKS.get(tag, ""))
        if target:
            self.links.add(target)


def broken_links(root: Path) -> list[str]:
    """All links below a folder of built pages that lead to no file, or to no anchor of one.

    Args:
      root: The folder of the built site.

    Returns:
      One line for each, with the page and the link.
    """
    root = root.resolve()
    # Below _static are files of the theme, some of them templates.
    pages = {
        path: Page(path.read_text())
        for path in sorted(root.rglob("*.html"))
        if path.relative_to(root).parts[0] != "_static"
    }
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{path.relative_to(root)}: {link} leads to no file of the site")
            elif anchor and target in pages and anchor not in pages[target].anchors and anchor != "top":
                broken.append(f"{path.relative_to(root)}: {link} leads to no anchor of that page")
    return broken
