"""What the commands do once their options are parsed: read, align or check, write, print.

This is the one module of the library that prints results.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, architecture, io, layers, matching, merge, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.cli import _function, _headers, _options, _report
from jax_scalegmn.cli._options import Align, Alignment, Check, Command, Common, Merge
from jax_scalegmn.io import ArrayFile, NetworkFile, tensors
from jax_scalegmn.matching import Matching
from jax_scalegmn.types import Interpolate, Params
from jax_scalegmn.zoo import classifiers

_act = jax.jit(symmetry.act)
_NUM_COMPARED = 256  # examples on which functions are compared
_BATCH_SIZE = 1024  # examples computed at once in REPAIR: more may not fit into memory
_NUM_NOTES = 5  # of what `infer` left fixed
_STEPS, _STEP_SIZE = 100, 128  # updates of straight-through matching, and the examples of each


class LabeledExamples(NamedTuple):
    """The arrays of --data: inputs of the network [N, ...] and, if the file has them, labels [N]."""

    x: jax.Array
    y: Any


def run(options: Command) -> dict[str, Any]:
    """Runs one command: reads, computes, writes, prints, and returns the summary that --json writes.

    Raises:
      OSError, ValueError: On bad input, and if an output file exists.
      ImportError: If a format or method needs a package that is not installed.
    """
    if options.json is not None:
        io.check_writable(options.json, overwrite=options.overwrite)
    stored = [io.read_arrays(path, key=options.key) for path in _options.paths(options)]
    _check_shapes(options, stored)
    if not isinstance(options, Check):
        io.check_writable(options.out, stored[0].format, overwrite=options.overwrite)
    with _precision(stored):
        arch, files, data = _described(options, stored) if options.module is None else _own(options, stored)
        key = jax.random.key(options.seed)
        inputs = data.x[:_NUM_COMPARED] if data else _report.random_inputs(arch, files[0].params, key)
        print(f"architecture  {arch.name}, {arch.num_parameters} numbers")
        summary: dict[str, Any] = {"architecture": arch.name, "neuron_layers": _neuron_layers(arch)}
        match options:
            case Align():
                summary |= _align(options, arch, files, data, inputs)
            case Merge():
                summary |= _merge(options, arch, files, data, inputs)
            case Check():
                summary |= _check(options, arch, files, inputs)
    if options.json is not None:
        with io.atomic_path(options.json, overwrite=options.overwrite) as scratch:
            scratch.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


# --- private: the commands ------------------------------------------------------------------------------------------


def _align(
    options: Align,
    arch: Architecture,
    files: list[NetworkFile],
    data: LabeledExamples | None,
    inputs: jax.Array | None,
) -> dict[str, Any]:
    params, target = (file.params for file in files)
    result = _match(options, arch, params, target, data)
    aligned = _act(arch, result.element, params)
    row = {"path": str(options.network), "target": str(options.target)}
    row |= _report.row(arch, params, aligned, target, result, inputs)
    _print_row(row, options.module)
    io.write_network(options.out, arch, aligned, files[0], overwrite=options.overwrite)
    print(f"written       {options.out}")
    return {"method": options.method, "scale": options.scale, "networks": [row], "out": str(options.out)}


def _merge(
    options: Merge,
    arch: Architecture,
    files: list[NetworkFile],
    data: LabeledExamples | None,
    inputs: jax.Array | None,
) -> dict[str, Any]:
    originals: list[Params] = [file.params for file in files]
    target, results = _align_to_one_frame(options, arch, originals, data)
    aligned = [_act(arch, result.element, params) for result, params in zip(results, originals, strict=True)]
    rows = _alignment_rows(options, arch, originals, aligned, target, results, inputs)
    merged, found = _combine(options, arch, originals, aligned, data)
    difference = _report.function_change(arch, originals[0], merged, inputs)
    if difference is not None:
        print(f"merged        differs from {options.networks[0]} by {difference:.2g} of its largest output")
    io.write_network(options.out, arch, merged, files[0], overwrite=options.overwrite)
    print(f"written       {options.out}")
    settings = {name: getattr(options, name) for name in ("method", "scale", "frame", "interpolate", "repair")}
    return {**settings, **found, "networks": rows, "difference_from_first": difference, "out": str(options.out)}


def _check(options: Check, arch: Architecture, files: list[NetworkFile], inputs: jax.Array | None) -> dict[str, Any]:
    for layer in _neuron_layers(arch):
        print(f"  {layer['name']:<11} {layer['neurons']} neurons, {layer['group']}")
    rows = []
    for path, file in zip(options.networks, files, strict=True):
        try:
            change = _report.orbit_change(arch, file.params, jax.random.key(options.seed), inputs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        kind = "an Orbax checkpoint" if file.format.kind == "orbax" else file.format.kind
        dtypes = sorted({str(np.asarray(leaf).dtype) for leaf in jax.tree.leaves(file.stored)})
        rows.append({"path": str(path), "format": file.format.kind, "dtypes": dtypes, "function_change": change})
        print(f"{path}  {kind}, {', '.join(dtypes)}")
        if file.order is not None:
            rows[-1]["order"] = list(file.order)
            print(f"  modules     {', '.join(file.order)}")
        print(f"  function    {_change_in_words(change, options.module)}")
    return {"networks": rows}


# --- private: matching and merging ----------------------------------------------------------------------------------


def _alignment_rows(
    options: Merge,
    arch: Architecture,
    originals: list[Params],
    aligned: list[Params],
    target: Params,
    results: list[Matching],
    inputs: jax.Array | None,
) -> list[dict[str, Any]]:
    """What the alignment did to each network; printed too, but for the network that is the target."""
    target_name = "the mean of all" if options.frame == "mean" else str(options.networks[0])
    rows = []
    for path, params, moved, result in zip(options.networks, originals, aligned, results, strict=True):
        row = {"path": str(path), "target": target_name}
        row |= _report.row(arch, params, moved, target, result, inputs)
        rows.append(row)
        if target is not params:
            _print_row(row, options.module)
    return rows


def _combine(
    options: Merge,
    arch: Architecture,
    originals: list[Params],
    aligned: list[Params],
    data: LabeledExamples | None,
) -> tuple[Params, dict[str, Any]]:
    """The merged network, repaired if --repair says so, and how it compares to others; that is printed too."""
    weights = _options.merge_weights(options)
    merged = plain = _merged(options, arch, aligned, weights, data, repair=False)
    left = {}
    if options.repair:
        merged, left = _merged(options, arch, aligned, weights, data, repair=True), merge.uncorrected(arch)
    table = []
    if arch.function is not None and data is not None:
        networks = {str(path): params for path, params in zip(options.networks, originals, strict=True)}
        networks |= {"naive": _merged(options, arch, originals, weights, data, repair=False), "merged": plain}
        networks |= {"repaired": merged} if options.repair else {}
        table = _report.table(arch, networks, data.x, data.y)
    _print_table(table)
    for name, reason in left.items():
        print(f"not repaired  {name}: {reason}")
    losses = {}
    if options.method == "search":
        assert data is not None  # _options.check refuses it
        losses = _print_search(options, arch, originals, merged, data)
    return merged, {"weights": weights, "table": table, "uncorrected": left, **losses}


def _align_to_one_frame(
    options: Merge, arch: Architecture, originals: list[Params], data: LabeledExamples | None
) -> tuple[Params, list[Matching]]:
    """What all networks are aligned to, and the matching of each."""
    if options.frame == "mean":
        frame = matching.align_all(arch, stacks.stack(*originals), scale=options.scale)
        elements = [stacks.member(frame.elements, index) for index in range(len(originals))]
        results = [
            Matching(element, similarity, frame.rounds, frame.converged)
            for element, similarity in zip(elements, frame.similarity, strict=True)
        ]
        return frame.mean, results
    if options.method == "search":
        assert data is not None  # _options.check refuses it
        return _searched_together(options, arch, originals, data)
    first = originals[0]
    unmoved = matching.unmatched(arch, first, first)
    return first, [unmoved, *(_match(options, arch, params, first, data) for params in originals[1:])]


def _match(
    options: Alignment, arch: Architecture, params: Params, target: Params, data: LabeledExamples | None
) -> Matching:
    match options.method:
        case "weights":
            return matching.weight_matching(arch, params, target, scale=options.scale)
        case "activations":
            assert data is not None  # _options.check refuses it
            return matching.activation_matching(arch, params, target, data.x, scale=options.scale)
        case "sinkhorn":
            return matching.sinkhorn_matching(arch, params, target)
        case "straight-through":
            assert data is not None  # _options.check refuses it
            return _straight_through(options, arch, params, target, data)
        case "search":
            assert data is not None  # _options.check refuses it
            x, key = data.x[:_NUM_COMPARED], jax.random.key(options.seed)
            return matching.search_matching(arch, params, target, x, key, **_search_options(options, arch, data))
        case "canonical":
            return matching.canonical_matching(arch, params, target)
        case "none":
            return matching.unmatched(arch, params, target)


def _searched_together(
    options: Merge, arch: Architecture, originals: list[Params], data: LabeledExamples
) -> tuple[Params, list[Matching]]:
    """The first network, and the matchings with which each joins the mean of those before it."""
    x, key = data.x[:_NUM_COMPARED], jax.random.key(options.seed)
    many = merge.merge_many(arch, stacks.stack(*originals), x, key, **_search_options(options, arch, data))
    results = [matching.unmatched(arch, originals[0], originals[0])]
    for index, params in enumerate(originals[1:], start=1):
        one = stacks.member(many._replace(params={}), index)
        similarity = matching.similarity(arch, _act(arch, one.elements, params), originals[0])
        searched = (one.losses, one.start_losses, one.evaluations)
        results.append(Matching(one.elements, similarity, one.sweeps, one.converged, *searched))
    return originals[0], results


def _search_options(options: Alignment, arch: Architecture, data: LabeledExamples) -> dict[str, Any]:
    return {
        "distance": _distance(options, arch, data),
        "gradient_steps": options.gradient_steps,
        "kicks": options.kicks,
        "scale_steps": options.scale_steps,
    }


def _distance(options: Alignment, arch: Architecture, data: LabeledExamples) -> Callable[..., jax.Array]:
    """How outputs are compared: --distance, or cross-entropy where the data have the labels of classes."""
    classes = arch.neuron_layers[-1].width
    labeled = data.y is not None and data.y.shape == data.x.shape[:1] and data.y.dtype.kind in "iu"
    if options.distance == "cross-entropy" and classes < 2:
        raise ValueError(
            f"--distance cross-entropy is for the logits of classes, but {arch.name} has {classes} output; expected 2 "
            "or more. Use squared-error."
        )
    if options.distance == "cross-entropy" or (options.distance == "auto" and labeled and classes > 1):
        return matching.cross_entropy
    return matching.squared_error


def _print_search(
    options: Merge, arch: Architecture, originals: list[Params], merged: Params, data: LabeledExamples
) -> dict[str, Any]:
    """The distances to the mean of all networks' outputs: of the first, the last, naive merging and this one."""
    x, distance = data.x[:_NUM_COMPARED], _distance(options, arch, data)

    def outputs(params: Params) -> jax.Array:
        return jax.vmap(lambda one: network.apply(arch, params, one))(x)

    stack = stacks.stack(*originals)
    expected = jax.lax.map(outputs, stack).mean(0)
    networks = {"first": originals[0], "last": originals[-1], "naive": merge.average(stack), "merged": merged}
    losses = {name: float(distance(outputs(params), expected)) for name, params in networks.items()}
    name = distance.__name__.replace("_", "-")
    print(f"{name}  " + ", ".join(f"{network} {loss:.4g}" for network, loss in losses.items()))
    return {"distance": name, "losses": losses}


