"""Sweeps of the INR experiment: weight of the orbit-distance term, model size and training time.

    python -m experiments.sweep --out runs/sweep --results benchmarks/results/orbit_weight.json

The zoo is fitted once and shared by all runs. Finished runs are kept: the same command continues where it stopped.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import tyro

from experiments import inr, inr_report, progress, runs, tables


@dataclasses.dataclass(frozen=True)
class Config:
    """What to sweep."""

    out: Path = Path("runs/sweep")
    """The folder of all runs."""
    results: Path = Path("runs/sweep/sweep.json")
    """The file of the table."""
    base: str = "digits"
    """The preset of `experiments.inr` that sets all other options."""
    orbit_weights: tuple[float, ...] = (0.0, 0.3, 1.0, 3.0)
    """The weights of the orbit-distance term."""
    features: tuple[int, ...] = (32,)
    """The numbers of features of the autoencoder."""
    epochs: tuple[int, ...] = (20,)
    """The lengths of the training."""
    noises: tuple[float, ...] = (0.001,)
    """The perturbations of transformed copies; the table shows the first."""


SHORT_METHODS = {
    "matching_pd_forward": "pairwise",
    "fixed_frame": "fixed",
    "canonical_frame": "canonical",
    "autoencoder": "autoencoder",
}


def main(config: Config) -> list[dict[str, Any]]:
    """Runs what is not there yet, prints the table, writes it and returns its rows."""
    base = inr.PRESETS[config.base][1]
    rows: list[dict[str, Any]] = []
    zoo = None
    for features, epochs, weight in itertools.product(config.features, config.epochs, config.orbit_weights):
        out = config.out / f"features-{features}-epochs-{epochs}-weight-{weight:g}"
        if zoo is not None and not out.exists():
            shutil.copytree(zoo, out / "zoo")
        done = out / "results.json"
        results = runs.read_json(done)
        if results is None:
            results = inr.main(
                dataclasses.replace(
                    base,
                    out=out,
                    resume=(out / "config.json").exists(),
                    model=dataclasses.replace(base.model, features=features),
                    train=dataclasses.replace(base.train, epochs=epochs, orbit_weight=weight),
                    evaluation=dataclasses.replace(base.evaluation, noises=config.noises),
                    alignment=dataclasses.replace(base.alignment, epochs=0),
                )
            )
        zoo = out / "zoo"
        rows.append(_row(config, results))
        runs.write_json(config.results, {"environment": results["environment"], "rows": rows})
    progress.console.print(tables.terminal(_table(rows)))
    return rows


# --- private ------------------------------------------------------------------------------------------------------


def _row(config: Config, results: dict[str, Any]) -> dict[str, Any]:
    settings = results["config"]
    copies = f"PD, noise {config.noises[0]:g}"
    return {
        "features": settings["model"]["features"],
        "epochs": settings["train"]["epochs"],
        "orbit_weight": settings["train"]["orbit_weight"],
        "reconstruction_share": results["reconstruction"]["share_of_variance"],
        "independent": {name: results["merging"][inr_report.INDEPENDENT][name]["midpoint"] for name in SHORT_METHODS},
        copies: {name: results["merging"][copies][name]["midpoint"] for name in SHORT_METHODS},
        "training_seconds": sum(epoch["seconds"] for epoch in results["training"]),
    }


def _table(rows: list[dict[str, Any]]) -> tables.Table:
    cells = []
    for row in rows:
        merged = [f"{row['independent'][name]['mean']:.4f}" for name in SHORT_METHODS]
        settings = (row["features"], row["epochs"], row["orbit_weight"], f"{row['reconstruction_share']:.1%}")
        cells.append([*map(str, settings), *merged])
    head = ("features", "epochs", "weight", "reconstruction", *SHORT_METHODS.values())
    return tables.Table("Independent fits: mean squared error at t = 1/2", head, cells)


if __name__ == "__main__":
    main(tyro.cli(Config))
