"""One self-contained HTML page of a run: tables and pictures, nothing to fetch."""

import base64
import html
import io
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

INDEPENDENT = "independent fits"

PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } pre { background: #f5f5f5; padding: 1rem; overflow: auto } .note { color: #555 }
</style>
<h1>$title</h1>
$body
</html>
""")


def write(path: Path, results: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
    """Writes the page."""
    arch = results["config"]["zoo"]
    title = f"Merging INRs {'-'.join(map(str, arch['widths']))} by a ScaleGMN autoencoder"
    write_page(path, title, _sections(results, pictures))


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Writes one page of sections that are HTML already."""
    path.write_text(PAGE.substitute(title=html.escape(title), body="\n".join(sections)))


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first the head, as an HTML table."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def html_image(figure: Figure) -> str:
    """A figure as part of the page itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def html_settings(values: Mapping[str, Any]) -> str:
    """Nested settings as indented text under a heading."""
    return f"<h2>Settings</h2><pre>{html.escape(_yaml_like(values))}</pre>"


def table(results: Mapping[str, Any]) -> rich.table.Table:
    """The methods' means on independent fits, for a terminal."""
    shown = rich.table.Table("method", title="Two independent fits of one unseen image")
    for name in ("midpoint", "barrier", "end-point gap", "read"):
        shown.add_column(name, justify="right")
    for method in results["merging"][INDEPENDENT].values():
        means = [f"{method[key]['mean']:.4f}" for key in ("midpoint", "barrier", "end_point_gap")]
        shown.add_row(method["label"], *means, f"{method['recognized']:.1%}")
    return shown


# --- private ------------------------------------------------------------------------------------------------------


def _sections(results: Mapping[str, Any], pictures: Mapping[str, Any]) -> Iterable[str]:
    reconstruction, orbit, zoo = results["reconstruction"], results["orbit"], results["zoo"]
    recognized = reconstruction["recognized"]
    counts = ", ".join(f"{one['networks']} networks of {one['images']} images for {name}" for name, one in zoo.items())
    yield (
        f"<p>{counts}; no image serves twice. The autoencoder has {results['model']['parameters']:,} parameters.</p>"
        f"<p><b>Reconstruction</b> of unseen networks: mean squared error {reconstruction['mse']:.4f}, "
        f"{reconstruction['share_of_variance']:.1%} of the variance of the images "
        f"({reconstruction['image_variance']:.4f}); drawing the mean image would cost "
        f"{reconstruction['mean_image_mse']:.4f}. A classifier trained on the training images reads "
        f"{recognized['images']:.1%} of the unseen images, {recognized['original']:.1%} as drawn by their INRs and "
        f"{recognized['decoded']:.1%} as drawn by the decoded networks.</p>"
        f"<p><b>Orbits</b>: the embeddings of one orbit spread {orbit['ratio']:.1e} times as far as those of different "
        "networks.</p>"
    )
    yield "<h2>Two independent fits of one unseen image</h2>"
    yield html_table(_method_rows(results))
    yield (
        "<p class=note>Mean squared error against the true image, with 95 % bootstrap intervals over pairs. Midpoint: "
        "at t = 1/2. Barrier: maximum above the chord between the end points. End-point gap: between what an end point "
        "draws and what its original network draws. Read: digits recognized by the classifier at t = 1/2.</p>"
    )
    yield "<h2>A network and a transformed, perturbed copy</h2><p>Mean squared error at t = 1/2.</p>"
    yield html_table(_orbit_rows(results))
    yield "<h2>Along the path</h2>" + html_image(_curves(results))
    yield "<h2>Images along the path</h2>" + html_image(_filmstrips(results, pictures["paths"]))
    yield "<h2>Reconstructions</h2>" + html_image(_reconstructions(pictures))
    yield "<h2>Embeddings</h2>" + html_image(_embeddings(pictures))
    yield "<h2>Training</h2>" + html_image(_training(results))
    yield html_settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


def _method_rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["method", "midpoint", "barrier", "end-point gap", "read"]]
    for method in results["merging"][INDEPENDENT].values():
        cells = [_with_interval(method[key]) for key in ("midpoint", "barrier", "end_point_gap")]
        rows.append([method["label"], *cells, f"{method['recognized']:.1%}"])
    return rows