def _straight_through(
    options: Alignment, arch: Architecture, params: Params, target: Params, data: LabeledExamples
) -> Matching:
    if arch.function is not None:
        _report.check_labels(arch, params, data.x, data.y, needed="--method straight-through")

        def own_loss(params: Params, batch: LabeledExamples) -> jax.Array:
            outputs = network.apply(arch, params, batch.x, convolve=network.convolve_by_patches)
            return _report.loss(outputs, batch.y)

        own_rows = jax.random.randint(jax.random.key(options.seed), (_STEPS, _STEP_SIZE), 0, len(data.x))
        own_batches = LabeledExamples(data.x[own_rows], jnp.asarray(data.y)[own_rows])
        return matching.straight_through_matching(arch, params, target, own_loss, own_batches)
    expected, got = data.x.shape[:1], "none" if data.y is None else f"{data.y.dtype} {data.y.shape}"
    if data.y is None or data.y.shape != expected or data.y.dtype.kind not in "iu":
        raise ValueError(f"{options.data}: --method straight-through needs labels, integers y {expected}; got {got}.")
    labels = jnp.asarray(data.y)
    classifiers.check_labels(arch, labels)

    def loss_fn(params: Params, batch: LabeledExamples) -> jax.Array:
        convolve = network.convolve_by_patches  # 7 times as fast
        return classifiers.cross_entropy(arch, params, batch.x, batch.y, convolve=convolve)

    rows = jax.random.randint(jax.random.key(options.seed), (_STEPS, _STEP_SIZE), 0, len(data.x))
    batches = LabeledExamples(data.x[rows], labels[rows])
    return matching.straight_through_matching(arch, params, target, loss_fn, batches)


