"""Draws the packages of the library and what imports what, from the imports of its files."""

import ast
import functools
import html
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "jax_scalegmn"
WIDTH, BOX, ROW = 760, 34, 78
STYLE = (
    "<style>.packages text { font: 14px monospace; text-anchor: middle; fill: currentColor }"
    " .packages rect { fill: var(--pst-color-surface, #f3f4f5); stroke: currentColor; stroke-opacity: .35 }"
    " .packages path { fill: none; stroke: currentColor; stroke-opacity: .3; stroke-width: 1.2 }</style>"
)


def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """For every package of the library, the packages that its files import."""
    found: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package.startswith("_"):
            continue
        found.setdefault(package, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root.name:
                rest = node.module.split(".")[1:]
                found[package] |= {rest[0]} if rest else {alias.name for alias in node.names}
    return {package: (names & found.keys()) - {package} for package, names in found.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The height of every package: one above the highest that it imports, 0 where it imports none."""

    @functools.cache
    def level(package: str) -> int:
        return max((level(other) + 1 for other in graph[package]), default=0)

    return {package: level(package) for package in graph}


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others: those of a package that none of its other imports reaches."""

    @functools.cache
    def reached(package: str) -> frozenset[str]:
        return frozenset(graph[package]).union(*(reached(other) for other in graph[package]))

    return {
        package: {other for other in names if not any(other in reached(between) for between in names)}
        for package, names in graph.items()
    }


def draw(root: Path = ROOT) -> str:
    """The picture as SVG for an HTML page, in the page's own colors."""
    graph = imports(root)
    height, edges = levels(graph), direct(graph)
    rows = [sorted(p for p in graph if height[p] == row) for row in range(max(height.values()) + 1)]
    sizes = {package: 9 * len(package) + 24 for package in graph}
    places: dict[str, tuple[float, float]] = {}
    for row, packages in enumerate(rows):
        # Over the middle of what they import, so that few lines cross.
        packages.sort(key=lambda p: sum(places[o][0] for o in edges[p]) / max(1, len(edges[p])))
        space = (WIDTH - sum(sizes[p] for p in packages)) / (len(packages) + 1)
        x = space
        for package in packages:
            places[package] = x + sizes[package] / 2, (len(rows) - 1 - row) * ROW + BOX
            x += sizes[package] + space
    lines = []
    for package, others in edges.items():
        for other in sorted(others):
            (x0, y0), (x1, y1) = places[package], places[other]
            top, bottom = y0 + BOX / 2, y1 - BOX / 2
            bend = (bottom - top) / 2
            lines.append(
                f'<path d="M{x0:.0f} {top:.0f} C{x0:.0f} {top + bend:.0f} {x1:.0f} {bottom - bend:.0f} '
                f'{x1:.0f} {bottom:.0f}"/>'
            )
    boxes = [
        f'<rect x="{x - sizes[package] / 2:.0f}" y="{y - BOX / 2:.0f}" width="{sizes[package]}" height="{BOX}" rx="5"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{html.escape(package)}</text>'
        for package, (x, y) in places.items()
    ]
    size = f'viewBox="0 0 {WIDTH} {len(rows) * ROW}" width="100%"'
    label = 'role="img" aria-label="The packages, each above those that it imports"'
    return "\n".join([f'<svg class="packages" {size} {label}>', STYLE, *lines, *boxes, "</svg>"])
