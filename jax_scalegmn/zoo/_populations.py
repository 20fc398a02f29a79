"""Zoos: thousands of networks trained at once in one compiled program, with a record of where each comes from.

`fit` trains any architecture on any data; `fit_images` fits INRs to images. A zoo is stored as one safetensors file:
arrays and JSON, which cannot run code.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_scalegmn import _bounded, architecture, distributed, io, network
from jax_scalegmn.architecture import Activation, Architecture
from jax_scalegmn.types import Key, Params

_FORMAT = "jax_scalegmn.zoo/1"


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Many networks of one architecture.

    A slice, an array of indices or a mask picks networks: `zoo[:100]` is a zoo, too.

    Attributes:
      arch: The networks' architecture.
      params: The networks' weights, every array with a leading axis [networks].
      records: What is known of each network, arrays with a leading axis [networks]: loss, seed, ...; of INRs also psnr
        in dB, image_index and label.
      settings: What all networks share: initialization, steps, learning_rate, ...

    Raises:
      ValueError: If the params do not fit the architecture, are not finite, or a record has another length.

    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> params = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 5))
    >>> zoo = sg.Zoo(arch, params, {"seed": np.arange(5)}, {})
    >>> len(zoo), zoo[zoo.records["seed"] > 2].records["seed"].tolist()
    (5, [3, 4])
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
    networks_at_once: int = 128,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> Zoo:
    """Trains one network for every row of `data`, all in one compiled program.

    Every step is one full-batch update on the network's own row of data.

    Args:
      arch: The architecture of all networks.
      loss_fn: (params of one network, its row of data) -> scalar loss.
      data: A pytree whose arrays have a leading axis [networks].
      keys: Random keys [networks], each for one initialization.
      tx: The optimizer.
      num_steps: The number of updates of every network.
      initialization: `network.standard`, `network.near_zero`, or a function with that signature.
      networks_at_once: The networks that are trained as one vmapped network; the others follow in the same program.
        Choose as many as the caches (CPU) or the memory (accelerator) hold.
      progress: A function that is called with the number of networks that have become ready.
      mesh: Devices (`distributed.mesh`) over whose axis "data" the networks are shared out, each trained on one device;
        bit for bit as without where every device has networks_at_once of them or more, to rounding where it has fewer.
        They stay on the devices where these divide their number; otherwise they are NumPy arrays, the same in every
        process. None: one device.

    Returns:
      The zoo, with the record loss: each network's loss after the last update.

    Raises:
      ValueError: If data and keys disagree on the number of networks, or a network diverged.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((1, 4, 1), "tanh")
    >>> def loss_fn(params, slope):
    ...     return jnp.square(sg.network.apply(arch, params, jnp.ones(1)) - slope).mean()
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> zoo = sg.zoo.fit(arch, loss_fn, jnp.array([0.1, 0.2, 0.3]), keys, tx=optax.adam(0.1), num_steps=50)
    >>> len(zoo), bool((zoo.records["loss"] < 0.01).all())
    (3, True)
    """
    fit_one = _fitter(arch, loss_fn, tx, num_steps, initialization)
    params, losses = fit_each(fit_one, (data, keys), networks_at_once=networks_at_once, progress=progress, mesh=mesh)
    return _fitted(arch, params, losses, num_steps, initialization, mesh)


def fit_each(
    fit_one: Callable[..., Any],
    rows: tuple[Any, ...],
    *shared: Any,
    networks_at_once: int = 128,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Trains a network for every row by one compiled program, called for one group of vmapped networks after the other.

    Args:
      fit_one: (one row of each of `rows`, all of `shared`) -> the trained network and what is known of it.
      rows: Pytrees whose arrays have a leading axis [networks].
      shared: Pytrees that are the same for all networks, like images.
      networks_at_once: As in `fit`.
      progress: As in `fit`.
      mesh: As in `fit`.

    Returns:
      What `fit_one` returns, NumPy arrays with a leading axis [networks].

    Raises:
      ValueError: If the rows disagree on the number of networks, or there are none, or networks_at_once is below 1.
    """
    _check_rows(rows, networks_at_once)
    return distributed.make_map(fit_one, mesh, rows_at_once=networks_at_once)(rows, *shared, progress=progress)


