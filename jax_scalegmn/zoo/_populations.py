"""Zoos: thousands of networks trained at once in one compiled program, with where each comes from.

`fit` trains any architecture on any data; `fit_images` fits INRs to images. A zoo is one safetensors file: arrays and
JSON, nothing that could run code.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from jax_scalegmn import architecture, io, network
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.types import Key, Params

FORMAT = "jax_scalegmn.zoo/1"


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Networks of one architecture.

    Attributes:
      arch: their architecture.
      params: their weights, every array with a leading axis [networks].
      records: what is known of each network, arrays with a leading axis [networks]: loss, seed; of INRs also psnr in
        dB, image_index and label.
      settings: what they share: initialization, steps, learning_rate, w0.
    """

    arch: Architecture
    params: dict[str, Any]
    records: dict[str, np.ndarray]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        count = architecture.check_stack(self.arch, self.params, name="zoo.params")
        for name, values in self.records.items():
            if len(values) != count:
                raise ValueError(
                    f"zoo.records[{name!r}] has {len(values)} rows, zoo.params {count} networks: row "
                    f"{min(len(values), count)} is missing in one of them. They are of different zoos, or one was cut."
                )

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.params)[0])

    def __getitem__(self, rows: np.ndarray | slice) -> "Zoo":
        """The zoo of some of the networks, by a slice, indices or a mask."""
        params = jax.tree.map(lambda leaf: leaf[rows], self.params)
        return Zoo(self.arch, params, {name: values[rows] for name, values in self.records.items()}, self.settings)


def fit(
    arch: Architecture,
    loss_fn: Callable[[Params, Any], Array],
    data: Any,
    keys: Key,
    *,
    tx: optax.GradientTransformation,
    num_steps: int,
    initialization: network.Initialization = network.standard,
    chunk: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Zoo:
    """Trains one network for every row of `data`, all in one compiled program.

    The program scans over chunks of networks and, inside, over steps; a chunk is one vmapped network. Every step is
    one full-batch update on the network's own row.

    Args:
      arch: of all networks.
      loss_fn: (params of one network, its row of data) -> scalar loss.
      data: a pytree whose arrays have a leading axis [networks].
      keys: [networks] keys, each for one initialization.
      tx: the optimizer.
      num_steps: updates of every network.
      initialization: `network.standard` or `network.near_zero`, or another of that form.
      chunk: networks trained side by side: as many as the caches (CPU) or the memory (accelerator) hold.
      progress: called with the number of networks that each finished chunk adds.

    Returns:
      The zoo, with the record loss: after the last update.

    Raises:
      ValueError: if data and keys disagree on the number of networks, or a network diverged.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected a number >= 1.")

    def fit_one(row: Any, key: Key) -> tuple[Params, Array]:
        params: Params = network.init(arch, key, initialization=initialization)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, row), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=num_steps)
        return params, loss_fn(params, row)

    params, losses = fit_each(fit_one, (data, keys), chunk=chunk, progress=progress)
    losses = np.asarray(losses)
    if not np.isfinite(losses).all():
        raise ValueError(
            f"{int((~np.isfinite(losses)).sum())} of {len(losses)} networks diverged (loss NaN or infinite), the first "
            f"in row {int(np.argmin(np.isfinite(losses)))}. Lower the learning rate."
        )
    return Zoo(arch, params, {"loss": losses}, {"steps": num_steps, "initialization": initialization.__name__})


def fit_each(
    fit_one: Callable[..., Any],
    rows: tuple[Any, ...],
    *shared: Any,
    chunk: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Trains a network for every row in one compiled program: a scan over chunks of networks that are vmapped.

    Args:
      fit_one: (one row of each of `rows`, all of `shared`) -> what is known of its network.
      rows: pytrees whose arrays have a leading axis [networks].
      shared: pytrees that are the same for all networks, like images.
      chunk, progress: as `fit`.

    Returns:
      What `fit_one` returns, every array with a leading axis [networks].

    Raises:
      ValueError: if the rows disagree on the number of networks, or there are none, or chunk is below 1.
    """
    counts = {len(leaf) for leaf in jax.tree.leaves(rows)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"The rows disagree on how many networks to fit, or there are none: {sorted(counts)}.")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected a number >= 1.")
    count = counts.pop()
    chunk = min(chunk, count)
    # The last chunk is filled up with networks that are dropped again.
    chunks = jnp.arange(-(-count // chunk) * chunk).reshape(-1, chunk)

    def fit_chunk(given: tuple[Any, ...], index: Array) -> tuple[tuple[Any, ...], Any]:
        rows, shared = given
        result = jax.vmap(lambda *row: fit_one(*row, *shared))(*jax.tree.map(lambda leaf: leaf[index % count], rows))
        if progress is not None:
            # The callback waits for a result of the chunk, so that it tells of work that is done.
            last = jax.tree.leaves(result)[-1].reshape(chunk, -1)[0, 0]
            jax.debug.callback(lambda done, _: progress(int(done)), (index < count).sum(), last)
        return given, result

    _, fitted = jax.jit(functools.partial(jax.lax.scan, fit_chunk))((rows, shared), chunks)
    if progress is not None:
        jax.effects_barrier()  # the last calls may still be on their way
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], fitted)


def fit_images(
    arch: Architecture,
    images: Float[np.ndarray, "images height width"],
    labels: np.ndarray,
    *,
    image_index: np.ndarray,
    seed: int = 0,
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    initialization: network.Initialization = network.near_zero,
    chunk: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Zoo:
    """Fits an INR to every image named in `image_index`, with Adam, full batch.

    Args:
      arch: an INR, like `architecture.siren((2, 32, 32, 1))`.
      images: in [0, 1].
      labels: of the images, [images].
      image_index: [networks], which image each network fits; an image named twice gets two independent fits.
      seed: of all initializations; network i starts from key (seed, i).
      learning_rate: of Adam.
      num_steps, initialization, chunk, progress: as `fit`.

    Returns:
      The zoo, with records loss (mean squared error), psnr (dB, of images in [0, 1]), image_index, label and seed.
    """
    size = images.shape[1:]
    if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images lie in [{images.min()}, {images.max()}]; expected finite numbers in [0, 1].")
    image_index = np.asarray(image_index)
    if image_index.min() < 0 or image_index.max() >= len(images):
        raise ValueError(f"image_index has entries outside of 0..{len(images) - 1}, the images given.")

    def loss_fn(params: Params, target: Array) -> Array:
        return jnp.square(network.render(arch, params, size) - target).mean()

    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(image_index)))
    fitted = fit(
        arch,
        loss_fn,
        jnp.asarray(images, jnp.float32)[image_index],
        keys,
        tx=optax.adam(learning_rate),
        num_steps=num_steps,
        initialization=initialization,
        chunk=chunk,
        progress=progress,
    )
    records = fitted.records | {
        "psnr": -10 * np.log10(np.maximum(fitted.records["loss"], 1e-12)),
        "image_index": image_index,
        "label": np.asarray(labels)[image_index],
        "seed": np.full(len(image_index), seed),
    }
    w0 = arch.layers[0].activation.frequency  # type: ignore[union-attr]
    return Zoo(arch, fitted.params, records, fitted.settings | {"learning_rate": learning_rate, "w0": w0})


