"""INRs at the published size: zoo fitting, encoder forward and training step, next to the machine's rate.

python -m benchmarks.inr                       # one JSON line for each measurement
python -m benchmarks.inr --batch-sizes 64 --micro-batches 4 8 16 64
"""

import dataclasses
import functools
import json
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jax_scalegmn as sg
from benchmarks import timing
from experiments.runs import environment
from jax_scalegmn import models, network, stacks, training, zoo
from jax_scalegmn.training import losses


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    batch_sizes: tuple[int, ...] = (16, 64, 128)
    """The numbers of networks in a training batch."""
    micro_batches: tuple[int, ...] = (8, 16)
    """The numbers of networks differentiated at a time, where they divide the batch."""
    widths: tuple[int, ...] = (2, 32, 32, 1)
    """The number of neurons of every layer of the INRs."""
    side: int = 28
    """The height and width of the images."""
    features: int = 128
    """The number of the autoencoder's features."""
    num_layers: int = 4
    """The number of its message passing layers."""
    orbit_weight: float = 0.0
    """The weight of the orbit-distance term."""
    repeats: int = 5
    """The number of timed repeats of a call."""
    zoo_networks: int = 128
    """The number of INRs that are fitted."""
    zoo_steps: int = 50
    """The number of updates of every INR."""
    zoo_chunks: tuple[int, ...] = (16, 32, 128)
    """The numbers of INRs trained as one vmapped network."""
    matmul_size: int = 2048
    """The size of the matrix product that shows the machine's rate."""
    dtypes: tuple[str, ...] = ("float32",)
    """The dtypes of features and products, each next to the machine's rate in that dtype."""