def fit_images(
    arch: Architecture,
    images: Float[np.ndarray, "images height width *channels"],
    labels: np.ndarray,
    *,
    image_index: np.ndarray,
    seed: int = 0,
    first: int = 0,
    learning_rate: float = 1e-3,
    num_steps: int = 1000,
    initialization: network.Initialization = network.near_zero,
    networks_at_once: int = 128,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> Zoo:
    """Fits an INR to every image named in `image_index`, with Adam on all pixels.

    The loss is the mean squared error of the image that the INR draws (`network.render`); psnr = -10 log10(loss).

    Args:
      arch: An INR with one output per channel, like `sg.siren((2, 32, 32, 1))` for gray images.
      images: Pixels in [0, 1]: [images, height, width] for one channel, or [images, height, width, channels].
      labels: The images' labels, [images].
      image_index: The image that each network fits, [networks]. An image named twice gets two independent fits.
      seed: The seed of all initializations; network i starts from fold_in(key(seed), first + i).
      first: The number of the first network: a zoo that is fitted in several calls, each with the number where it goes
        on, has the networks of one call.
      learning_rate: The learning rate of Adam.
      num_steps: The number of updates of every network.
      initialization: As in `fit`.
      networks_at_once: As in `fit`.
      progress: As in `fit`.
      mesh: As in `fit`.

    Returns:
      The zoo, with records loss (mean squared error), psnr (dB, for pixels in [0, 1]), image_index, label and seed.

    Raises:
      ValueError: If pixels are outside of [0, 1], image_index names an image that does not exist, the INR has not one
        output per channel, or a network diverged.

    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> images = np.full((2, 4, 4, 3), 0.5)  # two gray color images
    >>> arch = sg.siren((2, 4, 3))
    >>> zoo = sg.zoo.fit_images(arch, images, np.array([7, 8]), image_index=np.array([0, 1, 1]), num_steps=3)
    >>> len(zoo), zoo.records["label"].tolist()
    (3, [7, 8, 8])
    """
    images, image_index = np.asarray(images), np.asarray(image_index)
    _check_images(arch, images, image_index)
    keys = _keys_of_rows(jax.random.key(seed), first + np.arange(len(image_index)))
    rows = np.asarray(images, np.float32)[image_index], keys
    _check_rows(rows, networks_at_once)
    fit_rows = _image_fits(arch, float(learning_rate), num_steps, initialization, mesh, networks_at_once)
    params, losses = fit_rows(rows, progress=progress)
    fitted = _fitted(arch, params, losses, num_steps, initialization, mesh)
    records = fitted.records | {
        "psnr": -10 * np.log10(np.maximum(fitted.records["loss"], 1e-12)),
        "image_index": image_index,
        "label": np.asarray(labels)[image_index],
        "seed": np.full(len(image_index), seed),
    }
    settings = fitted.settings | {"learning_rate": learning_rate, "w0": _frequency(arch)}
    return Zoo(arch, fitted.params, records, settings)


def concatenate(zoos: Sequence[Zoo]) -> Zoo:
    """Joins zoos with the same architecture, settings and record names into one.

    Args:
      zoos: The zoos, one or more.

    Raises:
      ValueError: If there are none, or they differ.

    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> params = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 5))
    >>> zoo = sg.Zoo(arch, params, {"seed": np.arange(5)}, {})
    >>> sg.zoo.concatenate([zoo[3:], zoo[:3]]).records["seed"].tolist()
    [3, 4, 0, 1, 2]
    """
    if not zoos:
        raise ValueError("There are no zoos to concatenate; expected one or more.")
    first = zoos[0]
    for other in zoos[1:]:
        for field in ("arch", "settings"):
            if getattr(other, field) != getattr(first, field):
                raise ValueError(
                    f"The zoos differ in {field}: {getattr(first, field)} and {getattr(other, field)}. Concatenate "
                    "parts of one zoo."
                )
        if other.records.keys() != first.records.keys():
            raise ValueError(
                f"The zoos differ in their records: {sorted(first.records)} and {sorted(other.records)}. Drop those "
                "that one of them lacks."
            )
    records = {name: np.concatenate([zoo.records[name] for zoo in zoos]) for name in first.records}
    params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[zoo.params for zoo in zoos])
    return Zoo(first.arch, params, records, first.settings)


