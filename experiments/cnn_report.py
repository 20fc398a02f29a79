"""The report of the CNN experiment: what of its results becomes tables, charts and pictures."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments import report, tables
from experiments.tables import Table


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """A table of all methods for every activation."""
    return [_table(activation, result) for activation, result in results["activations"].items()]


def sections(results: Mapping[str, Any], pictures: Mapping[str, Any]) -> Iterable[str]:
    """The sections of the page."""
    for activation, result in results["activations"].items():
        yield f"<h2>{activation}</h2>" + _introduction(result)
        yield tables.page(_table(activation, result))
        for kind, title in {"plain": "as it is", "repaired": "with REPAIR"}.items():
            yield f"<h3>Accuracy along the path, {title}</h3>" + _paths(result, kind)
        yield "<h3>Training</h3>" + _training(result["training"])
        points = list(zip(pictures[activation]["recorded"], pictures[activation]["decoded"], strict=True))
        names = {"x": "accuracy of the original", "y": "of the decoded"}
        yield report.scatter({"network": points}, limits=(0.0, 1.0), **names)
    yield (
        "<p class=note>Pairs of the best scoring networks, with 95 % bootstrap intervals over pairs. Accuracy in % and "
        "loss in nats at t = 1/2, on images that were used for nothing else. Barrier: the maximum of the loss above "
        "the chord between the end points. REPAIR: with the end points' statistics of activations on training images. "
        "End-point gap: accuracy in % that the path's end points lost against their originals.</p>"
    )
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds")})


# --- private ------------------------------------------------------------------------------------------------------


def _table(activation: str, result: Mapping[str, Any]) -> Table:
    """Accuracies in % at t = 1/2, losses and barriers in nats, without and with REPAIR; gaps of the end points in %."""
    head = ("method", "accuracy", "REPAIR", "loss", "REPAIR", "barrier", "REPAIR", "end-point gap")
    rows = [["end points", f"{100 * result['end_points']:.1f}", *[""] * 6]]
    for method in result["merging"].values():
        kinds = [method[kind] for kind in ("plain", "repaired")]
        cells = [method["label"]]
        cells += [tables.with_interval(kind["accuracy"], 1, 100) for kind in kinds]
        cells += [f"{kind['loss']['mean']:.3f}" for kind in kinds]
        cells += [tables.with_interval(kind["barrier"], 3) for kind in kinds]
        rows.append([*cells, f"{100 * method['plain']['end_point_gap']['mean']:.1f}"])
    return Table(f"Pairs of {activation} CNNs: accuracy %, loss", head, rows)


def _introduction(result: Mapping[str, Any]) -> str:
    zoo, lost, reached = result["zoo"], result["distillation"], result["zoo"]["scoring_accuracy"]
    return (
        f"<p>{zoo['networks']} networks at {zoo['checkpoints']} checkpoints in all ({zoo['left_out']} diverged and "
        f"are left out); accuracy at the end {reached['5']:.1%}, {reached['50']:.1%} and {reached['95']:.1%} (5th, "
        f"50th and 95th percentile). The autoencoder has {result['model']['parameters']:,} parameters. The accuracy "
        f"of decoded networks differs from their originals' by {lost['accuracy_error']:.1%} in the mean (Kendall's "
        f"tau {lost['kendall_tau'] or 0:.2f}). Embeddings of one orbit spread {result['orbit']['ratio']:.1e} times "
        "as far as those of different networks.</p>"
    )


def _paths(result: Mapping[str, Any], kind: str) -> str:
    lines = []
    for method in result["merging"].values():
        path = method[kind]["path_accuracy"]
        lines.append(report.Line(method["label"], np.linspace(0, 1, len(path)).tolist(), path))
    return report.chart(lines, x="t", y="accuracy")


def _training(history: list[Mapping[str, float]]) -> str:
    names = ("train_distillation", "selection_distillation")
    steps = [epoch["step"] for epoch in history]
    lines = [report.Line(name.replace("_", " "), steps, [epoch[name] for epoch in history]) for name in names]
    return report.chart(lines, x="step", y="distillation loss", log=True)
