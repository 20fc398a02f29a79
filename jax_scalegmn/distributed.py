"""Many devices and many processes: meshes, arrays on all devices, rows shared out over them.

Plain JAX: every process runs the same program, `initialize` joins them, and arrays belong to all. What is computed row
by row, like fitting and matching networks, runs on each device by itself and communicates nothing.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

__all__ = [
    "Rows",
    "any_process",
    "check_same",
    "every_process",
    "gather",
    "initialize",
    "is_writer",
    "make_map",
    "mesh",
    "num_devices",
    "place_rows",
    "replicate",
    "shard_rows",
    "take",
]

_DATA = "data"


class Rows(NamedTuple):
    """Rows that are shared out over the devices of a mesh: `shard_rows` makes them.

    Attributes:
      tree: The rows, every array with a leading axis [rows], a multiple of the number of devices: some may be padding,
        which repeats other rows.
      mask: Whether a row is one of the data, [rows]; False for padding.

    >>> import jax.numpy as jnp
    >>> from jax_scalegmn import distributed
    >>> rows = distributed.Rows(jnp.array([3.0, 4.0, 3.0]), jnp.array([True, True, False]))
    >>> int(rows.mask.sum())
    2
    """

    tree: Any
    mask: Bool[Array, " rows"]


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: int = 60
) -> None:
    """Joins this process with the others of the program; where there are none it does nothing.

    On a TPU pod slice, under Slurm, Open MPI or Kubernetes, `jax.distributed` finds the others without arguments.
    Elsewhere every process is told the same coordinator and its own number. To be called before JAX is used; later, a
    call without arguments changes nothing, and one with arguments is an error.

    >>> from jax_scalegmn import distributed
    >>> distributed.initialize()  # nothing else was started: one process

    Args:
      coordinator: The address of process 0, like "10.0.0.1:1234", at a port that is free there.
      processes: How many processes there are.
      process: The number of this one, from 0.
      timeout: For how many seconds to wait for the others.

    Raises:
      RuntimeError: If JAX was used before.
      TimeoutError: If not all processes are there in time.
      ValueError: If some but not all of the first three are given, or the process has no place among them.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given, but {3 - len(missing)} of "
            "coordinator, processes and process; expected all three, or none where the cluster is known."
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}; expected a number from 0 to {processes - 1}.")
    if jax.distributed.is_initialized():
        return
    error = _joined_in_time(lambda: jax.distributed.initialize(coordinator, processes, process), timeout)
    unknown = ("coordinator_address", "must be called before")  # no cluster, or JAX was used before
    if coordinator is None and any(reason in str(error) for reason in unknown):
        return
    if isinstance(error, TimeoutError):
        raise TimeoutError(
            f"{coordinator or 'The cluster'}: after {timeout} seconds not all {processes or ''} processes are there, "
            f"seen from process {process}; start every one of them with the same coordinator, and its own number."
        )
    if error is not None:
        raise error


def is_writer() -> bool:
    """Whether this process writes what is written once, like reports: process 0.

    >>> from jax_scalegmn import distributed
    >>> distributed.is_writer()
    True
    """
    return jax.process_index() == 0


def mesh(axes: Mapping[str, int]) -> Mesh:
    """Arranges devices in a mesh, like {"data": 8} or {"trial": 4, "data": 2}.

    >>> from jax_scalegmn import distributed
    >>> distributed.mesh({"data": 1}).shape["data"]
    1

    Args:
      axes: The number of devices along each axis: "data" for the rows of a batch or a zoo, "trial" for trials. One may
        be -1: all devices that are left.

    Raises:
      ValueError: If an axis has another name or no devices, or if there are not as many devices; over several
        processes, if not all devices are in the mesh.
    """
    sizes, devices = dict(axes), jax.device_count()
    if not sizes or not set(sizes) <= {"trial", _DATA}:
        raise ValueError(f"The mesh has the axes {sorted(sizes)}; expected 'data', 'trial', or both.")
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(
            f"The mesh is {sizes}; expected 1 device or more along each axis, and -1, all that are left, along one at "
            "most."
        )
    if known > devices:
        raise ValueError(
            f"The mesh {sizes} has {known} devices{' or more' if open_axes else ''}, and there "
            f"{'is' if devices == 1 else 'are'} {devices}; expected {devices} at most. Lower its sizes, or give one of "
            "them as -1, all devices that are left."
        )
    sizes |= dict.fromkeys(open_axes, devices // known)
    wanted = math.prod(sizes.values())
    if jax.process_count() > 1 and wanted != devices:
        raise ValueError(
            f"The mesh {dict(axes)} has {wanted} devices of {devices}; expected all of them, since each of the "
            f"{jax.process_count()} processes needs its own in the mesh."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:wanted])