def scales(zoo: Zoo) -> tuple[float, ...]:
    """The root mean square of each parameter's entries over all networks, for `Encoder(scales=...)`.

    scale_p = sqrt(mean over networks and entries of p^2)

    One positive number per parameter is the same for all neurons, so dividing by it keeps every symmetry.

    Args:
      zoo: The networks.

    Returns:
      One number for each of `zoo.arch.parameters`, in their order; 1 for a parameter that is zero throughout.

    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 1))
    >>> params = {"Dense_0": {"kernel": 2 * np.ones((5, 2, 1)), "bias": np.zeros((5, 1))}}
    >>> sg.zoo.scales(sg.Zoo(arch, params, {}, {}))
    (2.0, 1.0)
    """
    values = jax.vmap(functools.partial(architecture.unpack, zoo.arch))(zoo.params)
    return tuple(math.sqrt(float(jnp.square(value).mean())) or 1.0 for value in values)


def save(zoo: Zoo, path: str | os.PathLike[str]) -> None:
    """Writes a zoo as one safetensors file, completely or not at all. It replaces a file that exists.

    A zoo on devices of several processes is written by process 0; all of them call this.

    Args:
      zoo: The networks.
      path: The file; its folder is made if it does not exist.

    >>> import pathlib, tempfile
    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> params = {"Dense_0": {"kernel": np.ones((5, 2, 1)), "bias": np.zeros((5, 1))}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "zoo.safetensors"
    >>> sg.zoo.save(sg.Zoo(sg.mlp((2, 1)), params, {"seed": np.arange(5)}, {}), path)
    >>> len(sg.zoo.load(path))
    5
    """
    path = Path(path)
    params, leaves = distributed.gather(zoo.params), jax.tree.leaves(zoo.params)
    if not distributed.is_writer() and any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"records/{name}": _storable(name, values) for name, values in zoo.records.items()}
    for keys, value in architecture.flatten(params).items():
        arrays["params/" + "/".join(keys)] = np.ascontiguousarray(value)
    header = {"format": _FORMAT, "arch": json.dumps(zoo.arch.as_json()), "settings": json.dumps(zoo.settings)}
    header["sha256"] = _checksum(arrays, header)
    with io.atomic_path(path, overwrite=True) as scratch:
        safetensors.numpy.save_file(arrays, scratch, metadata=header)


def load(path: str | os.PathLike[str]) -> Zoo:
    """Reads a zoo that `save` wrote.

    Args:
      path: The file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is truncated, foreign, or its networks do not fit its architecture.

    >>> from jax_scalegmn import zoo
    >>> zoo.load("nowhere.safetensors")
    Traceback (most recent call last):
    ...
    FileNotFoundError: nowhere.safetensors: there is no such zoo. Fit one with zoo.fit_images, save it with zoo.save.
    """
    path = Path(path)
    contents = _contents(path, io.tensors.read)
    with _naming(f"{path}: "):
        # jnp.asarray would make one more copy on the way. Nobody else has these arrays, so that they may be shared.
        return Zoo(contents.arch, jax.device_put(contents.params), contents.records, contents.settings)


