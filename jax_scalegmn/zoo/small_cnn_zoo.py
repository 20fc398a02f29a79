"""The Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448), read and written: one matrix and two tables.

Nothing is downloaded, and no file can run code.
"""

import collections
import contextlib
import csv
import gzip
import itertools
import math
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, architecture, io
from jax_scalegmn.architecture import Architecture, Conv
from jax_scalegmn.zoo import _populations

__all__ = ["load", "save"]

_FILES = {"weights": "weights.npy", "metrics": "metrics.csv.gz", "layout": "layout.csv"}
_LAYOUT = ("varname", "start_idx", "end_idx", "size", "shape")
_ACTIVATION = "config.activation"
_LONGEST_NUMBER = 100  # letters
_MOST_EMPTY = 1000  # lines of a table
_ROWS_AT_ONCE = 4096  # rows held in memory while a file is read


def load(
    files: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    activation: str,
    part: str | None = None,
    step: int | None = 86,
    index_file: str | os.PathLike[str] | None = None,
    finite_only: bool = False,
) -> _populations.Zoo:
    """Reads the networks of one activation from the Small CNN Zoo (Unterthiner et al. 2020, arXiv 2002.11448).

    The zoo's convolutions have strides 2 and no padding, and global mean pooling leads to the dense head; channels,
    kernel sizes and outputs follow from layout.csv, (1, 16, 16, 16) to 10 as published.

    Parts are those of arXiv 2302.14040 and 2406.10685. Take the rows in the order of the index file, of these the ones
    of `step`. The second half is for testing; the first half is shuffled by random.Random(0) and divided 80 to 20 into
    training and validation. The other activations are left out last. The published index files begin with a line 0,
    which is a header: it counts in this division, as published, and its network is not read twice.

    Args:
      files: The folder with weights.npy [rows, numbers of a network], metrics.csv.gz (one line per row, with the column
        config.activation) and layout.csv; or the paths of "weights", "metrics" and "layout".
      activation: The networks' activation, like "relu" or "tanh".
      part: "train", "validation" or "test"; None for all.
      step: The epoch after which the networks were saved (the column step); None for all, so that the parts contain one
        network at different epochs.
      index_file: The order of the rows, one number per line, like the published cifar10_split.csv; None for that of the
        file.
      finite_only: Leave out networks with a NaN or an infinity. Parts are divided before that.

    Returns:
      The zoo. Its records are the columns of numbers and of truth values (int64, float64, bool; empty cells are NaN),
      its settings source, part, activation, step and left_out, the number of networks that `finite_only` left out. Only
      the rows of these networks are read from weights.npy.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is damaged or foreign, holds Python objects, or does not fit the others; if no network has
        that step and activation; or if one has a NaN and `finite_only` is not set.

    >>> import pathlib, tempfile
    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.cnn((1, 2, 3), 2)
    >>> params = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 4))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> cnns = sg.Zoo(arch, params, {"step": np.array([40, 86, 40, 86])}, {})
    >>> sg.zoo.small_cnn_zoo.save(folder, cnns)
    >>> len(sg.zoo.small_cnn_zoo.load(folder, activation="relu", step=86))
    2
    """
    if part not in (None, "train", "validation", "test"):
        raise ValueError(f"part is {part!r}; expected 'train', 'validation', 'test' or None.")
    paths = _paths(files)
    weights = _open_weights(paths["weights"])
    arch, slots = _read_layout(paths["layout"], weights.shape[1], activation)
    activations, metrics = _read_metrics(paths["metrics"], [] if step is None else ["step"], len(weights))
    _check_counts(paths, len(weights), len(activations))
    order = np.arange(len(weights)) if index_file is None else _read_index(Path(index_file), len(weights))
    steps = None if step is None else metrics["step"]
    rows = _select(paths["metrics"], order, activations, steps, activation=activation, part=part, step=step)
    matrix, finite = _read_rows(paths["weights"], weights, rows, finite_only=finite_only)
    if not finite.any():
        raise ValueError(
            f"{paths['weights']}: none of {len(rows)} networks with activation {activation!r}, step {step} and part "
            f"{part!r} is left; expected one or more. Choose another part, or a larger zoo."
        )
    if not finite.all():
        matrix, rows = matrix[finite], rows[finite]
    values = [jnp.asarray(matrix[:, slot.start : slot.end].reshape(-1, *slot.shape)) for slot in slots]
    settings = {
        "source": str(paths["weights"].parent),
        "part": part,
        "activation": activation,
        "step": step,
        "left_out": int((~finite).sum()),
    }
    records = {name: column[rows] for name, column in metrics.items()}
    return _populations.Zoo(arch, architecture.pack(arch, values), records, settings)