def _merged(
    options: Merge,
    arch: Architecture,
    aligned: list[Params],
    weights: list[float],
    data: LabeledExamples | None,
    *,
    repair: bool,
) -> Params:
    """The one network that aligned networks are merged into."""
    stack = stacks.stack(*aligned)
    if len(aligned) == 2:
        interpolate: Interpolate = {"lerp": merge.lerp, "slerp": merge.slerp}[options.interpolate]
        merged = interpolate(aligned[0], aligned[1], weights[1])
    else:
        merged = merge.average(stack, jnp.asarray(weights))
    if repair:
        assert data is not None  # _options.check refuses it
        batch_size = None if len(data.x) <= _BATCH_SIZE else _BATCH_SIZE
        merged = merge.repair(arch, merged, stack, data.x, weights=jnp.asarray(weights), batch_size=batch_size)
    return merged


# --- private: the input ---------------------------------------------------------------------------------------------


def _precision(stored: list[ArrayFile]) -> contextlib.AbstractContextManager[Any]:
    """Enables float64 if an array of the files has it, and only then, since programs in float64 are slower."""
    dtypes = {np.asarray(leaf).dtype for file in stored for leaf in jax.tree.leaves(file.arrays)}
    return jax.enable_x64(True) if np.dtype(np.float64) in dtypes else contextlib.nullcontext()


