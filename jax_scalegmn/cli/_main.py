"""The command line: networks in files are aligned, merged and checked.

    jax-scalegmn align a.pt b.pt --out c.pt --activation relu
    jax-scalegmn merge a.msgpack b.msgpack c.msgpack --out m.msgpack --arch resnet:20,16-32-64,norm=batch
    jax-scalegmn check a.safetensors --arch arch.json

This is the one module that prints. Bad input ends with one line on the standard error and status 2, and nothing is
written then.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jax_scalegmn import architecture, io, matching, merge, network, stacks, symmetry
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.cli import _options, _report
from jax_scalegmn.cli._options import Align, Alignment, Check, Common, Merge
from jax_scalegmn.io import Contents, NetworkFile, tensors
from jax_scalegmn.matching import Matching
from jax_scalegmn.types import Interpolate
from jax_scalegmn.zoo import classifiers

_act = jax.jit(symmetry.act)
_COMPARED = 256  # examples on which functions are compared
_AT_ONCE = 1024  # examples that are computed at once, for more than which memory might not do
_STEPS, _BATCH_SIZE = 100, 128  # of straight-through matching


class Examples(NamedTuple):
    """What --data holds: inputs as the network takes them, and what stands beside them as their labels."""

    x: jax.Array
    y: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, with the arguments of the process where there are no others, and returns its exit status."""
    options: Any = tyro.cli(Align | Merge | Check, args=argv, prog="jax-scalegmn")
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"jax-scalegmn: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: Align | Merge | Check) -> dict[str, Any]:
    """One command: reads, computes, writes, prints, and returns the summary that --json writes.

    Raises:
      OSError, ValueError: on bad input, and if an output is there already.
    """
    _options.check(options)
    paths = (options.network, options.target) if isinstance(options, Align) else options.networks
    found = [io.read_contents(path) for path in paths]
    if not isinstance(options, Check):
        io.check_output(options.out, found[0].format, overwrite=options.overwrite)
    dtypes = {np.asarray(leaf).dtype for one in found for leaf in jax.tree.leaves(one.arrays)}
    # Only then, since programs in float64 are slower.
    with jax.enable_x64(True) if np.dtype(np.float64) in dtypes else contextlib.nullcontext():
        arch = _architecture(options, found[0])
        files = [io.interpret(one, arch) for one in found]
        data = None if options.data is None else _examples(options.data, arch, files[0].params)
        key = jax.random.key(options.seed)
        inputs = data.x[:_COMPARED] if data else _report.random_inputs(arch, files[0].params, key)
        summary: dict[str, Any] = {"architecture": arch.name, "neuron_layers": _neuron_layers(arch)}
        print(f"architecture  {arch.name}, {arch.num_parameters} numbers")
        commands: dict[type, Any] = {Align: _align, Merge: _merge, Check: _check}
        summary |= commands[type(options)](options, arch, files, data, inputs)
    if options.json is not None:
        with io.replacing(options.json, overwrite=options.overwrite) as written:
            written.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


# --- private: the commands ------------------------------------------------------------------------------------------


def _align(
    options: Align, arch: Architecture, files: list[NetworkFile], data: Examples | None, inputs: jax.Array | None
) -> dict[str, Any]:
    source, target = (file.params for file in files)
    found = _matched(options, arch, source, target, data)
    moved = _act(arch, found.element, source)
    row = {"path": str(options.network), "target": str(options.target)}
    row |= _report.row(arch, source, moved, target, found, inputs)
    _print_row(row)
    io.write_network(options.out, arch, moved, files[0], overwrite=options.overwrite)
    print(f"written       {options.out}")
    return {"method": options.method, "scale": options.scale, "networks": [row], "out": str(options.out)}


