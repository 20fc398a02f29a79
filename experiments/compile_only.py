"""What the programs of an INR experiment cost on devices that are not there: compiled for a TPU topology, and not run.

    python -m experiments.inr mnist --compile-only v5e:8x8

Prints for the training step, the fitting of INRs and their matching what a device computes, moves and communicates, and
the shortest time in which it could (the roofline). It needs libtpu (extra `tpu`), and no TPU.
"""

import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import autoencoders, progress, tables
from jax_scalegmn import matching, network, training
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import LossFn, Params

_COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
_NBYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Chip(NamedTuple):
    """The published rates of a chip, per second: products and sums in bfloat16, bytes of memory and between chips."""

    flops: float
    memory: float
    links: float


# Google Cloud's documentation of the TPU versions.
CHIPS = {"v4": Chip(275e12, 1200e9, 300e9), "v5e": Chip(197e12, 819e9, 200e9), "v5p": Chip(459e12, 2765e9, 600e9)}


class Cost(NamedTuple):
    """What one call of a program costs a device.

    Attributes:
      name: The program.
      flops: Products and sums.
      moved: Bytes read from and written to memory.
      memory: The most bytes in use.
      collectives: How often it communicates, by kind.
      communicated: The bytes of these arrays.
      seconds: How long compiling took.
    """

    name: str
    flops: float
    moved: float
    memory: int
    collectives: dict[str, int]
    communicated: int
    seconds: float


def topology_mesh(name: str) -> Mesh:
    """The devices of a topology like v5e:8x8, on the axis "data".

    Raises:
      SystemExit: Without libtpu, or if it knows no such topology.
    """
    if name.partition(":")[0] not in CHIPS:
        raise SystemExit(f"The topology is {name!r}; expected one of {sorted(CHIPS)} with its sizes, like v5e:8x8.")
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit('--compile-only needs libtpu: pip install "jax-scalegmn[tpu]". No TPU is needed.')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is near that could be asked
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # libtpu raises several types
        reason = str(error).splitlines()[0][:200]
        raise SystemExit(f"The topology is {name!r}; libtpu knows no such one ({reason}). Try v5e:8x8.") from error
    return Mesh(np.asarray(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def costs(
    mesh: Mesh,
    arch: Architecture,
    settings: autoencoders.TrainConfig,
    model: Any,
    loss: LossFn,
    *,
    size: tuple[int, int],
    networks: int,
) -> list[Cost]:
    """Compiles the programs of an INR experiment for the devices of a mesh.

    Args:
      mesh: The devices.
      arch: The INRs.
      settings: How the autoencoder is trained.
      model: The autoencoder.
      loss: Its loss.
      size: Height and width of the images.
      networks: The INRs that a device fits, and the pairs that it matches, at once.
    """
    tx = settings.make_optimizer(settings.batch_size)
    one = jax.eval_shape(functools.partial(network.init, arch), jax.random.key(0))
    state = jax.eval_shape(lambda params: training.init(model, tx, params, jax.random.key(0)), one)
    step = training.make_step(loss, tx, micro_batch=settings.micro_batch, mesh=mesh)
    stack = _stacked(one, networks * mesh.size, mesh)
    channels = arch.neuron_layers[-1].width
    images = _stacked(jax.ShapeDtypeStruct((*size, channels), jnp.float32), networks * mesh.size, mesh)
    adam = optax.adam(1e-3)
    moments = _stacked(jax.eval_shape(adam.init, one), networks * mesh.size, mesh)

    def update(params: Params, moments: Any, image: jax.Array) -> tuple[Params, Any]:
        def error(params: Params) -> jax.Array:
            return jnp.square(network.render(arch, params, size).reshape(image.shape) - image).mean()

        updates, moments = adam.update(jax.grad(error)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    match = functools.partial(matching.weight_matching, arch)
    return [
        _cost("training step", step, _placed(state, mesh), _stacked(one, settings.batch_size, mesh)),
        _cost(f"fitting step of {networks} INRs", _by_rows(update, mesh, 3), stack, moments, images),
        _cost(f"matching of {networks} pairs", _by_rows(match, mesh, 2), stack, stack),
    ]


def show(name: str, mesh: Mesh, found: list[Cost]) -> None:
    """Prints the table of costs with the roofline."""
    chip = CHIPS[name.partition(":")[0]]
    labels = (
        "GFLOP",
        "MB moved",
        "MB in use",
        "communication",
        "MB communicated",
        "FLOP per byte",
        "roofline, us",
        "bound",
    )
    columns = [_column(one, chip) for one in found]
    cells = [[label, *values] for label, *values in zip(labels, *columns, strict=True)]
    title = f"What one of {mesh.size} devices of {name} computes; nothing was run"
    progress.console.print(tables.terminal(tables.Table(title, ("", *(one.name for one in found)), cells)))


# --- private ------------------------------------------------------------------------------------------------------


def _column(cost: Cost, chip: Chip) -> list[str]:
    # A ring of all-reduce sends and receives every byte twice.
    seconds = {
        "arithmetic": cost.flops / chip.flops,
        "memory": cost.moved / chip.memory,
        "communication": 2 * cost.communicated / chip.links,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return [
        f"{cost.flops / 1e9:.3f}",
        f"{cost.moved / 1e6:.1f}",
        f"{cost.memory / 1e6:.1f}",
        ", ".join(f"{count} {kind}" for kind, count in cost.collectives.items()) or "none",
        f"{cost.communicated / 1e6:.2f}",
        f"{cost.flops / max(cost.moved, 1):.2f}",
        f"{1e6 * seconds[bound]:.1f}",
        bound,
    ]


def _cost(name: str, fn: Callable[..., Any], *args: Any) -> Cost:
    begin = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    kinds: dict[str, int] = {}
    communicated = 0
    for shapes, kind in re.findall(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(", compiled.as_text()):
        kinds[kind] = kinds.get(kind, 0) + 1
        communicated += sum(
            _NBYTES[dtype] * int(np.prod([int(size) for size in dims.split(",") if size]))
            for dtype, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shapes)
        )
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    flops, moved = analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)
    seconds = time.perf_counter() - begin
    return Cost(name, flops, moved, used - memory.alias_size_in_bytes, kinds, communicated, seconds)


def _by_rows(fn: Callable[..., Any], mesh: Mesh, inputs: int) -> Callable[..., Any]:
    rows = PartitionSpec("data")
    return jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=(rows,) * inputs, out_specs=rows, check_vma=False)


def _placed(tree: Any, mesh: Mesh, *axes: str) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _stacked(tree: Any, count: int, mesh: Mesh) -> Any:
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)
    return _placed(stack, mesh, "data")
