"""The options of the command line, and the checks that need no file and no JAX."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, TypeAlias

from tyro.conf import Positional

DESCRIPTION = "Aligns, merges and checks neural networks that are stored in files, and runs sweeps of experiments."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every command."""

    arch: str = "auto"
    """The architecture of the networks. Give a JSON file written from Architecture.as_json; or a builder with its
    options, like mlp:784-64-10,relu, siren:2-32-32-1,w0=30, cnn:1-16-16,10,relu, vgg:64+64-128+128,10,norm=batch or
    resnet:20,16-32-64,norm=batch; or a list of layers with the shape of one example, like "sequential([Conv(16, 3),
    'relu', Flatten(), Dense(10)], (1, 28, 28))", which is parsed and never run, or JSON of layers.as_json; or auto,
    which reads the widths of a chain of dense layers from the file."""
    activation: str | None = None
    """The activation of the hidden layers. It is needed if --arch does not name one."""
    module: str | None = None
    """Your own function (params, x) -> outputs, as module:function, like my_model:apply. Params are the tensors of the
    file by name, as stored there; x is a batch of --data. The architecture is inferred from it, and functions are
    compared by calling it. Importing it runs your module."""
    order: str | None = None
    """The names of PyTorch's modules in the order in which the networks apply them, like input,hidden,output. It is
    asked for where a file sorts its names, as .safetensors does, and modules of equal shape have no numbers."""
    key: str | None = None
    """The dict of tensors to read in PyTorch files that hold several, like model_ema; dots lead into inner dicts."""
    data: Path | None = None
    """An .npz file with inputs x [N, ...] of the network, images as [N, height, width, channels] or as --module takes
    them, and if there are any with their labels y [N], which --method straight-through needs. Without it, functions are
    compared on random inputs."""
    limits: str | None = None
    """Limits of what files may ask for, like metadata_bytes=268435456,nesting=100; errors name the one to raise."""
    seed: int = 0
    """The seed of the random inputs and of the random group elements."""
    json: Path | None = None
    """The JSON file that the summary is written to."""
    overwrite: bool = False
    """Replace output files that exist."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment(Common):
    """The options of the commands that align networks."""

    out: Path
    """The file that the resulting network is written to. It gets the format, names and dtypes of the first network."""
    method: Literal["weights", "activations", "sinkhorn", "straight-through", "search", "canonical", "none"] = "weights"
    """How networks are aligned. weights compares their weights; activations compares their activations on --data;
    sinkhorn takes gradient steps on relaxed permutations; straight-through lowers the merged classifier's loss on
    --data; search exchanges neurons until the merged network's outputs on --data are close to the networks' own, and
    merge then brings each next to the mean of those before it; canonical brings each network to its canonical form;
    none leaves them unaligned."""
    distance: Literal["auto", "squared-error", "cross-entropy"] = "auto"
    """How --method search compares outputs. squared-error is for values, cross-entropy for the logits of classifiers;
    auto takes cross-entropy for networks of several outputs where --data has whole numbers y [N], the labels of
    classes, and squared-error elsewhere. The labels themselves are not used."""
    gradient_steps: int = 0
    """The number of gradient steps on relaxed permutations and signs before the exchanges of --method search, like 100.
    They need the extra sinkhorn."""
    kicks: int = 0
    """The number of times that --method search goes on from its result with some neurons moved at random, like 16: each
    costs about as much as the search."""
    scale_steps: int = 0
    """The number of gradient steps on positive scales after the exchanges of --method search, like 100; for networks
    with relu and other activations that have such scales."""
    scale: bool = True
    """Align with signs and positive scales as well as permutations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align(Alignment):
    """Align one network to another: same function, with its neurons permuted, flipped and rescaled."""

    network: Positional[Path]
    """The network to align."""
    target: Positional[Path]
    """The network to align it to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Alignment):
    """Align networks and merge them into one."""

    networks: Positional[tuple[Path, ...]]
    """The networks to merge, two or more."""
    frame: Literal["first", "mean"] = "first"
    """What the networks are aligned to. first is the first network; mean is the mean of all aligned networks, which
    is found together with their alignment."""
    interpolate: Literal["lerp", "slerp"] = "lerp"
    """How two networks are interpolated. lerp is a straight line, slerp the great circle."""
    t: float | None = None
    """The position between two networks, 0 at the first and 1 at the second. The default is 0.5."""
    weights: tuple[float, ...] | None = None
    """The weight of each network in the merged one. The default is equal weights."""
    repair: bool = False
    """Reset the statistics of the merged network's neurons to those of the original networks on --data (REPAIR)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Common):
    """Describe networks, and check that random elements of their symmetry group preserve their function."""

    networks: Positional[tuple[Path, ...]]
    """The networks to check, one or more."""


Command: TypeAlias = Align | Merge | Check


def check(options: Command) -> None:
    """Checks that the options fit together.

    Raises:
      ValueError: On options that exclude each other, or if one is missing that another needs.
    """
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; expected a whole number from 0 to {2**32 - 1}.")
    if options.module is not None:
        _check_module(options)
    if isinstance(options, Alignment):
        _check_alignment(options)
    if isinstance(options, Merge):
        _check_merge(options)
    if isinstance(options, Check) and not options.networks:
        raise ValueError("Got no network to check; expected one or more.")
    _check_outputs(options)