def _merge(
    options: Merge, arch: Architecture, files: list[NetworkFile], data: Examples | None, inputs: jax.Array | None
) -> dict[str, Any]:
    originals = [file.params for file in files]
    targets, found = _in_one_frame(options, arch, originals, data)
    moved = [_act(arch, one.element, params) for one, params in zip(found, originals, strict=True)]
    rows = []
    for path, params, there, target, one in zip(options.networks, originals, moved, targets, found, strict=True):
        name = "the mean of all" if options.frame == "mean" else str(options.networks[0])
        row = {"path": str(path), "target": name} | _report.row(arch, params, there, target, one, inputs)
        rows.append(row)
        if target is not params:
            _print_row(row)
    weights, aligned = _options.shares(options), stacks.stack(*moved)
    if len(moved) == 2:
        between: Interpolate = {"lerp": merge.lerp, "slerp": merge.slerp}[options.interpolate]
        merged = between(moved[0], moved[1], weights[1])
    else:
        merged = merge.average(aligned, jnp.asarray(weights))
    if options.repair:
        assert data is not None  # as cli_options.check has seen to
        batch_size = None if len(data.x) <= _AT_ONCE else _AT_ONCE
        merged = merge.repair(arch, merged, aligned, data.x, weights=jnp.asarray(weights), batch_size=batch_size)
    difference = _report.function_change(arch, originals[0], merged, inputs)
    if difference is not None:
        print(f"merged        differs from {options.networks[0]} by {difference:.2g} of its largest output")
    io.write_network(options.out, arch, merged, files[0], overwrite=options.overwrite)
    print(f"written       {options.out}")
    settings = {name: getattr(options, name) for name in ("method", "scale", "frame", "interpolate", "repair")}
    return {
        **settings,
        "weights": weights,
        "networks": rows,
        "difference_from_first": difference,
        "out": str(options.out),
    }


def _check(
    options: Check, arch: Architecture, files: list[NetworkFile], data: Examples | None, inputs: jax.Array | None
) -> dict[str, Any]:
    for layer in _neuron_layers(arch):
        print(f"  {layer['name']:<12}{layer['neurons']} neurons, {layer['group']}")
    rows = []
    for path, file in zip(options.networks, files, strict=True):
        change = _report.orbit_change(arch, file.params, jax.random.key(options.seed), inputs)
        kind = "an Orbax checkpoint" if file.format.kind == io.ORBAX else file.format.kind
        dtypes = sorted({str(np.asarray(leaf).dtype) for leaf in jax.tree.leaves(file.template)})
        rows.append({"path": str(path), "format": file.format.kind, "dtypes": dtypes, "function_change": change})
        print(f"{path}  {kind}, {', '.join(dtypes)}")
        print(f"  function    {_change_in_words(change)}")
    return {"networks": rows}


def _in_one_frame(
    options: Merge, arch: Architecture, originals: list[Any], data: Examples | None
) -> tuple[list[Any], list[Matching]]:
    """For each network what it is aligned to, and what was found."""
    if options.frame == "mean":
        frame = matching.align_all(arch, stacks.stack(*originals), scale=options.scale)
        elements = [stacks.member(frame.elements, index) for index in range(len(originals))]
        found = [
            Matching(element, similarity, frame.rounds, frame.converged)
            for element, similarity in zip(elements, frame.similarity, strict=True)
        ]
        return [frame.mean] * len(originals), found
    # The first one is where it should be.
    first = originals[0]
    stays = matching.unmatched(arch, first, first)
    return [first] * len(originals), [stays, *(_matched(options, arch, one, first, data) for one in originals[1:])]


def _matched(options: Alignment, arch: Architecture, params: Any, target: Any, data: Examples | None) -> Matching:
    match options.method:
        case "weights":
            return matching.weight_matching(arch, params, target, scale=options.scale)
        case "activations":
            assert data is not None  # as cli_options.check has seen to
            return matching.activation_matching(arch, params, target, data.x, scale=options.scale)
        case "sinkhorn":
            return matching.sinkhorn_matching(arch, params, target)
        case "straight-through":
            assert data is not None  # as cli_options.check has seen to
            return _straight_through(options, arch, params, target, data)
        case "canonical":
            return matching.canonical_matching(arch, params, target)
        case "none":
            return matching.unmatched(arch, params, target)