def _architecture(options: Common, first: ArrayFile) -> Architecture:
    if options.arch == "auto":
        if options.activation is None:
            raise ValueError(
                "The widths of a chain of dense layers follow from the file, its activation does not: pass "
                f"--activation relu, or the architecture, like --arch {architecture.EXAMPLES['mlp']} or "
                f"{architecture.EXAMPLES['siren']}."
            )
        return io.infer_mlp(first, options.activation, order=_order(options))
    if "(" in options.arch:
        return layers.parse(options.arch)
    if not options.arch.endswith(".json"):
        return architecture.parse(options.arch, activation=options.activation)
    if options.activation is not None:
        raise ValueError(f"{options.arch} already holds the activations. Leave --activation out.")
    try:
        description = _bounded.read_json(Path(options.arch))
        own_layers = isinstance(description, dict) and "input_shape" in description
        return layers.from_json(description) if own_layers else architecture.from_json(description)
    except ValueError as error:
        raise error if options.arch in str(error) else ValueError(f"{options.arch}: {error}") from error


def _check_shapes(options: Common, stored: list[ArrayFile]) -> None:
    shapes = [
        {".".join(path): np.shape(leaf) for path, leaf in architecture.flatten(file.arrays).items()} for file in stored
    ]
    for file, own in zip(stored[1:], shapes[1:], strict=True):
        _headers.compare(stored[0].path, shapes[0], file.path, own, by_name=options.module is not None)


def _described(
    options: Common, stored: list[ArrayFile]
) -> tuple[Architecture, list[NetworkFile], LabeledExamples | None]:
    """The architecture of --arch, the networks as its params, and the examples."""
    arch = _architecture(options, stored[0])
    files = [io.as_network(file, arch, order=_order(options)) for file in stored]
    if files[0].order is not None:  # PyTorch's modules: the result is written like the first network
        arch = io.storable(arch, files[0].stored, order=files[0].order)
    return arch, files, None if options.data is None else _examples(options.data, arch, files[0].params)