def main(config: Config) -> list[dict[str, Any]]:
    """Prints one JSON line for each measurement and returns them."""
    rows = []
    for row in _rows(config):
        rows.append(row | {"environment": environment()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def model_rows(config: Config, batch_size: int, dtype: str) -> list[dict[str, Any]]:
    """The encoder forward and the training steps on one batch."""
    arch = sg.siren(config.widths)
    computed = None if dtype == "float32" else dtype
    model = models.autoencoder(arch, config.features, num_layers=config.num_layers, dtype=computed)
    keys = jax.random.split(jax.random.key(0), batch_size)
    batch = jax.vmap(lambda key: network.init(arch, key, initialization=network.near_zero))(keys)
    tx = training.make_optimizer()
    state = training.init(model, tx, jax.tree.map(lambda leaf: leaf[0], batch), jax.random.key(0))
    loss = losses.inr_reconstruction(model, size=(config.side, config.side), orbit_weight=config.orbit_weight)

    def encode(variables: Any, stack: Any) -> jax.Array:
        return jax.vmap(lambda params: model.apply(variables, params, method="encode"))(stack)

    compiled = {"encoder_forward": timing.compile_once(encode, state.variables, batch)}
    arguments: dict[str, tuple[Any, ...]] = {"encoder_forward": (state.variables, batch)}
    for micro in [None, *[size for size in config.micro_batches if size < batch_size and batch_size % size == 0]]:
        name = "training_step" if micro is None else f"training_step_micro_{micro}"
        compiled[name] = timing.compile_once(training.make_step(loss, tx, micro_batch=micro), state, batch)
        arguments[name] = (state, batch)
    # The compiler counts the body of a loop once, so the operations of a step are those of the one without.
    gflop = {name: compiled["training_step" if "step" in name else name].gflop for name in compiled}
    product, product_gflop = timing.matmul(config.matmul_size, dtype)
    calls = {name: functools.partial(one.call, *arguments[name]) for name, one in compiled.items()}
    seconds = timing.in_turn({**calls, "matmul": product}, repeats=config.repeats)
    rate = product_gflop / seconds["matmul"]["median_s"]
    return [
        {
            "benchmark": name,
            "network": str(arch),
            "dtype": dtype,
            "batch_size": batch_size,
            "graphs_per_second": batch_size / seconds[name]["median_s"],
            "gflop_per_graph": gflop[name] / batch_size,
            "share_of_matmul_rate": gflop[name] / seconds[name]["median_s"] / rate,
            "matmul_gflop_per_second": rate,
            "compile_seconds": one.compile_seconds,
            "peak_mib": one.peak_mib,
            **seconds[name],
        }
        for name, one in compiled.items()
    ]


def zoo_row(config: Config, chunk: int) -> dict[str, Any]:
    """The fitting of INRs, `chunk` of them at a time; compiling is left out, as is all until a first chunk is ready."""
    size, chunks = (config.side, config.side), 1 + max(1, config.zoo_networks // chunk)
    images = np.random.default_rng(0).uniform(size=(chunk, *size)).astype(np.float32)
    ready: list[float] = []
    fitted = zoo.fit_images(
        sg.siren(config.widths),
        images,
        np.zeros(chunk, int),
        image_index=np.tile(np.arange(chunk), chunks),
        num_steps=config.zoo_steps,
        networks_at_once=chunk,
        progress=lambda _: ready.append(time.perf_counter()),
    )
    seconds, networks = ready[-1] - ready[0], len(fitted) - chunk
    return {
        "benchmark": "zoo_fit",
        "network": str(fitted.arch),
        "side": config.side,
        "chunk": chunk,
        "networks": networks,
        "steps": config.zoo_steps,
        "seconds": seconds,
        "network_steps_per_second": networks * config.zoo_steps / seconds,
        "networks_per_second_at_1000_steps": networks * config.zoo_steps / seconds / 1000,
    }


def sine_rows(config: Config, networks: int) -> list[dict[str, Any]]:
    """Fitting, drawing and midpoints of INRs with the sine of networks and with XLA's own, in turn."""
    arch, size = sg.siren(config.widths), (config.side, config.side)
    keys = jax.random.split(jax.random.key(0), networks)
    stack = jax.vmap(lambda key: network.init(arch, key, initialization=network.near_zero))(keys)
    targets = jax.vmap(lambda key: jax.random.uniform(key, (*size, config.widths[-1])))(keys)
    tx, num_steps = optax.adam(1e-3), max(1, config.zoo_steps // 5)

    def loss_fn(params: Any, target: Any) -> jax.Array:
        return jnp.square(network.render(arch, params, size).reshape(target.shape) - target).mean()

    def fit(params: Any, target: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            updates, state = tx.update(jax.grad(loss_fn)(carry[0], target), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[0][0]

    def midpoint(params: Any, target: Any) -> jax.Array:
        return loss_fn(sg.merge.lerp(params, stacks.member(stack, 0), 0.5), target)

    jobs = {"fit": fit, "loss": loss_fn, "midpoint": midpoint}
    calls = {}
    for name, sine in (("polynomial", network.sine), ("xla", jnp.sin)):
        with unittest.mock.patch.dict(network.ACTIVATIONS, {"sine": sine}):
            for job, fn in jobs.items():
                program = timing.compile_once(jax.vmap(lambda *row, fn=fn: fn(*row)), stack, targets)
                calls[f"{job}, {name}"] = functools.partial(program.call, stack, targets)
    seconds = timing.in_turn(calls, repeats=config.repeats)
    return [
        {
            "benchmark": f"sine_{job}",
            "network": str(arch),
            "side": config.side,
            "networks": networks,
            "steps": num_steps if job == "fit" else 1,
            "times_as_fast": seconds[f"{job}, xla"]["median_s"] / seconds[f"{job}, polynomial"]["median_s"],
            "seconds": {name: seconds[f"{job}, {name}"] for name in ("polynomial", "xla")},
        }
        for job in jobs
    ]


# --- private ------------------------------------------------------------------------------------------------------


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    for batch_size in config.batch_sizes:
        for dtype in config.dtypes:
            yield from model_rows(config, batch_size, dtype)
    for chunk in config.zoo_chunks:
        yield zoo_row(config, chunk)
    yield from sine_rows(config, config.zoo_networks)


if __name__ == "__main__":
    main(tyro.cli(Config))
