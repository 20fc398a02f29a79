"""The options of the command line, and what must be true of them before anything is read or computed."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from jax_scalegmn import io


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    arch: str = "auto"
    """The architecture: a JSON file of Architecture.as_json; a builder with its options, like mlp:784-64-10,relu,
    siren:2-32-32-1,w0=30, cnn:1-16-16,10,relu, vgg:64+64-128+128,10,norm=batch or resnet:20,16-32-64,norm=batch; or
    auto, for dense chains whose widths the file tells."""
    activation: str | None = None
    """The activation of the hidden layers, where --arch does not say it."""
    data: Path | None = None
    """An .npz file with examples x [N, ...] as the network takes them, images as [N, height, width, channels], and for
    straight-through matching their labels y [N]. Without it the function is compared on random inputs."""
    seed: int = 0
    """Of the random inputs and group elements."""
    json: Path | None = None
    """Where to write the summary as JSON."""
    overwrite: bool = False
    """Replace files that are there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment(Common):
    """What commands take that align."""

    out: Path
    """Where to write the network: in the format, with the names and in the dtypes of the first one."""
    method: Literal["weights", "activations", "sinkhorn", "straight-through", "canonical", "none"] = "weights"
    """How networks are aligned: by their weights, by what their neurons do on --data, by gradient steps on relaxed
    elements, by the merged classifier's loss on --data, by their canonical forms, or not at all."""
    scale: bool = True
    """Whether signs and positive scales may be used beside permutations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align(Alignment):
    """Move one network next to another: the same function, with neurons permuted, flipped and rescaled."""

    network: Positional[Path]
    """The network to move."""
    target: Positional[Path]
    """The network to move it next to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Alignment):
    """Align networks and merge them into one."""

    networks: Positional[tuple[Path, ...]]
    """Two networks or more."""
    frame: Literal["first", "mean"] = "first"
    """What all are aligned to: the first network, or their evolving mean."""
    interpolate: Literal["lerp", "slerp"] = "lerp"
    """Along a straight line, or along the great circle between two networks."""
    t: float | None = None
    """Where between two networks, 0 at the first and 1 at the second; 0.5 without --weights."""
    weights: tuple[float, ...] | None = None
    """The weight of each network; equal ones without."""
    repair: bool = False
    """Give the merged network's neurons the statistics of the originals on --data (REPAIR)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Common):
    """Say what networks are, and check that random elements of their group leave their function what it is."""

    networks: Positional[tuple[Path, ...]]
    """One network or more."""


def check(options: Align | Merge | Check) -> None:
    """Checks that options fit together.

    Raises:
      FileExistsError, FileNotFoundError: if the summary cannot be written.
      ValueError: on options that exclude or miss each other.
    """
    if isinstance(options, Alignment):
        _check_alignment(options)
    if isinstance(options, Merge):
        _check_merge(options)
    if isinstance(options, Check) and not options.networks:
        raise ValueError("Got no network to check; expected one or more.")
    if options.json is not None:
        io.check_free(options.json, overwrite=options.overwrite)


def shares(options: Merge) -> list[float]:
    """The weight of each network, with the sum 1.

    Raises:
      ValueError: if --t or --weights are none for the networks.
    """
    count = len(options.networks)
    if options.t is not None:
        if options.weights is not None or count != 2 or not 0 <= options.t <= 1:
            raise ValueError(
                f"--t is {options.t} for {count} networks; expected a number from 0 to 1 for two of them, without "
                "--weights."
            )
        return [1 - options.t, options.t]
    weights = options.weights or (1.0,) * count
    if len(weights) != count or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"--weights are {weights}; expected {count} numbers >= 0, one for each network, not all 0.")
    return [weight / sum(weights) for weight in weights]


# --- private ------------------------------------------------------------------------------------------------------


def _check_alignment(options: Alignment) -> None:
    if options.method in ("activations", "straight-through") and options.data is None:
        raise ValueError(f"--method {options.method} needs examples: pass --data x.npz.")
    if not options.scale and options.method not in ("weights", "activations"):
        raise ValueError(f"--no-scale goes with --method weights or activations, got {options.method}. Leave it out.")
    if options.json is not None and options.json.absolute() == options.out.absolute():
        raise ValueError(f"--json and --out are both {options.out}. Give each its own name.")


def _check_merge(options: Merge) -> None:
    if len(options.networks) < 2:
        raise ValueError(f"Got {len(options.networks)} network to merge; expected two or more.")
    if options.frame == "mean" and options.method != "weights":
        raise ValueError(f"--frame mean goes with --method weights, got {options.method}. Use --frame first.")
    if options.interpolate == "slerp" and len(options.networks) > 2:
        raise ValueError(f"--interpolate slerp is between two networks, got {len(options.networks)}. Use lerp.")
    if options.repair and options.data is None:
        raise ValueError("--repair needs examples: pass --data x.npz.")
    shares(options)
