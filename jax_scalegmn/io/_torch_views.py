"""The tensors of PyTorch's pickles: which entries of which storage they are, and of which dtype."""

import math
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_scalegmn.io._inert_pickle import Global, Object

# The storages that have a name of their own, and their dtypes; the other dtypes are in `DTYPES`.
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
# Dtypes whose tensors name them next to an untyped storage, as torch._utils._rebuild_tensor_v3 takes them.
DTYPES = {
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
    "float8_e5m2": np.dtype(jnp.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(jnp.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(jnp.float8_e5m2fnuz),
}
_BYTES = np.dtype(np.uint8)
_QUANTIZED = {"QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1}
_MAX_AXES = 32


class Storage(NamedTuple):
    """The stored numbers that tensors are views of.

    Attributes:
      type: The name of PyTorch's class, like FloatStorage.
      key: The storage's name in the file.
      device: The device that it was saved from, like "cuda:0".
      length: How many numbers it has.
      start: Where this storage begins in the one of that key; 0 but for views of storages in old files.
    """

    type: str
    key: str
    device: str
    length: int
    start: int = 0

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of its numbers; bytes where the tensors name their dtype, None if it cannot be read."""
        return _BYTES if self.type in ("UntypedStorage", "_UntypedStorage") else STORAGES.get(self.type)

    @property
    def itemsize(self) -> int | None:
        return self.dtype.itemsize if self.dtype else _QUANTIZED.get(self.type)


class View(NamedTuple):
    """A tensor: entries of a storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class Unreadable(NamedTuple):
    """A tensor that is refused if it is needed, and why. Its size is unknown: it may be a weight."""

    cause: str
    size: tuple[int, ...] = (0, 0)


def storage_of(pid: Any) -> Any:
    """Reads what a checkpoint's pickle refers to: a storage, or, before PyTorch 1.6, the class of a module."""
    match pid:
        case ("storage", Global(name=str(kind)), str(key), str(device), int(length), *rest):
            match rest:
                case [(str(), int(start), int(viewed))]:  # before PyTorch 1.6: a part of a storage
                    return Storage(kind, key, device, viewed, start)
            return Storage(kind, key, device, length)
        case ("module", Global() as name, *_):
            return name
    raise ValueError("it refers to data of an unknown kind, expected a storage")


def tensor_of(node: Any) -> View | Unreadable | None:
    """The tensor that PyTorch would build for a node of a pickle, None if the node is none."""
    for _ in range(4):  # a parameter of a tensor subclass of a tensor
        if not isinstance(node, Object) or not isinstance(node.call, Global) or not isinstance(node.args, tuple):
            return None
        if node.call.module not in ("torch._utils", "torch._tensor", "torch.nn.parameter", "torch"):
            return None
        match node.call.name, node.args:
            case (("_rebuild_parameter" | "_rebuild_parameter_with_state" | "Parameter" | "Buffer"), (data, *_)):
                node = data
            case "_rebuild_from_type_v2", (Global() as build, _, tuple(args), *_):
                node = Object(build, args)
            case name, args:
                return _rebuilt(name, args)
    return None


def _rebuilt(name: str, args: tuple[Any, ...]) -> View | Unreadable | None:
    match name, args:
        case (("_rebuild_tensor" | "_rebuild_tensor_v2"), (Storage() as storage, offset, size, stride, *_)):
            return _view(storage, storage.dtype, offset, size, stride)
        case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, Global(name=dtype), *_):
            named = DTYPES.get(dtype) or _BY_TORCH_NAME.get(dtype)
            return _view(storage, named, offset, size, stride) if named else Unreadable(f"of dtype {dtype[:50]}")
    if not name.startswith("_rebuild") or "tensor" not in name:
        return None
    kinds = {"sparse": "sparse", "qtensor": "quantized", "meta": "on the meta device: it has no entries"}
    kind = next((kind for part, kind in kinds.items() if part in name), "of a kind that is not read")
    return Unreadable(f"{kind} (torch._utils.{name[:60]})")


_BY_TORCH_NAME = {dtype.name: dtype for dtype in STORAGES.values()}


def _view(storage: Storage, dtype: np.dtype | None, offset: Any, size: Any, stride: Any) -> View | Unreadable:
    if dtype is None:
        return Unreadable(f"quantized or of an unknown kind (torch.{storage.type[:60]})")
    if storage.device.startswith("meta"):
        return Unreadable("on the meta device: it has no entries")
    axes = [tuple(axis) if isinstance(axis, (tuple, list)) else None for axis in (_plain(size), _plain(stride))]
    if None in axes or any(type(n) is not int for n in (offset, *axes[0], *axes[1])):  # type: ignore[misc]
        return Unreadable("damaged: its offset, size or stride are not whole numbers")
    return View(storage, dtype, offset, *axes)  # type: ignore[arg-type]


def _plain(size: Any) -> Any:
    """The tuple within torch.Size."""
    if isinstance(size, Object) and isinstance(size.args, tuple) and len(size.args) == 1:
        return size.args[0]
    return size


def length_in_entries(view: View) -> int:
    """The number of the view's own entries that its storage holds."""
    return view.storage.length * (view.storage.itemsize or 1) // view.dtype.itemsize


def check(name: str, view: View) -> None:
    """Checks that a tensor lies within its storage and repeats none of it.

    Raises:
      ValueError: If it does not.
    """
    numbers, length = (view.offset, *view.size, *view.stride), length_in_entries(view)
    sound = len(view.size) == len(view.stride) <= _MAX_AXES and all(0 <= n < 2**62 for n in numbers)
    if sound:
        count = math.prod(view.size)
        last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        sound = count == 0 or (count <= length and last < length)
    if not sound:
        offset, size, stride = (str(n)[:80] for n in (view.offset, view.size[:9], view.stride[:9]))
        raise ValueError(
            f"tensor {name[:100]!r} has offset {offset}, size {size} and stride {stride}, which its storage of "
            f"{length} entries does not hold (an expanded tensor needs .contiguous() before it is saved)"
        )


def entries(view: View, raw: np.ndarray, byteorder: str, *, is_kept: bool) -> np.ndarray:
    """The tensor's entries.

    Args:
      view: The tensor, which `check` has checked.
      raw: The bytes of its storage.
      byteorder: "little" or "big".
      is_kept: Whether the storage may stay in memory: a tensor of neighboring entries is then no copy of them.
    """
    dtype = view.dtype
    flat = raw[: length_in_entries(view) * dtype.itemsize]
    if len(flat) != length_in_entries(view) * dtype.itemsize:  # what follows trusts it
        raise ValueError("a storage has fewer bytes than its tensors expect")
    if math.prod(view.size) == 0:
        return np.empty(view.size, dtype)
    first = flat[view.offset * dtype.itemsize :]
    if is_kept and byteorder == sys.byteorder and _is_contiguous(view):
        return first[: view.nbytes].view(dtype).reshape(view.size)
    if byteorder != sys.byteorder:
        width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = np.ascontiguousarray(flat.reshape(-1, width)[:, ::-1]).reshape(-1)
        first = flat[view.offset * dtype.itemsize :]
    steps = [*(step * dtype.itemsize for step in view.stride), 1]  # in bytes: NumPy has no strides of float8
    copy = np.lib.stride_tricks.as_strided(first, (*view.size, dtype.itemsize), steps).copy()
    return copy.view(dtype).reshape(view.size)


def shared(views: dict[str, View]) -> tuple[tuple[str, ...], ...]:
    """The names of the tensors that have entries in common, in groups of two or more; the tensors are checked."""
    by_storage: dict[str, list[tuple[int, int, str]]] = {}
    for name, view in views.items():
        if math.prod(view.size):
            first, last = _extent(view)
            by_storage.setdefault(view.storage.key, []).append((first, last, name))
    groups: list[list[str]] = []
    for extents in by_storage.values():
        for cluster in _clusters(sorted(extents)):
            if len(cluster) > 1:
                groups += _overlapping({name: views[name] for name in cluster})
    order = {name: place for place, name in enumerate(views)}
    return tuple(sorted((tuple(sorted(group, key=order.__getitem__)) for group in groups), key=lambda g: order[g[0]]))


def _is_contiguous(view: View) -> bool:
    step = 1
    for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _extent(view: View) -> tuple[int, int]:
    """The first byte of the view in its storage, and the byte after its last one."""
    first = view.storage.start * (view.storage.itemsize or 1) + view.offset * view.dtype.itemsize
    steps = sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    return first, first + (steps + 1) * view.dtype.itemsize


def _clusters(extents: list[tuple[int, int, str]]) -> list[list[str]]:
    """The names in sorted extents, split where nothing overlaps."""
    clusters: list[list[str]] = []
    end = -1
    for first, last, name in extents:
        if first >= end:
            clusters.append([])
        clusters[-1].append(name)
        end = max(end, last)
    return clusters


def _overlapping(views: dict[str, View]) -> list[list[str]]:
    """The groups among views whose extents overlap: all, if they have no gaps; else each is painted into a map."""
    extents = [_extent(view) for view in views.values()]
    if all(view.nbytes == last - first for view, (first, last) in zip(views.values(), extents, strict=True)):
        return [list(views)]
    begin, end = min(first for first, _ in extents), max(last for _, last in extents)
    unit = math.gcd(*(number for view in views.values() for number in (view.dtype.itemsize, _extent(view)[0] - begin)))
    owners = np.full((end - begin) // unit, -1, np.min_scalar_type(-len(views)))
    group = list(range(len(views)))
    for index, (view, (first, _)) in enumerate(zip(views.values(), extents, strict=True)):
        width = view.dtype.itemsize // unit
        steps = [step * width * owners.itemsize for step in (*view.stride, 0)]
        steps[-1] = owners.itemsize
        painted = np.lib.stride_tricks.as_strided(owners[(first - begin) // unit :], (*view.size, width), steps)
        is_met = np.zeros(len(views) + 1, bool)
        is_met[painted] = True  # the last place is that of no owner, -1
        for other in np.flatnonzero(is_met[:-1]):
            old, new = group[other], group[index]
            if old != new:
                group = [new if member == old else member for member in group]
        painted[...] = index
    found = [[name for name, member in zip(views, group, strict=True) if member == g] for g in dict.fromkeys(group)]
    return [members for members in found if len(members) > 1]