def _own(options: Common, stored: list[ArrayFile]) -> tuple[Architecture, list[NetworkFile], LabeledExamples]:
    """The architecture of --module, the networks with the names and shapes of their files, and the examples."""
    assert options.module is not None
    assert options.data is not None
    files = [io.as_stored(file) for file in stored]
    function = _function.of_params(options.module, _function.load(options.module), stored, files)
    arrays = _arrays(options.data)
    x = jnp.asarray(arrays["x"], float if arrays["x"].dtype.kind in "fb" else None)
    arch, notes = _function.infer(options.module, function, files[0], options.data, x)
    network.check_examples(arch, x, name=f"{options.data}: x")
    # What is before a normalization is left alone in every network that has one: nothing to act on.
    notes = tuple(note for note in notes if "left alone by the rescaling" not in note)
    for note in notes[:_NUM_NOTES]:
        print(f"note          {note}")
    if len(notes) > _NUM_NOTES:
        print(f"note          and {len(notes) - _NUM_NOTES} more; sg.infer returns all")
    data = LabeledExamples(x, arrays.get("y"))
    if data.y is not None:
        _report.check_labels(arch, files[0].params, x, data.y, needed=f"{options.data}")
    return arch, files, data


def _order(options: Common) -> list[str] | None:
    return None if options.order is None else [name.strip() for name in options.order.split(",")]


def _examples(path: Path, arch: Architecture, params: Params) -> LabeledExamples:
    """The examples of a file, checked against the network."""
    arrays = _arrays(path)
    x = jnp.asarray(arrays["x"], float)
    try:
        network.check_examples(arch, x)
        _report.outputs(arch, params, x[:1])
    except (TypeError, ValueError) as error:  # TypeError: a dense layer after images of another size
        raise ValueError(f"{path}: x {x.shape} does not fit {arch.name!r}: {error}") from error
    return LabeledExamples(x, arrays.get("y"))


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of --data."""
    arrays = tensors.read(path)
    if path.suffix != ".npz" or "x" not in arrays or arrays["x"].dtype.kind not in "fiub" or not arrays["x"].shape:
        dtypes = _bounded.short({name: str(value.dtype) for name, value in arrays.items()})
        raise ValueError(f"{path}: expected an .npz file with numbers x [N, ...]; it holds {dtypes}.")
    shapes = {name: arrays[name].shape for name in ("x", "y") if name in arrays}
    if not len(arrays["x"]) or len({shape[:1] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"{path}: it holds arrays of shapes {shapes}; expected one example or more, and one y for each."
        )
    return arrays


# --- private: the output --------------------------------------------------------------------------------------------


def _neuron_layers(arch: Architecture) -> list[dict[str, Any]]:
    return [{"name": n.name, "neurons": n.width, "group": n.scaling.value} for n in arch.neuron_layers]


def _print_row(row: dict[str, Any], own: str | None) -> None:
    state = "converged" if row["converged"] else "not converged"
    similarity = f"{row['similarity_before']:.4f} -> {row['similarity_after']:.4f}"
    print(f"{row['path']} -> {row['target']}")
    print(f"  similarity  {similarity}; sweeps: {row['sweeps']}, {state}")
    for name, layer in row["layers"].items():
        low, high = layer["scales"]
        print(
            f"  {name:<11} {layer['neurons']} neurons: {layer['moved']} moved, {layer['flipped']} flipped, scales "
            f"{low:.3g} to {high:.3g}"
        )
    print(f"  function    {_change_in_words(row['function_change'], own)}")


def _print_table(table: list[dict[str, Any]]) -> None:
    """Both ends, the merged networks, and how they do on --data."""
    if not table:
        return
    columns = [name for name in table[0] if name != "network"]
    width = max(len("network"), *(len(row["network"]) for row in table))
    print(f"{'network':<{width}}" + "".join(f"  {name:>12}" for name in columns))
    for row in table:
        print(f"{row['network']:<{width}}" + "".join(f"  {row[name]:>12.4g}" for name in columns))


def _change_in_words(change: float | None, own: str | None) -> str:
    if own is not None:
        return f"of {own}, preserved: changed by at most {change:.2g} of its largest output"
    if change is None:
        return "not compared: pass --data, since the architecture has no layers or its input size is unknown"
    return (
        f"of the described network, preserved: changed by at most {change:.2g} of its largest output; your own code "
        "was not run"
    )