def save(folder: str | os.PathLike[str], cnns: _populations.Zoo, *, overwrite: bool = False) -> None:
    """Writes a zoo of CNNs as the three files of the Small CNN Zoo, from which `load` reads the same bits.

    The records become columns; the settings are not written. Load a zoo without the record step with step=None. The
    folder is replaced as a whole, completely or not at all. Where it holds other files, its three files are replaced
    one by one: a program that is killed meanwhile leaves no weights.npy, so that half of two zoos is never taken for
    one.

    Args:
      folder: The folder for weights.npy, metrics.csv.gz and layout.csv; it is made if it does not exist.
      cnns: Networks of an `architecture.cnn` with strides 2, no padding and global mean pooling.
      overwrite: Replace these files if they exist.

    Raises:
      FileExistsError: If one of the files exists and `overwrite` is not set.
      ValueError: If the format cannot hold the architecture, a record or the precision.

    >>> import pathlib, tempfile
    >>> import jax, numpy as np
    >>> import jax_scalegmn as sg
    >>> arch = sg.cnn((1, 2, 3), 2)
    >>> params = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 4))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> sg.zoo.small_cnn_zoo.save(folder, sg.Zoo(arch, params, {"test_accuracy": np.ones(4)}, {}))
    >>> sorted(path.name for path in folder.iterdir())
    ['layout.csv', 'metrics.csv.gz', 'weights.npy']
    """
    folder = Path(folder)
    columns = _columns(cnns, _cnn_activation(cnns.arch))
    matrix, layout = _matrix(cnns)
    present = [name for name in _FILES.values() if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(f"{folder}: the files {present} of a zoo exist already. Pass overwrite=True.")
    with contextlib.ExitStack() as stack:
        if _is_replaceable(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(io.atomic_path(folder, overwrite=overwrite))
            scratch.mkdir()
            _write({kind: scratch / name for kind, name in _FILES.items()}, matrix, layout, columns)
            return
        folder.mkdir(exist_ok=True)
        paths = {kind: folder / name for kind, name in _FILES.items()}  # entered first, the weights are in place last
        written = {k: stack.enter_context(io.atomic_path(path, overwrite=overwrite)) for k, path in paths.items()}
        _write(written, matrix, layout, columns)
        if overwrite and paths["weights"].exists():
            shutil.copymode(paths["weights"], written["weights"])
            paths["weights"].unlink()


# --- private ------------------------------------------------------------------------------------------------------


def _write(
    written: Mapping[str, Path], matrix: np.ndarray, layout: Sequence[Sequence[Any]], columns: Mapping[str, Any]
) -> None:
    np.save(written["weights"], matrix, allow_pickle=False)
    with written["layout"].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([_LAYOUT, *layout])
    with gzip.open(written["metrics"], "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder can be replaced as a whole: it is absent, or holds a zoo and nothing else, and is no link."""
    if not os.path.lexists(folder):
        return True
    alone = not folder.is_symlink() and folder.is_dir() and not Path.cwd().is_relative_to(folder.resolve())
    return alone and {_FILES["weights"]} <= {path.name for path in folder.iterdir()} <= {*_FILES.values()}


class _Slot(NamedTuple):
    """The columns of the matrix that hold a parameter, and the parameter's shape."""

    start: int
    end: int
    shape: tuple[int, ...]


def _paths(files: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    if isinstance(files, Mapping):
        if set(files) != set(_FILES):
            raise ValueError(f"files are {sorted(files)}; expected the paths of {sorted(_FILES)}.")
        paths = {kind: Path(path) for kind, path in files.items()}
    else:
        paths = {kind: Path(files) / name for kind, name in _FILES.items()}
    for kind, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; expected the {kind} of a zoo. Unpack them all.")
    return paths


def _check_counts(paths: Mapping[str, Path], networks: int, lines: int) -> None:
    if lines != networks:
        raise ValueError(
            f"{paths['metrics']} has {lines}{' or more' if lines > networks else ''} rows, "
            f"{paths['weights']} {networks}: row {min(lines, networks)} is "
            "missing in one of them. They are of different zoos, or one is truncated: get both again."
        )


def _open_weights(path: Path) -> np.ndarray:
    """The matrix as a memory map: rows are read when they are used."""
    try:
        with _bounded.open_regular(path) as file:
            header, size = _bounded.npy_header(file), os.fstat(file.fileno()).st_size
        dtype = np.dtype(header.descr)
        nbytes = math.prod(header.shape) * dtype.itemsize
        if dtype.hasobject or nbytes != size - header.begin:
            raise ValueError(
                f"its header says {dtype} {_bounded.short(header.shape)}, {size - header.begin} bytes follow"
            )
    except Exception as error:  # NumPy raises many types for a damaged dtype
        raise ValueError(
            f"{path}: expected an npy file of plain numbers, got one that cannot be read ({_bounded.one_line(error)})."
            " It is truncated, foreign, or holds Python objects, which are refused: get it again."
        ) from error
    if len(header.shape) != 2 or dtype.kind != "f" or dtype.itemsize > 8 or 0 in header.shape:
        got = f"{dtype} {_bounded.short(header.shape)}"
        raise ValueError(f"{path}: expected floating-point numbers [networks, numbers of one], got {got}.")
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    return np.memmap(path, dtype, mode="r", offset=header.begin, shape=header.shape, order=order)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or gzipped, within the limits."""
    with _bounded.open_regular(path) as file:
        limit = _bounded.room("metadata_bytes", os.fstat(file.fileno()).st_size)
        stream: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        read = 0
        while line := stream.readline(limit):
            read += len(line)
            if read > limit:
                what = f"{path}: the size of the table, in bytes,"
                _bounded.check("metadata_bytes", read, what, limit=limit, is_all=False)
            yield line.decode("utf-8")


def _table(path: Path, required: Sequence[str]) -> Iterator[list[str]]:
    """The header of a CSV file, plain or gzipped, and its rows, all as long as the header."""
    try:
        table = csv.reader(_lines(path))
        header = next(table, [])
        _check_header(path, header, required)
        yield header
        empty = 0
        for row in table:
            empty += not row
            if (row and len(row) != len(header)) or empty > _MOST_EMPTY:
                raise ValueError(
                    f"{path}: line {table.line_num} has {len(row)} cells, the header {len(header)}. The file is "
                    "damaged: get it again."
                )
            if row:
                yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}: expected a CSV file with cells of up to {csv.field_size_limit()} letters, got one that cannot be "
            f"read ({_bounded.one_line(error)}). Get it again; or raise the limit with csv.field_size_limit(letters)."
        ) from error
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a {'gzipped ' if path.suffix == '.gz' else ''}CSV file, got one that cannot be read "
            f"({_bounded.one_line(error)}). It is truncated or foreign: get it again."
        ) from error


def _check_header(path: Path, header: Sequence[str], required: Sequence[str]) -> None:
    _bounded.check("items", len(header), f"{path}: the number of its columns")
    missing = [name for name in required if name not in header]
    repeated = sorted(name for name, times in collections.Counter(header).items() if name and times > 1)
    if missing or repeated:
        raise ValueError(
            f"{path}: expected the columns {list(required)}, each name once; missing are {missing}, repeated "
            f"{_bounded.short(repeated)}, got {_bounded.short(header)}. Get the file again."
        )


def _read_metrics(path: Path, required: Sequence[str], networks: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The activation of every row, and the columns of numbers, up to some rows after those of the networks."""
    table = _table(path, [_ACTIVATION, *required])
    header = next(table)
    activations: list[str] = []
    names: dict[str, str] = {}  # one text for all rows that have it
    # A column without a name is the row number that pandas writes.
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in header if name not in ("", _ACTIVATION)}
    while rows := list(itertools.islice(table, _ROWS_AT_ONCE)):
        for name, cells in zip(header, zip(*rows, strict=True), strict=True):
            if name == _ACTIVATION:
                activations += [names.setdefault(cell, cell) for cell in cells]
            elif name in chunks:
                numbers = _numbers(cells)
                if numbers is not None:
                    chunks[name].append(numbers)
                elif name in required:
                    raise ValueError(
                        f"{path}: expected numbers in column {name!r}, got also other cells. Get the file again."
                    )
                else:
                    del chunks[name]
        if len(activations) > networks:
            break
    if not activations:
        raise ValueError(f"{path}: expected a row for every network, got only the header. Get the file again.")
    return np.array(activations, object), {name: np.concatenate(arrays) for name, arrays in chunks.items()}


def _numbers(cells: Sequence[str]) -> np.ndarray | None:
    """Cells as truth values, whole numbers or numbers, in this order; None if some are neither."""
    if max(map(len, cells)) > _LONGEST_NUMBER:
        return None
    if set(cells) <= {"True", "False"}:
        return np.array([cell == "True" for cell in cells])
    cells = [cell or "nan" for cell in cells]
    for dtype in (np.int64, np.float64):
        try:
            return np.array(cells, dtype)
        except (ValueError, OverflowError):
            continue
    return None


def _read_index(path: Path, count: int) -> np.ndarray:
    """The order of the rows, [count], or [count + 1] where the first line is a header 0."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; expected the numbers of all rows, one per line. Get the split again."
        )
    try:
        content = _bounded.read_bytes(path, "metadata_bytes").decode("utf-8", "replace")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    lines = [line.strip() for line in content.splitlines()]
    numbers = [(number, line) for number, line in enumerate(lines, 1) if line]
    if numbers and not re.fullmatch(r"-?\d+", numbers[0][1]):
        del numbers[0]  # a header
    for number, line in numbers:
        if not re.fullmatch(r"\d{1,18}", line) or int(line) >= count:
            raise ValueError(
                f"{path}: line {number} is {line[:100]!r}; expected one of the rows 0..{count - 1}. The file is of "
                "another zoo, or damaged."
            )
    rows = np.array([int(line) for _, line in numbers], np.int64)
    heading = int(len(rows) == count + 1 and rows[0] == 0)
    if len(rows) - heading != count:
        raise ValueError(
            f"{path} has {len(rows)} rows, the zoo {count}: line {min(len(rows), count) + 1} is missing or too many. "
            "It belongs to another zoo: take the one of this data set."
        )
    times = np.bincount(rows[heading:], minlength=count)
    if times.max() > 1:
        raise ValueError(
            f"{path}: row {int(times.argmax())} is listed {int(times.max())} times, row {int(times.argmin())} not at "
            "all; expected each row once. The file is damaged."
        )
    return rows


def _select(
    metrics_path: Path,
    order: np.ndarray,
    activations: np.ndarray,
    steps: np.ndarray | None,
    *,
    activation: str,
    part: str | None,
    step: int | None,
) -> np.ndarray:
    """The rows of one step, part and activation, in that order of division.

    Args:
      metrics_path: For errors.
      order: All rows in the order of the index file, perhaps after a header 0.
      activations: Every row's activation.
      steps: Every row's step; None to select none.
      activation: As in `load`.
      part: As in `load`.
      step: As in `load`.
    """
    has_header = len(order) > len(activations)
    places = np.arange(len(order))
    if steps is not None:
        places = places[steps[order] == step]
        if not len(places):
            present = sorted(set(steps.tolist()))
            steps_there = _bounded.short(present)
            raise ValueError(
                f"{metrics_path}: no row has step {step}; steps are {steps_there}. Pass one of them, or None."
            )
    present = sorted(set(activations[order[places]].tolist()))
    if activation not in present:
        raise ValueError(
            f"{metrics_path}: no row has the activation {activation!r}; there are {_bounded.short(present)}. Pass "
            "one of them."
        )
    if part is not None:
        places = places[_published_part(len(places), part)]
    if has_header:
        places = places[places > 0]
    rows = order[places]
    return rows[activations[rows] == activation]


def _published_part(count: int, part: str) -> np.ndarray:
    """Which of `count` networks are in a part (arXiv 2302.14040's published code)."""
    first_half = list(range(int(0.5 * count)))
    if part == "test":
        return np.arange(len(first_half), count)
    random.Random(0).shuffle(first_half)
    end = int(0.8 * len(first_half))
    return np.array(first_half[:end] if part == "train" else first_half[end:], np.int64)


def _read_rows(
    path: Path, weights: np.ndarray, rows: np.ndarray, *, finite_only: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of the matrix in JAX's precision, and which of them are finite."""
    matrix = np.empty((len(rows), weights.shape[1]), jax.dtypes.canonicalize_dtype(weights.dtype.newbyteorder("=")))
    finite = np.empty(len(rows), bool)
    ascending = np.argsort(rows)  # the order of the file, so that it is read front to back
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = ascending[start : start + _ROWS_AT_ONCE]
        with np.errstate(over="ignore"):  # a number too large for JAX's precision becomes infinite and is refused
            matrix[chunk] = weights[rows[chunk]]
        finite[chunk] = np.isfinite(matrix[chunk]).all(axis=1)
    if not finite.all() and not finite_only:
        raise ValueError(
            f"{path}: {int((~finite).sum())} of {len(rows)} networks have a NaN or an infinity, the first in row "
            f"{int(rows[~finite].min())}. Their training diverged: pass finite_only=True to leave them out."
        )
    return matrix, finite


def _read_layout(path: Path, width: int, activation: str) -> tuple[Architecture, list[_Slot]]:
    """The architecture, and the slots of its parameters in their order."""
    table = _table(path, _LAYOUT)
    header = next(table)
    slots: dict[tuple[str, int, str], _Slot] = {}
    for row in table:
        _bounded.check("layers", len(slots), f"{path}: the number of its variables")
        cells = dict(zip(header, row, strict=True))
        name = cells["varname"]
        match = re.fullmatch(r"(?:.*/)?(conv2d|dense)(?:_(\d{1,9}))?/(kernel|bias)(?::\d+)?", name)
        if not match:
            raise ValueError(
                f"{path}: variable {_bounded.short(name)} is not one of a CNN; expected names like "
                "'sequential/conv2d_1/kernel:0' and 'sequential/dense/bias:0'. Other layers are not read."
            )
        key = match[1], int(match[2] or 0), match[3]
        if key in slots:
            raise ValueError(f"{path}: variable {_bounded.short(name)} is listed twice; expected every one once.")
        slots[key] = _slot(path, cells)
    end = 0
    for slot in sorted(slots.values()):
        if slot.start != end:
            fault = "overlap" if slot.start < end else "leave a gap"
            raise ValueError(
                f"{path}: the variables {fault} at column {min(slot.start, end)}: one ends at {end}, the next begins "
                f"at {slot.start}. The file is damaged."
            )
        end = slot.end
    if end != width:
        raise ValueError(
            f"{path}: the variables take {end} columns, the matrix has {width}. They are of different zoos."
        )
    return _cnn_of(path, slots, activation)


def _slot(path: Path, cells: Mapping[str, str]) -> _Slot:
    where = f"{path}: variable {_bounded.short(cells['varname'])}"
    shape = cells["shape"].strip()
    for text in (cells["start_idx"], cells["end_idx"], cells["size"]):
        if not re.fullmatch(r"\d{1,9}", text.strip()):
            raise ValueError(f"{where} has the index or size {text[:50]!r}; expected a whole number.")
    if len(shape) > 100 or not re.fullmatch(r"\((?:[1-9]\d{0,8}, ?)*(?:[1-9]\d{0,8},?)\)", shape):
        raise ValueError(f"{where} has the shape {shape[:50]!r}; expected one like '(3, 3, 1, 16)' or '(16,)'.")
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    start, end, size = int(cells["start_idx"]), int(cells["end_idx"]), int(cells["size"])
    if not end - start == size == math.prod(sizes):
        raise ValueError(
            f"{where} begins at {start} and ends at {end}, has size {size} and shape {sizes}; expected end - start, "
            "size and the product of the shape to be one number. The file is damaged."
        )
    return _Slot(start, end, sizes)


def _cnn_of(
    path: Path, slots: Mapping[tuple[str, int, str], _Slot], activation: str
) -> tuple[Architecture, list[_Slot]]:
    """The CNN whose variables have these shapes; convolutions are in the order of their numbers."""
    numbers = {kind: sorted({number for name, number, _ in slots if name == kind}) for kind in ("conv2d", "dense")}
    layers = [("conv2d", number) for number in numbers["conv2d"]] + [("dense", number) for number in numbers["dense"]]
    wanted = [(*layer, kind) for layer in layers for kind in ("kernel", "bias")]
    missing = [f"{name}_{number}/{kind}" for name, number, kind in wanted if (name, number, kind) not in slots]
    if missing or not numbers["conv2d"] or len(numbers["dense"]) != 1:
        raise ValueError(
            f"{path}: got {len(numbers['conv2d'])} convolutions and {len(numbers['dense'])} dense layers, without "
            f"{_bounded.short(missing)}; expected convolutions and one dense layer, each with kernel and bias."
        )
    kernels = [slots[name, number, "kernel"].shape for name, number in layers]
    if any(len(shape) != 4 for shape in kernels[:-1]) or len(kernels[-1]) != 2:
        raise ValueError(
            f"{path}: kernels have the shapes {_bounded.short(kernels)}; expected (size, size, in, out), "
            "of dense (in, out)."
        )
    channels = [kernels[0][2], *(shape[3] for shape in kernels[:-1])]
    arch = architecture.cnn(
        channels, kernels[-1][1], activation=activation, kernel_size=[shape[0] for shape in kernels[:-1]]
    )
    ours = {f"Conv_{row}": layer for row, layer in enumerate(layers[:-1])} | {"Dense_0": layers[-1]}
    ordered = []
    for parameter in arch.parameters:
        layer, kind = parameter.path
        slot = slots[*ours[layer], kind]
        if slot.shape != arch.shape(parameter):
            raise ValueError(
                f"{path}: the {kind} of {ours[layer][0]}_{ours[layer][1]} has shape {slot.shape}; {arch.name!r} "
                f"expects {arch.shape(parameter)}: square kernels, and global mean pooling before the dense layer."
            )
        ordered.append(slot)
    return arch, ordered


def _cnn_activation(arch: Architecture) -> str:
    """The activation of a CNN that the format can hold; an error for any other architecture."""
    convolutions = [layer for layer in arch.layers if isinstance(layer, Conv) and layer.activation]
    widths = [neurons.width for neurons in arch.neuron_layers]
    sizes = [size for p in arch.parameters if isinstance(size := p.axes[0], int)]
    if convolutions and len(sizes) == len(widths) - 2:
        name = convolutions[0].activation.name  # type: ignore[union-attr]
        stored = architecture.cnn(widths[:-1], widths[-1], activation=name, kernel_size=sizes)
        if (stored.parameters, stored.layers) == (arch.parameters, arch.layers):
            return name
    raise ValueError(
        f"{arch.name!r} cannot be stored in a Small CNN Zoo; expected an architecture.cnn with one activation, square "
        "kernels, strides 2, no padding and global mean pooling. Use zoo.save."
    )


def _columns(cnns: _populations.Zoo, activation: str) -> dict[str, list[Any]]:
    """The columns of metrics.csv; every cell is written so that it reads as the same number."""
    columns: dict[str, list[Any]] = {_ACTIVATION: [activation] * len(cnns)}
    for name, values in cnns.records.items():
        values = np.asarray(values)
        # Numbers are read as int64 and float64, which must hold them exactly.
        exact = np.can_cast(values.dtype, np.int64) or (values.dtype.kind == "f" and values.dtype.itemsize <= 8)
        if values.ndim != 1 or not exact or name in ("", _ACTIVATION):
            raise ValueError(
                f"zoo.records[{name!r}] is {values.dtype} {values.shape}; expected one number per network, under a "
                f"name other than '' and {_ACTIVATION!r}. Leave it out, or use zoo.save."
            )
        columns[name] = values.tolist()
    return columns


def _matrix(cnns: _populations.Zoo) -> tuple[np.ndarray, list[list[Any]]]:
    """The networks as rows of numbers, and the lines of layout.csv."""
    flat, lines, start = [], [], 0
    for layer in dict.fromkeys(parameter.path[0] for parameter in cnns.arch.parameters):
        for kind in ("bias", "kernel"):
            value = np.asarray(cnns.params[layer][kind])
            size = math.prod(value.shape[1:])
            lines.append([f"{_tf_name(layer)}/{kind}:0", start, start + size, size, str(value.shape[1:])])
            flat.append(value.reshape(len(value), -1))
            start += size
    dtypes = sorted({str(value.dtype) for value in flat})
    if len(dtypes) != 1 or dtypes[0] not in ("float16", "float32", "float64"):
        raise ValueError(
            f"zoo.params are {', '.join(dtypes)}; expected float16, float32 or float64 throughout, since a matrix of "
            "weights.npy has one precision. Convert them."
        )
    return np.concatenate(flat, axis=1), lines


def _tf_name(layer: str) -> str:
    kind, number = layer.split("_")
    name = {"Conv": "conv2d", "Dense": "dense"}[kind]
    return f"sequential/{name}" if number == "0" else f"sequential/{name}_{number}"