def parts(path: str | os.PathLike[str], size: int = 1024) -> Iterator[Zoo]:
    """Reads a zoo that `save` wrote part by part: it may be larger than the memory.

    Args:
      path: The file. It must not change until the last part is read.
      size: The number of networks of a part; the last may have fewer.

    Returns:
      An iterator of zoos, in order.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If `size` is below 1, or the file is truncated or foreign; while iterating, if a part's networks are
        not finite.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> params = {"Dense_0": {"kernel": np.ones((5, 2, 1)), "bias": np.zeros((5, 1))}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "zoo.safetensors"
    >>> sg.zoo.save(sg.Zoo(sg.mlp((2, 1)), params, {"seed": np.arange(5)}, {}), path)
    >>> [part.records["seed"].tolist() for part in sg.zoo.parts(path, size=2)]
    [[0, 1], [2, 3], [4]]
    """
    path = Path(path)
    if size < 1:
        raise ValueError(f"size is {size}; expected 1 or more networks for each part of {path}.")
    contents = _contents(path, io.tensors.mapped)
    counts = {leaf.shape[:1] for leaf in (*jax.tree.leaves(contents.params), *contents.records.values())}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"{path}: its arrays have {sorted(counts)[:10]} rows; expected one row for each network.")
    ((count,),) = counts

    def each() -> Iterator[Zoo]:
        for first in range(0, count, size):
            params, records = jax.tree.map(
                lambda leaf, first=first: np.array(leaf[first : first + size]), (contents.params, contents.records)
            )
            with _naming(f"{path}: of the networks from {first} on, "):
                part = Zoo(contents.arch, jax.tree.map(jnp.asarray, params), records, contents.settings)
            yield part

    return each()


# --- private ------------------------------------------------------------------------------------------------------


def _fitter(
    arch: Architecture,
    loss_fn: Callable[[Params, Any], Array],
    tx: optax.GradientTransformation,
    num_steps: int,
    initialization: network.Initialization,
) -> Callable[[Any, Key], tuple[Params, Array]]:
    """(a network's data, its key) -> the trained network and its loss."""
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

    return fit_one


@functools.lru_cache(maxsize=8)
def _image_fits(
    arch: Architecture,
    learning_rate: float,
    num_steps: int,
    initialization: network.Initialization,
    mesh: Mesh | None,
    networks_at_once: int,
) -> Callable[..., Any]:
    """((images, keys), progress=) -> the trained networks and their losses: one program for all parts of a zoo."""

    def loss_fn(params: Params, target: Array) -> Array:
        return jnp.square(
            network.render(arch, params, (target.shape[0], target.shape[1])).reshape(target.shape) - target
        ).mean()

    fit_one = _fitter(arch, loss_fn, optax.adam(learning_rate), num_steps, initialization)
    return distributed.make_map(fit_one, mesh, rows_at_once=networks_at_once)


@jax.jit
def _keys_of_rows(key: Key, rows: Array) -> Key:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows)


def _check_rows(rows: tuple[Any, ...], networks_at_once: int) -> None:
    counts = {len(leaf) for leaf in jax.tree.leaves(rows)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"The rows disagree on how many networks to fit, or there are none: {sorted(counts)}.")
    if networks_at_once < 1:
        raise ValueError(f"networks_at_once is {networks_at_once}; expected a number >= 1.")


def _fitted(
    arch: Architecture,
    params: Params,
    losses: np.ndarray,
    num_steps: int,
    initialization: network.Initialization,
    mesh: Mesh | None,
) -> Zoo:
    """The zoo of networks of which none diverged."""
    if not np.isfinite(losses).all():
        raise ValueError(
            f"{int((~np.isfinite(losses)).sum())} of {len(losses)} networks diverged (loss NaN or infinite), the first "
            f"in row {int(np.argmin(np.isfinite(losses)))}. Lower the learning rate."
        )
    params = distributed.place_rows(params, mesh)
    return Zoo(arch, params, {"loss": losses}, {"steps": num_steps, "initialization": initialization.__name__})