def num_devices(mesh: Mesh | None) -> int:
    """Over how many devices a mesh shares out rows: 1 without a mesh.

    >>> from jax_scalegmn import distributed
    >>> distributed.num_devices(None)
    1

    Args:
      mesh: The mesh.

    Raises:
      ValueError: If it has no axis "data".
    """
    if mesh is None:
        return 1
    if _DATA not in mesh.shape:
        raise ValueError(
            f"The mesh has the axes {sorted(mesh.shape)}; expected 'data', over which rows are shared out. Make it by "
            'distributed.mesh({"data": 8}).'
        )
    return int(mesh.shape[_DATA])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Stores a pytree, like a training state, on every device of a mesh.

    Every process passes the same values.

    >>> import jax
    >>> from jax_scalegmn import distributed
    >>> state = {"w": jax.numpy.arange(3), "key": jax.random.key(0)}
    >>> distributed.replicate(state, distributed.mesh({"data": 1}))["w"].tolist()
    [0, 1, 2]

    Args:
      tree: Arrays of any kind: keys, NumPy arrays, arrays on a device, arrays of a mesh.
      mesh: The devices.

    Returns:
      The pytree, each array whole on every device.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, sharding, None), tree)


def shard_rows(tree: Any, mesh: Mesh) -> Rows:
    """Shares out rows over the devices along the axis "data" of a mesh: each holds ceil(rows / devices) of them.

    Every process passes all rows, and keeps those of its own devices. Where the devices do not divide the number of
    rows, padding follows, which repeats the first rows; none is dropped.

    >>> import numpy as np
    >>> from jax_scalegmn import distributed
    >>> rows = distributed.shard_rows(np.arange(3.0), distributed.mesh({"data": 1}))
    >>> rows.tree.tolist(), rows.mask.tolist()
    ([0.0, 1.0, 2.0], [True, True, True])

    Args:
      tree: Arrays of any kind, as for `replicate`, with a leading axis [rows].
      mesh: The devices.

    Returns:
      The rows with their mask, in order.

    Raises:
      ValueError: If the arrays disagree on the number of rows, or there are none.
    """
    count, devices = _count(tree), num_devices(mesh)
    padded = -(-count // devices) * devices
    sharding = NamedSharding(mesh, PartitionSpec(_DATA))
    return Rows(
        jax.tree.map(lambda leaf: _put(leaf, sharding, padded), tree), _put(np.arange(padded) < count, sharding, None)
    )


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Stores rows of the host where they are computed with: on the devices of a mesh, if these divide their number.

    Otherwise, since JAX knows no arrays of unequal shares, they stay NumPy arrays; `shard_rows` pads them.

    >>> import numpy as np
    >>> from jax_scalegmn import distributed
    >>> distributed.place_rows(np.arange(3.0), distributed.mesh({"data": 1})).tolist()
    [0.0, 1.0, 2.0]

    Args:
      tree: NumPy arrays with a leading axis [rows].
      mesh: The devices; None for the default device.
    """
    if mesh is None:
        return jax.device_put(tree)  # `jnp.asarray` compiles a program for every shape
    return tree if _count(tree) % num_devices(mesh) else shard_rows(tree, mesh).tree


def gather(tree: Any) -> Any:
    """Brings arrays to the host, those of a mesh whole to every process.

    >>> import jax
    >>> from jax_scalegmn import distributed
    >>> distributed.gather({"w": jax.numpy.arange(3)})["w"]
    array([0, 1, 2], dtype=int32)

    Args:
      tree: A pytree of arrays.

    Returns:
      The pytree with NumPy arrays; keys stay keys.
    """

    def one(leaf: Any) -> Any:
        if _is_key(leaf):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def take(tree: Any, index: np.ndarray) -> Any:
    """Rows of arrays of the host, or of keys.

    >>> import numpy as np
    >>> from jax_scalegmn import distributed
    >>> distributed.take(np.array([3.0, 4.0, 5.0]), np.array([2, 0])).tolist()
    [5.0, 3.0]

    Args:
      tree: The arrays, as `gather` returns them, with a leading axis [rows].
      index: The numbers of the rows.
    """
    return jax.tree.map(lambda leaf: _row(leaf, index), tree)


def any_process(value: bool) -> bool:
    """Whether something is true in any process; all processes have to ask.

    >>> from jax_scalegmn import distributed
    >>> distributed.any_process(True)
    True

    Args:
      value: Whether it is in this process.
    """
    return any(every_process(value))


def every_process(value: Any) -> list[Any]:
    """JSON values of all processes, in each of them; all have to ask, and wait for each other.

    >>> from jax_scalegmn import distributed
    >>> distributed.every_process({"seed": 0})
    [{'seed': 0}]

    Args:
      value: What this process says.

    Returns:
      What each says, in the order of their numbers.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(text)))))
    rows = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text)), constant_values=ord(" ")))
    return [json.loads(bytes(row.astype(np.uint8))) for row in np.asarray(rows)]