def concatenate(zoos: Sequence[Zoo]) -> Zoo:
    """One zoo of several with the same architecture, records and settings.

    Raises:
      ValueError: if there are none, or they differ.
    """
    if not zoos:
        raise ValueError("There are no zoos to concatenate.")
    first = zoos[0]
    for other in zoos[1:]:
        for field in ("arch", "settings"):
            if getattr(other, field) != getattr(first, field):
                raise ValueError(f"The zoos differ in {field}: {getattr(first, field)} and {getattr(other, field)}.")
        if other.records.keys() != first.records.keys():
            raise ValueError(f"The zoos differ in their records: {sorted(first.records)} and {sorted(other.records)}.")
    records = {name: np.concatenate([zoo.records[name] for zoo in zoos]) for name in first.records}
    params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[zoo.params for zoo in zoos])
    return Zoo(first.arch, params, records, first.settings)


def scales(zoo: Zoo) -> tuple[float, ...]:
    """The root mean square of each parameter's entries over the zoo, in the order of `arch.parameters`.

    One positive number a parameter is the same for every neuron: dividing by it keeps every symmetry. A parameter
    that is zero throughout gets 1.
    """

    return tuple(math.sqrt(float(jnp.square(value).mean())) or 1.0 for value in _unpack_stack(zoo))


def save(zoo: Zoo, path: str | os.PathLike[str]) -> None:
    """Writes a zoo as one safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"records/{name}": np.ascontiguousarray(values) for name, values in zoo.records.items()}
    for path, value in architecture.flatten(zoo.params).items():
        arrays["params/" + "/".join(path)] = np.ascontiguousarray(value)
    header = {"format": FORMAT, "arch": json.dumps(zoo.arch.as_json()), "settings": json.dumps(zoo.settings)}
    with io.atomic_path(path, overwrite=True) as written:
        safetensors.numpy.save_file(arrays, written, metadata=header)


def load(path: str | os.PathLike[str]) -> Zoo:
    """Reads a zoo that `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is truncated, foreign, or its networks do not fit its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no zoo there. Fit one with zoo.fit_images and write it with zoo.save.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}). It is truncated or foreign.") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {header.get('format')!r}, expected {FORMAT!r}. It is not a zoo file.")
    leaves, records = {}, {}
    for name, value in arrays.items():
        kind, *path = name.split("/")
        if kind == "records":
            records["/".join(path)] = value
        else:
            leaves[tuple(path)] = jnp.asarray(value)
    params = architecture.unflatten(leaves)
    try:
        arch = architecture.from_json(json.loads(header["arch"]))
        return Zoo(arch, params, records, json.loads(header["settings"]))
    except ValueError as error:  # of JSON, too
        raise ValueError(f"{path}: {error}") from error


# --- private ------------------------------------------------------------------------------------------------------


def _unpack_stack(zoo: Zoo) -> list[Array]:
    return jax.vmap(functools.partial(architecture.unpack, zoo.arch))(zoo.params)
