"""CNNs of the published size: zoos trained at once against one after the other, and the autoencoder's training step.

python -m benchmarks.cnn                       # one JSON line for each measurement
python -m benchmarks.cnn --chunks 1 8 64 --batch-sizes 64
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_scalegmn as sg
from benchmarks import timing
from experiments.runs import environment
from jax_scalegmn import models, network, training
from jax_scalegmn.training import losses
from jax_scalegmn.zoo import classifier_zoo


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    channels: tuple[int, ...] = (1, 16, 16, 16)
    """The channels of the images and of every convolution."""
    side: int = 32
    """The height and width of the images."""
    examples: int = 2048
    """The number of training images of the zoo; an epoch is one pass over them."""
    networks: int = 32
    """The number of networks of a zoo."""
    chunks: tuple[int, ...] = (1, 4, 16, 32)
    """The numbers of networks trained as one vmapped network; 1 trains one after the other."""
    zoo_batch_size: int = 64
    """The number of images in a batch of the zoo."""
    zoo_repeats: int = 3
    """The number of timed repeats of a zoo."""
    activations: tuple[str, ...] = ("relu", "tanh")
    """The activations of the networks that the autoencoder reads."""
    features: int = 256
    """The number of the autoencoder's features."""
    num_layers: int = 4
    """The number of its message passing layers."""
    batch_sizes: tuple[int, ...] = (64,)
    """The numbers of networks in a training batch."""
    micro_batches: tuple[int, ...] = (2, 8)
    """The numbers of networks differentiated at a time; that of the batch for all at once."""
    images_per_step: int = 64
    """The number of images that every network of a batch is distilled on."""
    repeats: int = 3
    """The number of timed repeats of a call."""
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


def autoencoder_rows(config: Config, activation: str, batch_size: int, dtype: str) -> Iterator[dict[str, Any]]:
    """The encoder forward and the training steps on one batch of networks."""
    arch = sg.cnn(config.channels, 10, activation=activation)
    computed = None if dtype == "float32" else dtype
    model = models.autoencoder(arch, config.features, num_layers=config.num_layers, dtype=computed)
    keys = jax.random.split(jax.random.key(0), batch_size)
    stack = jax.vmap(functools.partial(network.init, arch))(keys)
    images, _ = _images(config, config.images_per_step)
    rows = (stack, losses.teacher_logits(arch, stack, images))
    tx = training.make_optimizer(clip_norm=5.0)
    state = training.init(model, tx, jax.tree.map(lambda leaf: leaf[0], stack), jax.random.key(0))
    loss = losses.distillation(model, images)

    def encode(variables: Any, stack: Any) -> jax.Array:
        return jax.vmap(lambda params: model.apply(variables, params, method="encode"))(stack)

    compiled = {"encoder_forward": timing.compile_once(encode, state.variables, stack)}
    calls = {"encoder_forward": functools.partial(compiled["encoder_forward"].call, state.variables, stack)}
    for micro in config.micro_batches:
        name = "training_step" if micro == batch_size else f"training_step_micro_{micro}"
        step = training.make_step(loss, tx, micro_batch=None if micro == batch_size else micro)
        compiled[name] = timing.compile_once(step, state, rows)
        calls[name] = functools.partial(compiled[name].call, state, rows)
    # The compiler counts the body of a loop once: the operations of a step are those of the one without.
    step_gflop = timing.count_gflop(training.make_step(loss, tx), state, rows)
    product, product_gflop = timing.matmul(config.matmul_size, dtype)
    seconds = timing.in_turn({**calls, "matmul": product}, repeats=config.repeats)
    rate = product_gflop / seconds["matmul"]["median_s"]
    for name, one in compiled.items():
        gflop = one.gflop if name == "encoder_forward" else step_gflop
        yield {
            "benchmark": name,
            "network": str(arch),
            "dtype": dtype,
            "batch_size": batch_size,
            "images": config.images_per_step,
            "graphs_per_second": batch_size / seconds[name]["median_s"],
            "gflop_per_graph": gflop / batch_size,
            "share_of_matmul_rate": gflop / seconds[name]["median_s"] / rate,
            "matmul_gflop_per_second": rate,
            "compile_seconds": one.compile_seconds,
            "peak_mib": one.peak_mib,
            **seconds[name],
        }


# --- private ------------------------------------------------------------------------------------------------------


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    if config.chunks:
        yield from _zoo(config)
    for activation in config.activations:
        for batch_size in config.batch_sizes:
            for dtype in config.dtypes:
                yield from autoencoder_rows(config, activation, batch_size, dtype)


def _images(config: Config, count: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, config.side, config.side, 1)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, 10, count), jnp.int32)


def _zoo(config: Config) -> Iterator[dict[str, Any]]:
    """Networks times epochs a second; compiling is taken off as the difference of a long and a short training."""
    arch, examples = sg.cnn(config.channels, 10), _images(config, config.examples)
    recipes = classifier_zoo.sample(config.networks, 0)
    steps = config.examples // config.zoo_batch_size

    def run(steps: int, chunk: int) -> Any:
        return classifier_zoo.fit(
            arch,
            examples,
            recipes,
            checkpoints=(steps,),
            batch_size=config.zoo_batch_size,
            scored_examples=1,
            networks_at_once=chunk,
        ).params

    calls = {
        f"{chunk} {name}": functools.partial(run, count, chunk)
        for chunk in config.chunks
        for name, count in (("short", 1), ("long", 1 + steps))
    }
    seconds = timing.in_turn(calls, repeats=config.zoo_repeats)
    for chunk in config.chunks:
        spent = seconds[f"{chunk} long"]["median_s"] - seconds[f"{chunk} short"]["median_s"]
        yield {
            "benchmark": "zoo_fit",
            "network": str(arch),
            "side": config.side,
            "examples": config.examples,
            "batch_size": config.zoo_batch_size,
            "chunk": chunk,
            "networks": config.networks,
            "networks_times_epochs_per_second": config.networks / spent,
            "images_per_second": config.networks * steps * config.zoo_batch_size / spent,
            "short_s": seconds[f"{chunk} short"],
            "long_s": seconds[f"{chunk} long"],
        }


if __name__ == "__main__":
    main(tyro.cli(Config))