def check_same(values: Mapping[str, Any], *, what: str = "options") -> None:
    """Checks that all processes have the same values, like the options of a run; all processes have to ask.

    >>> from jax_scalegmn import distributed
    >>> distributed.check_same({"seed": 0})

    Args:
      values: JSON values by name.
      what: What error messages call them.

    Raises:
      ValueError: If they differ, in every process.
    """
    first, *others = every_process(dict(values))
    differences = [
        f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differences:
        shown = [text[:300] for text in differences[:20]]
        shown += [f"and {len(differences) - 20} more"] if len(differences) > 20 else []
        raise ValueError(f"The processes have other {what}: {'; '.join(shown)}. Start all of them by the same command.")


def make_map(fn: Callable[..., Any], mesh: Mesh | None = None, *, rows_at_once: int = 128) -> Callable[..., Any]:
    """A function of one row as one of many, by one compiled program that shares out rows over the devices of a mesh.

    Each device computes its own rows, some at a time, and communicates nothing. The rows and the results are on the
    host; all processes get all results.

    >>> import numpy as np
    >>> from jax_scalegmn import distributed
    >>> double = distributed.make_map(lambda row, factor: factor * row, rows_at_once=2)
    >>> double((np.array([1.0, 2.0, 3.0]),), np.float32(2.0))
    array([2., 4., 6.], dtype=float32)

    Args:
      fn: (one row of each array of rows, whatever all share) -> a pytree of arrays.
      mesh: The devices; None for the default device.
      rows_at_once: The rows that a device computes as one vmapped row; the others follow in the same program.

    Returns:
      (tuple of pytrees of rows [rows, ...], *what all share, progress=None) -> NumPy arrays [rows, ...]. `progress` is
      called with the number of rows that have become ready. It raises ValueError where the arrays disagree on the
      number of rows, or there are none.

    Raises:
      ValueError: If the mesh has no axis "data", or rows_at_once is below 1.
    """
    devices = num_devices(mesh)
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once is {rows_at_once}; expected a number >= 1.")
    program = _make_program(fn, mesh)

    def mapped(rows: tuple[Any, ...], *shared: Any, progress: Callable[[int], None] | None = None) -> Any:
        count = _count(rows)
        share = -(-count // devices)
        size = min(rows_at_once, share)
        rows = gather(rows)
        shared = shared if mesh is None else replicate(shared, mesh)
        groups = []
        # A loop of the host, so that any number of rows is computed by one program; and without a callback, which JAX's
        # cache of compiled programs refuses.
        for first in range(0, share, size):
            left = min(size, share - first)
            # A last group is filled up with rows that are dropped again.
            index = (share * np.arange(devices)[:, None] + first + np.arange(size)).reshape(-1)
            group = take(rows, index % count)
            if mesh is not None:
                group = shard_rows(group, mesh).tree
            results = gather(program(group, shared))
            groups.append(
                jax.tree.map(lambda leaf, left=left: leaf.reshape(devices, size, *leaf.shape[1:])[:, :left], results)
            )
            if progress is not None:
                progress(int((index.reshape(devices, size)[:, :left] < count).sum()))
        return jax.tree.map(lambda *parts: _joined(parts)[:count], *groups)

    return mapped


def _make_program(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """The program of `make_map`: (rows [rows, ...], what all share) -> results [rows, ...], rows divided by devices."""

    def vmapped(rows: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
        return jax.vmap(lambda *row: fn(*row, *shared))(*rows)

    if mesh is None:
        return jax.jit(vmapped)
    specs = (PartitionSpec(_DATA), PartitionSpec())
    return jax.jit(jax.shard_map(vmapped, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(_DATA), check_vma=False))


# --- private ------------------------------------------------------------------------------------------------------


def _joined_in_time(join: Callable[[], None], timeout: int) -> Exception | None:
    """What went wrong, if anything: JAX would not raise an error after its own time, but abort the program."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            join()
        except Exception as error:  # raised by the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    return TimeoutError() if thread.is_alive() else next(iter(errors), None)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _count(tree: Any) -> int:
    """The number of rows, on which all arrays agree."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"The arrays have {sorted(counts)} rows; expected the same number of rows, 1 or more, in each of them."
        )
    return int(next(iter(counts))[0])


def _put(leaf: Any, sharding: NamedSharding, padded: int | None) -> Any:
    """An array with that sharding, its rows repeated from the first one until it has `padded` of them."""
    if _is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding, padded)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return _resharded(leaf, sharding, padded)
    if padded is None and jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)
    if padded is None:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def block(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(padded)
        return values[first:last] if last <= len(values) else values[np.arange(first, last) % len(values)]

    return jax.make_array_from_callback((padded, *values.shape[1:]), sharding, block)


def _resharded(leaf: jax.Array, sharding: NamedSharding, padded: int | None) -> jax.Array:
    """An array of several processes with another sharding."""
    if padded is None or padded == len(leaf):
        return jax.jit(lambda leaf: leaf, out_shardings=sharding)(leaf)
    index = np.arange(padded) % len(leaf)
    return jax.jit(lambda leaf: leaf[index], out_shardings=sharding)(leaf)


def _row(leaf: Any, index: np.ndarray) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(np.asarray(jax.random.key_data(leaf))[index], impl=jax.random.key_impl(leaf))
    return leaf[index]


def _joined(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """Groups [devices, rows of the group, ...] as [rows, ...], those of a device after each other."""
    whole = np.concatenate(parts, 1)
    return whole.reshape(-1, *whole.shape[2:])