def paths(options: Command) -> tuple[Path, ...]:
    """The files of the networks."""
    return (options.network, options.target) if isinstance(options, Align) else options.networks


def limits(options: Command) -> dict[str, int]:
    """The limits to change, by name.

    Raises:
      ValueError: If --limits is no list of names with whole numbers.
    """
    text = options.limits or ""
    pairs = [item.partition("=") for item in text.split(",") if item]
    if not all(value.isdecimal() and len(value) < 20 for _, _, value in pairs):
        raise ValueError(f"--limits is {text[:200]!r}; expected names with whole numbers, like nesting=100.")
    return {name.strip(): int(value) for name, _, value in pairs}


def merge_weights(options: Merge) -> list[float]:
    """The weight of each network, with the sum 1.

    Raises:
      ValueError: If --t or --weights do not fit the networks.
    """
    count = len(options.networks)
    if options.t is not None:
        if options.weights is not None or count != 2 or not 0 <= options.t <= 1:
            raise ValueError(
                f"--t is {options.t} for {count} networks; expected a number from 0 to 1 for two networks, without "
                "--weights."
            )
        return [1 - options.t, options.t]
    weights = options.weights or (1.0,) * count
    if len(weights) != count or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"--weights are {weights}; expected {count} numbers >= 0, one for each network, with a finite sum above 0."
        )
    return [weight / sum(weights) for weight in weights]


# --- private ------------------------------------------------------------------------------------------------------


def _check_outputs(options: Command) -> None:
    """Checks that no output is an input; --out alone may name a network again, which --overwrite then replaces."""
    inputs = {"--data": options.data, "--arch": Path(options.arch) if options.arch.endswith(".json") else None}
    if options.module is not None:
        inputs["--module"] = Path(options.module.partition(":")[0].replace(".", "/") + ".py")
    networks = paths(options)
    outputs = {"--json": options.json, "--out": options.out if isinstance(options, Alignment) else None}
    if outputs["--json"] and outputs["--out"] and _overlap(outputs["--json"], outputs["--out"]):
        raise ValueError(f"--json and --out are both {outputs['--out']}. Give each its own name.")
    for option, output in outputs.items():
        for name, path in inputs.items():
            if output is not None and path is not None and _overlap(output, path):
                raise ValueError(f"{option} {output} is also the file of {name}, which it would replace. Rename it.")
        for path in networks:
            if output is not None and _overlap(output, path) and not (option == "--out" and _same(output, path)):
                raise ValueError(f"{option} {output} is also the network {path}, which it would replace. Rename it.")


def _overlap(a: Path, b: Path) -> bool:
    """Whether two paths are one file, or one is inside the other; by links and other spellings, too."""
    a_folders, b_folders = ((path.resolve(), *path.resolve().parents) for path in (a, b))
    inside = a_folders[0].is_relative_to(b_folders[0]) or b_folders[0].is_relative_to(a_folders[0])
    return inside or any(_same(folder, b) for folder in a_folders) or any(_same(folder, a) for folder in b_folders)


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


def _check_module(options: Common) -> None:
    given = {"--arch": options.arch != "auto", "--activation": options.activation, "--order": options.order}
    others = [name for name, value in given.items() if value]
    if others:
        raise ValueError(f"--module says how the network computes, so leave out {', '.join(others)}.")
    if options.data is None:
        raise ValueError("--module needs examples for your function: pass --data x.npz.")


def _check_alignment(options: Alignment) -> None:
    if options.method in ("activations", "straight-through", "search") and options.data is None:
        raise ValueError(f"--method {options.method} needs examples: pass --data x.npz.")
    if options.distance != "auto" and options.method != "search":
        raise ValueError(f"--distance goes with --method search, got {options.method}. Leave it out.")
    searches = {
        "--gradient-steps": options.gradient_steps,
        "--kicks": options.kicks,
        "--scale-steps": options.scale_steps,
    }
    for name, number in searches.items():
        if number and options.method != "search":
            raise ValueError(f"{name} goes with --method search, got {options.method}. Leave it out.")
    if not options.scale and options.method not in ("weights", "activations"):
        raise ValueError(f"--no-scale goes with --method weights or activations, got {options.method}. Leave it out.")


def _check_merge(options: Merge) -> None:
    if len(options.networks) < 2:
        raise ValueError(f"Got {len(options.networks)} network to merge; expected two or more.")
    if options.frame == "mean" and options.method != "weights":
        raise ValueError(f"--frame mean goes with --method weights, got {options.method}. Use --frame first.")
    if options.interpolate == "slerp" and len(options.networks) > 2:
        raise ValueError(f"--interpolate slerp is between two networks, got {len(options.networks)}. Use lerp.")
    if options.method == "search" and (options.t is not None or options.weights or options.interpolate != "lerp"):
        raise ValueError(
            "--method search merges with equal weights and lerp; expected no --t, --weights or --interpolate. Leave "
            "them out."
        )
    if options.repair and options.data is None:
        raise ValueError("--repair needs examples: pass --data x.npz.")
    merge_weights(options)