class _Contents(NamedTuple):
    """What a zoo's file holds, with NumPy arrays."""

    arch: Architecture
    params: dict[str, Any]
    records: dict[str, np.ndarray]
    settings: dict[str, Any]


def _contents(path: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> _Contents:
    """The contents of a zoo's file, whose checksum is right."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such zoo. Fit one with zoo.fit_images, save it with zoo.save.")
    header = io.tensors.metadata(path)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: format is {_bounded.short(header.get('format'))}, expected {_FORMAT!r}. Pass a file that zoo.save"
            " wrote."
        )
    missing = [name for name in ("arch", "settings") if name not in header]
    if missing:
        raise ValueError(f"{path}: its header has no {' or '.join(missing)}, which zoo.save writes. Write it again.")
    arrays = read(path)
    if "sha256" in header and header["sha256"] != _checksum(arrays, header):  # files of older versions have none
        raise ValueError(f"{path}: this is not what zoo.save wrote, by its checksum. It is damaged: write it again.")
    with _naming(f"{path}: "):
        arch = architecture.from_json(_bounded.read_json(header["arch"], what="arch"))
        settings = _bounded.read_json(header["settings"], what="settings")
        return _Contents(arch, _params(arch, arrays), _records(arrays), settings)


def _storable(name: str, values: np.ndarray) -> np.ndarray:
    """A record in the byte order of the file, which is that of the machine."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(
            f"zoo.records[{name!r}] is {values.dtype}; expected numbers or truth values. Store a number for each name, "
            "and the names in the settings."
        )
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False))


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Errors of what a file holds begin with its name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}{_bounded.one_line(error)}") from error


def _params(arch: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The params among the tensors of a file."""
    leaves = {tuple(name.split("/")[1:]): value for name, value in arrays.items() if name.startswith("params/")}
    others = [name for name in arrays if not name.startswith(("params/", "records/"))]
    missing = [architecture.describe(path) for path in arch.array_shapes if path not in leaves]
    additional = others + [architecture.describe(path) for path in leaves if path not in arch.array_shapes]
    if missing or additional:
        which, how = (missing, "is missing") if missing else (additional, "is additional")
        raise ValueError(f"{which[0][:200]} {how}; {arch.name!r} expects its params, and records.")
    return architecture.unflatten(leaves)


def _records(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    records = {name.removeprefix("records/"): value for name, value in arrays.items() if name.startswith("records/")}
    without = [name for name, value in records.items() if not value.ndim]
    if without:
        raise ValueError(f"records {_bounded.short(without)} have no axis; expected [networks].")
    return records


def _checksum(arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """The checksum of all arrays with their names, and of what the header says of them."""
    return io.checksum(arrays, json.dumps([sorted(arrays), header.get("arch"), header.get("settings")]))


def _check_images(arch: Architecture, images: np.ndarray, image_index: np.ndarray) -> None:
    if not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Pixels are from {images.min()} to {images.max()}; expected finite numbers in [0, 1]. Divide 0..255 by "
            "255."
        )
    channels, outputs = images.shape[3:] or (1,), arch.neuron_layers[-1].width
    if images.ndim not in (3, 4) or channels != (outputs,):
        raise ValueError(
            f"images have shape {images.shape}; {arch.name!r} has {outputs} outputs and expects [images, height, "
            f"width{f', {outputs}' if outputs > 1 else ''}]. Give the INR one output per channel."
        )
    if image_index.min() < 0 or image_index.max() >= len(images):
        raise ValueError(f"image_index has entries outside of 0..{len(images) - 1}, the images given.")


def _frequency(arch: Architecture) -> float:
    """A SIREN's w0: the factor before the first activation, 1 where there is none."""
    activation = getattr(arch.layers[0], "activation", None)
    return activation.frequency if isinstance(activation, Activation) else 1.0