def _orbit_rows(results: Mapping[str, Any]) -> list[list[str]]:
    kinds = [kind for kind in results["merging"] if kind != INDEPENDENT]
    rows = [["method", *kinds]]
    for name, method in results["merging"][INDEPENDENT].items():
        rows.append([method["label"], *[f"{results['merging'][kind][name]['midpoint']['mean']:.4f}" for kind in kinds]])
    return rows


def _with_interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def _curves(results: Mapping[str, Any]) -> Figure:
    kinds = list(results["merging"])
    shown = [INDEPENDENT, *[kind for kind in kinds if kind.startswith("PD")][:: max(1, len(kinds) // 3 - 2)]][:3]
    figure = Figure(figsize=(15, 4.6))
    for axes, kind in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        for method in results["merging"][kind].values():
            (line,) = axes.plot(method["ts"], method["path"], label=method["label"])
            axes.fill_between(method["ts"], method["path_low"], method["path_high"], alpha=0.2, color=line.get_color())
        axes.set(title=kind, xlabel="t", yscale="log")
    figure.axes[0].set_ylabel("mean squared error")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0))
    return figure


def _filmstrips(results: Mapping[str, Any], paths: Mapping[str, Any]) -> Figure:
    pairs = len(next(iter(paths.values())))
    figure = Figure(figsize=(5 * pairs, 0.62 * len(paths)))
    grid = figure.subplots(len(paths), pairs, squeeze=False)
    for row, (name, strips) in zip(grid, paths.items(), strict=True):
        for axes, strip in zip(row, strips, strict=True):
            axes.imshow(_side_by_side(strip), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        label = results["merging"][INDEPENDENT][name]["label"]
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _reconstructions(pictures: Mapping[str, Any]) -> Figure:
    rows = {"image": "truth", "its INR": "original", "decoded INR": "decoded"}
    figure = Figure(figsize=(11, 3))
    for axes, (label, name) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        axes.imshow(_side_by_side(pictures[name]), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def _embeddings(pictures: Mapping[str, Any]) -> Figure:
    """The embeddings' two principal components: the scoring networks by label, on top members of a few orbits.

    A linear map, so that what looks like one point is one.
    """
    orbits = pictures["orbits"]
    components = PCA(2).fit(pictures["latent"])
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    dots = axes.scatter(
        *components.transform(pictures["latent"]).T, c=pictures["labels"], cmap="tab10", s=12, vmin=-0.5, vmax=9.5
    )
    labels = np.repeat(pictures["orbit_labels"], orbits.shape[1])
    members = components.transform(orbits.reshape(-1, orbits.shape[-1]))
    axes.scatter(*members.T, c=labels, cmap="tab10", s=60, marker="x", vmin=-0.5, vmax=9.5)
    figure.colorbar(dots, label="label", ticks=range(10))
    axes.set(title=f"crosses: {len(orbits)} orbits of {orbits.shape[1]} members each", xticks=[], yticks=[])
    return figure


def _training(results: Mapping[str, Any]) -> Figure:
    history = results["training"]
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots()
    for name in sorted({name for epoch in history for name in epoch} - {"step", "seconds", "train_grad_norm"}):
        style = "-" if name.startswith("selection") else "--"
        axes.plot([epoch["step"] for epoch in history], [epoch[name] for epoch in history], style, label=name)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    return figure


def _side_by_side(images: Any) -> np.ndarray:
    """Images [n, height, width] in one row, a white line between them."""
    framed = np.pad(np.clip(np.asarray(images), 0, 1), [(0, 0), (0, 0), (0, 1)], constant_values=1.0)
    return np.concatenate(list(framed), 1)


def _yaml_like(value: Any, indent: str = "") -> str:
    if isinstance(value, Mapping):
        lines = [
            f"{indent}{key}:\n{_yaml_like(inner, indent + '  ')}"
            if isinstance(inner, Mapping)
            else f"{indent}{key}: {inner}"
            for key, inner in value.items()
        ]
        return "\n".join(lines)
    return f"{indent}{value}"