def _straight_through(options: Alignment, arch: Architecture, params: Any, target: Any, data: Examples) -> Matching:
    expected, got = data.x.shape[:1], "none" if data.y is None else f"{data.y.dtype} {data.y.shape}"
    if data.y is None or data.y.shape != expected or data.y.dtype.kind not in "iu":
        raise ValueError(f"{options.data}: --method straight-through needs labels, integers y {expected}; got {got}.")
    labels = jnp.asarray(data.y)
    classifiers.check_labels(arch, labels)

    def loss_fn(params: Any, batch: Examples) -> jax.Array:
        logits = _report.outputs(arch, params, batch.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.y).mean()

    rows = jax.random.randint(jax.random.key(options.seed), (_STEPS, _BATCH_SIZE), 0, len(data.x))
    batches = Examples(data.x[rows], labels[rows])
    return matching.straight_through_matching(arch, params, target, loss_fn, batches)


# --- private: the input ---------------------------------------------------------------------------------------------


def _architecture(options: Common, first: Contents) -> Architecture:
    if options.arch == "auto":
        if options.activation is None:
            raise ValueError(
                "A file tells the widths of a dense chain, but not its activation: pass --activation relu, or say "
                f"the architecture, like --arch {architecture.EXAMPLES['mlp']} or {architecture.EXAMPLES['siren']}."
            )
        return io.dense_chain(first, options.activation)
    if not options.arch.endswith(".json"):
        return architecture.parse(options.arch, activation=options.activation)
    if options.activation is not None:
        raise ValueError(f"{options.arch} says the activations itself. Leave --activation out.")
    try:
        return architecture.from_json(json.loads(Path(options.arch).read_bytes()))
    except ValueError as error:
        raise ValueError(f"{options.arch}: {error}") from error


def _examples(path: Path, arch: Architecture, params: Any) -> Examples:
    """The examples of a file, checked against the network."""
    arrays = tensors.read(path)
    if path.suffix != ".npz" or "x" not in arrays or arrays["x"].dtype.kind not in "fiub":
        found = {name: str(value.dtype) for name, value in arrays.items()}
        raise ValueError(f"{path}: expected an .npz file with numbers x [N, ...]; it holds {found}.")
    x = jnp.asarray(arrays["x"], float)
    try:
        network.check_examples(arch, x)
        _report.outputs(arch, params, x[:1])
    except (TypeError, ValueError) as error:  # TypeError: of a dense layer behind maps of another size
        raise ValueError(f"{path}: x {x.shape} does not fit {arch.name!r}: {error}") from error
    return Examples(x, arrays.get("y"))


# --- private: the output --------------------------------------------------------------------------------------------


def _neuron_layers(arch: Architecture) -> list[dict[str, Any]]:
    return [{"name": n.name, "neurons": n.width, "group": n.scaling.value} for n in arch.neuron_layers]


def _print_row(row: dict[str, Any]) -> None:
    state = "converged" if row["converged"] else "not converged"
    similarity = f"{row['similarity_before']:.4f} -> {row['similarity_after']:.4f}"
    print(f"{row['path']} -> {row['target']}")
    print(f"  similarity  {similarity}; sweeps: {row['sweeps']}, {state}")
    for name, layer in row["layers"].items():
        low, high = layer["scales"]
        print(
            f"  {name:<12}{layer['neurons']} neurons: {layer['moved']} moved, {layer['flipped']} flipped, scales "
            f"{low:.3g} to {high:.3g}"
        )
    print(f"  function    {_change_in_words(row['function_change'])}")


def _change_in_words(change: float | None) -> str:
    if change is None:
        return "not compared: the architecture does not say how to compute it, or on inputs of which size (--data)"
    return f"preserved: changed by at most {change:.2g} of its largest output"
