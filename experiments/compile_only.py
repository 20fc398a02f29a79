"""What the programs of an experiment cost on devices that are not there: compiled for a TPU topology, and not run.

    python -m experiments.inr mnist --compile-only v5e:8x8

Prints for every training step, for the fitting of networks and for their matching what a device computes, moves and
communicates, and the shortest time in which it could (the roofline). It needs libtpu (extra `tpu-topologies`), and no
TPU.
"""

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import progress, runs, tables
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
CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9),
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1640e9, 448e9),
}


class Program(NamedTuple):
    """A program, and the shapes of its arguments on a mesh."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]


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


def run(topology: str, make_programs: Callable[[Mesh], Iterable[Program]]) -> dict[str, Any]:
    """Compiles programs for a TPU topology, shows their costs, and returns them by name.

    Raises:
      SystemExit: Without libtpu, or if it knows no such topology.
    """
    mesh = topology_mesh(topology)
    programs = list(make_programs(mesh))
    found = []
    with progress.bar("Compiling", len(programs), "programs") as advance:
        for program in programs:
            found.append(_cost(program))
            advance(1, program.name)
    show(topology, mesh, found)
    return {cost.name: cost._asdict() for cost in found}


def topology_mesh(name: str) -> Mesh:
    """The devices of a topology like v5e:8x8, on the axis "data".

    Raises:
      SystemExit: Without libtpu, or if it knows no such topology.
    """
    if name.partition(":")[0] not in CHIPS:
        raise SystemExit(f"The topology is {name!r}; expected one of {sorted(CHIPS)} with its sizes, like v5e:8x8.")
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit('--compile-only needs libtpu: pip install "jax-scalegmn[tpu-topologies]". No TPU is needed.')
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is left to others
    jax.config.update("jax_enable_compilation_cache", False)  # which cannot read a program for devices not there
    # No TPU is near that could be asked, and other programs may have loaded libtpu, too.
    known = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in known.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # libtpu raises several types
        reason = str(error).splitlines()[0][:200]
        raise SystemExit(f"The topology is {name!r}; libtpu knows no such one ({reason}). Try v5e:8x8.") from error
    return Mesh(np.asarray(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


# --- programs -----------------------------------------------------------------------------------------------------


def training_step(
    mesh: Mesh,
    name: str,
    model: Any,
    loss: LossFn,
    settings: runs.TrainConfig,
    row: Any,
    *,
    method: str | None = None,
) -> Program:
    """The step of a training as the experiments make it, whose batch is shared out over the devices.

    Args:
      mesh: The devices.
      name: What is trained.
      model: The model.
      loss: Its loss of one row.
      settings: How it is trained.
      row: The shapes of what the loss reads of one network: its params, or a tuple of them and others.
      method: The method of the model by which it is initialized; None for `__call__`.
    """
    tx = settings.make_optimizer(settings.batch_size)
    params = row[0] if isinstance(row, tuple) else row
    state = jax.eval_shape(lambda params: training.init(model, tx, params, jax.random.key(0), method=method), params)
    step = training.make_step(loss, tx, micro_batch=settings.micro_batch, mesh=mesh)
    return Program(name, step, (_placed(state, mesh), _stacked(row, settings.batch_size, mesh)))


def fitting_step(mesh: Mesh, arch: Architecture, size: tuple[int, int], networks: int) -> Program:
    """A step of `zoo.fit_images` on each device, which fits this number of INRs to images of this size."""
    image = jax.ShapeDtypeStruct((*size, arch.neuron_layers[-1].width), jnp.float32)

    def error(params: Params, image: jax.Array) -> jax.Array:
        return jnp.square(network.render(arch, params, size).reshape(image.shape) - image).mean()

    return _fitting(mesh, f"fitting step of {networks} INRs", arch, error, optax.adam(1e-3), (image,), networks)


def classifier_step(
    mesh: Mesh, name: str, arch: Architecture, shape: tuple[int, ...], batch_size: int, networks: int
) -> Program:
    """A step of classifiers on each device, each on a batch of inputs of this shape; a zoo's dropout is left out."""

    def error(params: Params, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = network.train_apply(arch, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    x = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    batch = x, jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return _fitting(mesh, f"{name}, step of {networks}", arch, error, optax.adamw(1e-3), batch, networks)


def weight_matching(mesh: Mesh, name: str, arch: Architecture, pairs: int) -> Program:
    """The matching of this number of pairs of networks on each device."""
    stack = _stacked(params_of(arch), pairs * mesh.size, mesh)
    match = functools.partial(matching.weight_matching, arch)
    return Program(f"{name} of {pairs} pairs", _by_rows(match, mesh, 2), (stack, stack))


def params_of(arch: Architecture) -> Any:
    """The shapes of a network's params."""
    return jax.eval_shape(functools.partial(network.init, arch), jax.random.key(0))


def show(name: str, mesh: Mesh, found: list[Cost]) -> None:
    """Prints the table of costs with the roofline."""
    chip = CHIPS[name.partition(":")[0]]
    head = ("", "GFLOP", "MB moved", "in use", "collectives", "MB sent", "FLOP/B", "µs", "bound by")
    cells = [[cost.name, *_row(cost, chip)] for cost in found]
    title = f"What one of {mesh.size} devices of {name} computes; nothing was run"
    progress.console.print(tables.terminal(tables.Table(title, head, cells)))


# --- private ------------------------------------------------------------------------------------------------------


def _fitting(
    mesh: Mesh,
    name: str,
    arch: Architecture,
    error: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    data: tuple[Any, ...],
    networks: int,
) -> Program:
    """One update of networks on each device, each on its own data of these shapes."""

    def update(params: Params, state: Any, *rows: jax.Array) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(error)(params, *rows), state, params)
        return optax.apply_updates(params, updates), state

    one = params_of(arch)
    args = (one, jax.eval_shape(tx.init, one), *data)
    stacked = tuple(_stacked(tree, networks * mesh.size, mesh) for tree in args)
    return Program(name, _by_rows(update, mesh, len(args)), stacked)


def _row(cost: Cost, chip: Chip) -> list[str]:
    # A ring of all-reduce sends and receives every byte twice.
    seconds = {
        "arithmetic": cost.flops / chip.flops,
        "memory": cost.moved / chip.memory,
        "links": 2 * cost.communicated / chip.links,
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


def _cost(program: Program) -> Cost:
    begin = time.perf_counter()
    compiled = jax.jit(program.fn).lower(*program.args).compile()
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    kinds: dict[str, int] = {}
    communicated = 0
    for arrays, kind in re.findall(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(", compiled.as_text()):
        kinds[kind] = kinds.get(kind, 0) + 1
        communicated += sum(
            _NBYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size)
            for dtype, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", arrays)
        )
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    flops, moved = analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)
    seconds = time.perf_counter() - begin
    return Cost(program.name, flops, moved, used - memory.alias_size_in_bytes, kinds, communicated, seconds)


def _by_rows(fn: Callable[..., Any], mesh: Mesh, inputs: int) -> Callable[..., Any]:
    rows = PartitionSpec("data")
    return jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=(rows,) * inputs, out_specs=rows, check_vma=False)


def _placed(tree: Any, mesh: Mesh, *axes: str) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _stacked(tree: Any, count: int, mesh: Mesh) -> Any:
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)
    return _placed(stack, mesh, "data")
