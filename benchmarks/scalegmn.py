"""The encoder over batch size and network width: on blocks and edge by edge, in float32 and bfloat16.

python -m benchmarks.scalegmn                        # one JSON line for each measurement
python -m benchmarks.scalegmn --batch-sizes 64 --widths --dtypes float32

Every line states the share of the machine's float32 matrix-product rate, measured in turn with it, and the rate of the
products that the model itself is made of, [edges, d] @ [d, d] and their weight gradients: no arrangement of these
products is faster than they are.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jax_scalegmn as sg
from benchmarks import timing
from experiments.runs import environment
from jax_scalegmn import models, network, training
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.models import graph, reference


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure. INRs 2-w-w-1: every batch size at the first width, every width at the first batch size."""

    batch_sizes: tuple[int, ...] = (16, 64, 256)
    """The numbers of networks in a batch."""
    widths: tuple[int, ...] = (32, 128, 512)
    """The widths of the hidden layers of the INRs."""
    features: int = 128
    """The number of the encoder's features."""
    num_layers: int = 4
    """The number of its message passing layers."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """The dtypes of features and products."""
    bidirectional: bool = False
    """Whether messages also run from receivers to senders."""
    micro_edges: int = 2240
    """The number of edges computed at a time, as whole networks: what fits the cache."""
    segment_sum_gflop: float = 1500.0
    """The largest work, counted on blocks, of a case that is also measured edge by edge."""
    repeats: int = 3
    """The number of timed repeats of a call."""
    matmul_size: int = 2048
    """The size of the matrix product that shows the machine's rate."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints one JSON line for each measurement and returns them."""
    rows = []
    for batch_size, width in _sizes(config):
        for row in _measure(config, sg.siren((2, width, width, 1)), batch_size):
            rows.append(row | {"batch_size": batch_size, "width": width, "environment": environment()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# --- private ------------------------------------------------------------------------------------------------------


def _sizes(config: Config) -> list[tuple[int, int]]:
    first_width = (*config.widths, 32)[0]
    return list(
        dict.fromkeys(
            [(batch, first_width) for batch in config.batch_sizes]
            + [(config.batch_sizes[0], width) for width in config.widths]
        )
    )


def _measure(config: Config, arch: Architecture, batch_size: int) -> Iterator[dict[str, Any]]:
    num_edges = graph.topology(arch).num_edges
    micro = max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and _fits(config, size, num_edges))
    keys = jax.random.split(jax.random.key(0), batch_size)
    stack = jax.vmap(lambda key: network.init(arch, key, initialization=network.near_zero))(keys)
    product, product_gflop = timing.matmul(config.matmul_size)
    own = _own_products(micro * num_edges, config.features)
    cases = {
        (name, dtype): _case(config, arch, stack, name, dtype, micro)
        for dtype in config.dtypes
        for name in ("blocks", "segment_sum")
    }
    total = cases["blocks", config.dtypes[0]]["step_gflop"] * batch_size
    for (name, dtype), case in cases.items():
        if name == "segment_sum" and total > config.segment_sum_gflop:
            continue
        for kind in ("forward", "step"):
            one = case[kind]()
            calls = {kind: one.call, "matmul": product, **{key: call for key, (call, _) in own.items()}}
            seconds = timing.in_turn(calls, repeats=config.repeats)
            rate = product_gflop / seconds["matmul"]["median_s"]
            gflop = case[f"{kind}_gflop"] * batch_size
            yield {
                "benchmark": kind,
                "implementation": name,
                "dtype": dtype,
                "micro_batch": micro,
                "graphs_per_second": batch_size / seconds[kind]["median_s"],
                "gflop_per_graph": gflop / batch_size,
                "share_of_matmul_rate": gflop / seconds[kind]["median_s"] / rate,
                "matmul_gflop_per_second": rate,
                **{
                    f"{key}_share_of_matmul_rate": work / seconds[key]["median_s"] / rate
                    for key, (_, work) in own.items()
                },
                "compile_seconds": one.compile_seconds,
                "peak_mib": one.peak_mib,
                **seconds[kind],
            }


def _fits(config: Config, size: int, num_edges: int) -> bool:
    return size == 1 or size * num_edges <= config.micro_edges


def _case(config: Config, arch: Architecture, stack: Any, name: str, dtype: str, micro: int) -> dict[str, Any]:
    """How to compile forward and step of one implementation, and their GFLOP for one network."""
    gmn = models.ScaleGMN(
        arch,
        config.features,
        config.num_layers,
        bidirectional=config.bidirectional,
        dtype=None if dtype == "float32" else dtype,
    )
    encoder, tx = models.Encoder(gmn), training.make_optimizer()

    def encode(variables: Any, params: Any, *, encoder: models.Encoder = encoder) -> jax.Array:
        if name == "blocks":
            return encoder.apply(variables, params)
        return reference.encode(encoder, variables, graph.from_params(arch, params))

    def loss_fn(
        variables: Any, params: Any, key: jax.Array, encode: Callable[..., jax.Array] = encode
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.square(encode(variables, params).astype(jnp.float32)).mean(), {}

    example = jax.tree.map(lambda leaf: leaf[0], stack)
    state = training.init(encoder, tx, example, jax.random.key(0))

    def forward(variables: Any, stack: Any) -> jax.Array:
        return jax.lax.map(functools.partial(encode, variables), stack, batch_size=micro if micro > 1 else None)

    def compiled(fn: Callable[..., Any], *args: Any) -> timing.Compiled:
        one = timing.compile_once(fn, *args)
        return one._replace(call=functools.partial(one.call, *args))

    # The compiler counts the body of a loop once: operations are counted for one network, outside of any loop.
    whole = encoder.clone(gmn=gmn.clone(edges_at_once=graph.topology(arch).num_edges))
    whole_encode, key = functools.partial(encode, encoder=whole), jax.random.key(0)
    forward_gflop = timing.compile_once(whole_encode, state.variables, example).gflop
    gradient = jax.grad(functools.partial(loss_fn, encode=whole_encode), has_aux=True)
    step_gflop = timing.compile_once(gradient, state.variables, example, key).gflop
    return {
        "forward": functools.partial(compiled, forward, state.variables, stack),
        "step": functools.partial(compiled, training.make_step(loss_fn, tx, micro_batch=micro), state, stack),
        "forward_gflop": forward_gflop,
        "step_gflop": step_gflop,
    }


def _own_products(rows: int, features: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """[rows, d] @ [d, d] and [d, rows] @ [rows, d] in float32, each with its GFLOP."""
    x, kernel = jnp.ones((rows, features)), jnp.ones((features, features))
    forward, weight_gradient = jax.jit(jnp.matmul), jax.jit(lambda a, b: a.T @ b)
    gflop = 2 * rows * features**2 / 1e9
    return {
        "edge_product": (lambda: forward(x, kernel), gflop),
        "weight_gradient_product": (lambda: weight_gradient(x, x), gflop),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
