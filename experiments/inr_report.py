"""The report of the INR experiment: what of its results becomes tables, charts and pictures."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from experiments import controls, report, tables
from experiments.tables import Table

INDEPENDENT = "independent fits"


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """The methods on the first kind of pair: independent fits, where the zoo has them."""
    rows = []
    for method in results["merging"][_first(results)].values():
        cells = [tables.with_interval(method[key], 4) for key in ("midpoint", "barrier", "end_point_gap")]
        rows.append([method["label"], *cells, f"{method['recognized']:.1%}", f"{method['milliseconds']:.2f}"])
    return [Table(_title(results), ("method", "midpoint", "barrier", "end-point gap", "read", "ms"), rows)]


def sections(results: Mapping[str, Any], pictures: Mapping[str, Any]) -> Iterable[str]:
    """The sections of the page."""
    yield _introduction(results)
    yield f"<h2>{_title(results)}</h2>" + tables.page(result_tables(results)[0])
    yield (
        "<p class=note>Mean squared error against the true image, with 95 % bootstrap intervals over pairs. Midpoint: "
        "at t = 1/2. Barrier: the maximum above the chord between the end points. End-point gap: between what an end "
        "point draws and what its original network draws. Read: digits recognized by the classifier at t = 1/2. "
        "Ms: the milliseconds that an alignment takes, for all pairs together and divided by their number.</p>"
    )
    yield "<h2>A network and a transformed, perturbed copy</h2><p>Mean squared error at t = 1/2.</p>"
    yield tables.page(_copies(results))
    for kind in _charted_kinds(results):
        yield f"<h2>Along the path: {kind}</h2>" + _paths(results["merging"][kind])
    labels = {name: method["label"] for name, method in results["merging"][_first(results)].items()}
    strips = {labels[name]: [report.side_by_side(strip) for strip in few] for name, few in pictures["paths"].items()}
    yield "<h2>Images along the path</h2>" + report.image_rows(strips)
    rows = {"image": "truth", "its INR": "original", "decoded INR": "decoded"}
    drawn = {label: [report.side_by_side(pictures[name])] for label, name in rows.items()}
    yield "<h2>Controls</h2><p>What is drawn in place of unseen networks.</p>" + tables.page(_controls(results))
    yield "<h2>Reconstructions</h2>" + report.image_rows(drawn)
    yield "<h2>Embeddings</h2>" + _embeddings(pictures)
    yield "<h2>Training</h2>" + _training(results["training"])
    for name, learned in results["alignment"].items():
        yield f"<h2>Training of the learned {name}</h2>" + _training(learned["training"])
    yield report.settings({name: results[name] for name in ("config", "environment", "seconds", "zoo")})


# --- private ------------------------------------------------------------------------------------------------------


def _first(results: Mapping[str, Any]) -> str:
    return next(iter(results["merging"]))


def _title(results: Mapping[str, Any]) -> str:
    if _first(results) == INDEPENDENT:
        return "Two independent fits of one unseen image"
    return f"An unseen network and a copy of it ({_first(results)})"


def _introduction(results: Mapping[str, Any]) -> str:
    reconstruction, orbit, zoo = results["reconstruction"], results["orbit"], results["zoo"]
    recognized, groups = reconstruction["recognized"], results["orbits"]
    counts = ", ".join(
        f"{part['networks']} networks of {part['images']} images for {name}" for name, part in zoo.items()
    )
    return (
        f"<p>{counts}; no image is used twice. The autoencoder has {results['model']['parameters']:,} parameters.</p>"
        f"<p><b>Reconstruction</b> of unseen networks: mean squared error {reconstruction['mse']:.4f}, "
        f"{reconstruction['share_of_variance']:.1%} of the variance of the images "
        f"({reconstruction['image_variance']:.4f}); drawing the mean image would cost "
        f"{reconstruction['mean_image_mse']:.4f}. A classifier trained on the training images reads "
        f"{recognized['images']:.1%} of the unseen images, {recognized['original']:.1%} as drawn by their INRs and "
        f"{recognized['decoded']:.1%} as drawn by the decoded networks.</p>"
        f"<p><b>Orbits</b>: the embeddings of one orbit spread {orbit['ratio']:.1e} times as far as those of different "
        f"networks; by permutations alone {groups['P']['ratio']:.1e}, by scales or signs {groups['D']['ratio']:.1e}. "
        f"The encoder is {results['config']['encoder']}.</p>"
    )


def _controls(results: Mapping[str, Any]) -> Table:
    reconstruction = results["reconstruction"]
    decoded = reconstruction | {"recognized": reconstruction["recognized"]["decoded"]}
    several = {"decoded network": decoded} | {
        controls.LABELS[name]: one for name, one in reconstruction["controls"].items()
    }
    rows = [
        [label, f"{one['mse']:.4f}", f"{one['share_of_variance']:.1%}", f"{one['recognized']:.1%}"]
        for label, one in several.items()
    ]
    return Table("Controls", ("drawn", "mean squared error", "of the variance", "read"), rows)


def _copies(results: Mapping[str, Any]) -> Table:
    kinds = [kind for kind in results["merging"] if kind != INDEPENDENT]
    rows = []
    for name, method in results["merging"][kinds[0]].items():
        midpoints = [results["merging"][kind][name]["midpoint"]["mean"] for kind in kinds]
        rows.append([method["label"], *[f"{value:.4f}" for value in midpoints]])
    return Table("Transformed copies", ("method", *kinds), rows)


def _charted_kinds(results: Mapping[str, Any]) -> list[str]:
    """The first kind and two of the copies moved by the whole group."""
    kinds = list(results["merging"])
    copies = [kind for kind in kinds if kind.startswith("PD")]
    return list(dict.fromkeys([kinds[0], *copies[:: max(1, len(kinds) // 3 - 2)]]))[:3]


def _paths(methods: Mapping[str, Any]) -> str:
    lines = [
        report.Line(method["label"], method["ts"], method["path"], method["path_low"], method["path_high"])
        for method in methods.values()
    ]
    return report.chart(lines, x="t", y="mean squared error", log=True)


def latent_pictures(latent: np.ndarray, orbits: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Places in the plane of embeddings [networks, features], and of members of orbits [orbits, members, features].

    PCA is linear, so that what looks like one point is one up to the two components; t-SNE (van der Maaten and Hinton
    2008) keeps neighbors, of networks and members of orbits together.

    Returns:
      By the name of the map the places of the networks [networks, 2] and of the members [orbits, members, 2].
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    members = orbits.reshape(-1, orbits.shape[-1])
    components = PCA(2).fit(latent)
    everything = np.concatenate([latent, members])
    # Of few points the exact gradient takes less time than the tree of the approximate one.
    method = "exact" if len(everything) <= 100 else "barnes_hut"
    neighbors = TSNE(perplexity=min(30, (len(everything) - 1) / 3), init="pca", random_state=0, method=method)
    maps = {"PCA": components.transform(everything), "t-SNE": neighbors.fit_transform(everything)}
    shape = (*orbits.shape[:2], 2)
    return {name: (places[: len(latent)], places[len(latent) :].reshape(shape)) for name, places in maps.items()}


def _embeddings(pictures: Mapping[str, Any]) -> str:
    """The embeddings by label, with orbits on top."""
    orbits, axes = pictures["orbits"], {"PCA": ("first principal component", "second"), "t-SNE": ("t-SNE", "t-SNE")}
    drawn = []
    for name, (places, members) in latent_pictures(pictures["latent"], orbits).items():
        groups = {f"label {label}": places[pictures["labels"] == label] for label in np.unique(pictures["labels"])}
        for number, (label, orbit) in enumerate(zip(pictures["orbit_labels"], members, strict=True)):
            groups[f"orbit {number} of label {label}"] = orbit
        drawn.append(f"<h3>{name}</h3>" + report.scatter(groups, x=axes[name][0], y=axes[name][1]))
    return "".join(drawn) + (
        f"<p class=note>Every label has a color; {len(orbits)} orbits of {orbits.shape[1]} members, moved by the whole "
        "group, are drawn on top. An encoder that follows the whole group draws an orbit as one point.</p>"
    )


def _training(history: list[Mapping[str, float]]) -> str:
    steps = [epoch["step"] for epoch in history]
    names = sorted({name for epoch in history for name in epoch} - {"step", "seconds", "train_grad_norm"})
    lines = [report.Line(name.replace("_", " "), steps, [epoch[name] for epoch in history]) for name in names]
    return report.chart(lines, x="step", y="loss", log=True)
