"""The Small CNN Zoo is read as its authors wrote it, and written likewise; no file runs code."""

import csv
import gzip
import math
import os
import pickle
import random
import re
import time
import tracemalloc
from io import StringIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import io, network, zoo
from jax_scalegmn.zoo import small_cnn_zoo

# --- the Small CNN Zoo, written by hand -----------------------------------------------------------------------------

PUBLISHED = {  # shapes in the order of its layout.csv
    "sequential/conv2d/bias:0": (16,),
    "sequential/conv2d/kernel:0": (3, 3, 1, 16),
    "sequential/conv2d_1/bias:0": (16,),
    "sequential/conv2d_1/kernel:0": (3, 3, 16, 16),
    "sequential/conv2d_2/bias:0": (16,),
    "sequential/conv2d_2/kernel:0": (3, 3, 16, 16),
    "sequential/dense/bias:0": (10,),
    "sequential/dense/kernel:0": (16, 10),
}
SMALL = {
    "sequential/conv2d/bias:0": (2,),
    "sequential/conv2d/kernel:0": (3, 3, 1, 2),
    "sequential/conv2d_1/bias:0": (3,),
    "sequential/conv2d_1/kernel:0": (2, 2, 2, 3),
    "sequential/dense/bias:0": (2,),
    "sequential/dense/kernel:0": (3, 2),
}
CNN = sg.cnn((1, 2, 3), 2, kernel_size=(3, 2))
STEPS = (0, 40, 86)
HEADER = [
    *("", "config.activation", "config.learning_rate", "config.num_units", "config.optimizer", "config.dropout"),
    *("step", "laststep", "test_accuracy", "test_loss", "train_accuracy", "train_loss"),
]


def layout_lines(shapes: dict[str, tuple[int, ...]]) -> list[list]:
    lines, start = [], 0
    for name, shape in shapes.items():
        lines.append([name, start, start + math.prod(shape), math.prod(shape), str(shape)])
        start += math.prod(shape)
    return lines


def write_layout(path: Path, lines: list[list]) -> None:
    path.write_text(
        "varname,start_idx,end_idx,size,shape\n"
        + "".join(f'{name},{start},{end},{size},"{shape}"\n' for name, start, end, size, shape in lines)
    )


def metrics_rows(networks: int) -> list[list]:
    """One row for each step of each network, with gaps in one column; relu for two of three networks."""
    rng = np.random.default_rng(1)
    rows = []
    for i in range(networks):
        for step in STEPS:
            activation = "tanh" if i % 3 == 0 else "relu"
            dropout = "" if i % 2 else "0.25"
            floats = [repr(float(value)) for value in rng.uniform(size=4)]
            rows.append([len(rows), activation, repr(0.1 / (i + 1)), 16, "adam", dropout, step, step == 86, *floats])
    return rows


def write_metrics(path: Path, rows: list[list], header=tuple(HEADER)) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def write_zoo(folder: Path, networks: int = 12, shapes=None, dtype="<f4") -> np.ndarray:
    """Writes the three files and returns the matrix."""
    shapes = SMALL if shapes is None else shapes
    folder.mkdir(exist_ok=True)
    width = sum(math.prod(shape) for shape in shapes.values())
    matrix = np.random.default_rng(0).normal(size=(networks * len(STEPS), width)).astype(dtype)
    np.save(folder / "weights.npy", matrix)
    write_metrics(folder / "metrics.csv.gz", metrics_rows(networks))
    write_layout(folder / "layout.csv", layout_lines(shapes))
    return matrix


def column(name: str, networks: int = 12) -> list:
    return [row[HEADER.index(name)] for row in metrics_rows(networks)]


def flat(loaded: zoo.Zoo) -> np.ndarray:
    """The networks of a zoo with two convolutions as rows of the matrix."""
    leaves = [loaded.params[layer][kind] for layer in ("Conv_0", "Conv_1", "Dense_0") for kind in ("bias", "kernel")]
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)


def rows_of(activation: str, step: int | None = 86, networks: int = 12) -> list[int]:
    return [
        row
        for row, (name, at) in enumerate(
            zip(column("config.activation", networks), column("step", networks), strict=True)
        )
        if name == activation and step in (None, at)
    ]


def test_the_published_zoo_is_read_to_its_function(tmp_path):
    """Against a NumPy evaluation in TensorFlow's layout, of every activation."""
    matrix = write_zoo(tmp_path, networks=4, shapes=PUBLISHED)
    assert matrix.shape[1] == 4970
    image = np.random.default_rng(2).uniform(size=(17, 15, 1))
    for activation, function in (("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)):
        loaded = small_cnn_zoo.load(tmp_path, activation=activation)
        assert loaded.arch == sg.cnn((1, 16, 16, 16), 10, activation=activation)
        rows = rows_of(activation, networks=4)
        assert len(loaded) == len(rows) == 2
        for index, row in enumerate(rows):
            got = network.apply(loaded.arch, support.rows(loaded.params, index), jnp.asarray(image, jnp.float32))
            expected = cnn_by_hand(matrix[row].astype(float), image, function)
            assert got.shape == (10,)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def cnn_by_hand(flat_weights: np.ndarray, x: np.ndarray, function) -> np.ndarray:
    parts, start = {}, 0
    for name, shape in PUBLISHED.items():
        parts[name.split("/", 1)[1][:-2]] = flat_weights[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    for layer in ("conv2d", "conv2d_1", "conv2d_2"):
        kernel = parts[f"{layer}/kernel"]
        height, width = ((size - 3) // 2 + 1 for size in x.shape[:2])
        maps = np.empty((height, width, kernel.shape[3]))
        for i in range(height):
            for j in range(width):
                for out in range(kernel.shape[3]):
                    maps[i, j, out] = (x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * kernel[:, :, :, out]).sum()
        x = function(maps + parts[f"{layer}/bias"])
    return x.mean((0, 1)) @ parts["dense/kernel"] + parts["dense/bias"]


def test_rows_records_and_settings_are_those_of_the_files(tmp_path):
    matrix = write_zoo(tmp_path)
    for activation in ("relu", "tanh"):
        loaded, rows = small_cnn_zoo.load(tmp_path, activation=activation), rows_of(activation)
        np.testing.assert_array_equal(flat(loaded), matrix[rows])
        assert set(loaded.records) == set(HEADER) - {"", "config.activation", "config.optimizer"}
        dtypes = {"step": np.int64, "config.num_units": np.int64, "laststep": np.bool_}
        for name, values in loaded.records.items():
            assert values.dtype == dtypes.get(name, np.float64)
            expected = [column(name)[row] for row in rows]
            np.testing.assert_array_equal(values, np.array([float(x if x != "" else "nan") for x in expected]))
        assert loaded.settings == {
            "source": str(tmp_path),
            "part": None,
            "activation": activation,
            "step": 86,
            "left_out": 0,
        }


def test_a_table_is_read_alike_in_whatever_pieces(tmp_path, monkeypatch):
    """Also a column that turns to text, or from whole numbers to others, in its last row."""
    write_zoo(tmp_path)
    rows = [[*row, i, i] for i, row in enumerate(metrics_rows(12))]
    rows[-1][-2:] = ["text", 0.5]
    write_metrics(tmp_path / "metrics.csv.gz", rows, [*HEADER, "late text", "late float"])
    whole = small_cnn_zoo.load(tmp_path, activation="relu").records
    assert "late text" not in whole
    assert whole["late float"].dtype == np.float64
    for size in (1, 5, 35, 36):
        monkeypatch.setattr(small_cnn_zoo, "_ROWS_AT_ONCE", size)
        pieces = small_cnn_zoo.load(tmp_path, activation="relu").records
        assert list(pieces) == list(whole)
        for name, values in whole.items():
            assert pieces[name].dtype == values.dtype
            np.testing.assert_array_equal(pieces[name], values)


def test_every_step_can_be_read(tmp_path):
    matrix = write_zoo(tmp_path)
    np.testing.assert_array_equal(
        flat(small_cnn_zoo.load(tmp_path, activation="relu", step=40)), matrix[rows_of("relu", 40)]
    )
    loaded = small_cnn_zoo.load(tmp_path, activation="relu", step=None)
    np.testing.assert_array_equal(flat(loaded), matrix[rows_of("relu", None)])
    assert loaded.settings["step"] is None


def test_files_are_read_from_any_path_and_an_uncompressed_table(tmp_path):
    matrix = write_zoo(tmp_path)
    (tmp_path / "m.csv").write_bytes(gzip.decompress((tmp_path / "metrics.csv.gz").read_bytes()))
    files = {"weights": tmp_path / "weights.npy", "metrics": tmp_path / "m.csv", "layout": tmp_path / "layout.csv"}
    np.testing.assert_array_equal(flat(small_cnn_zoo.load(files, activation="tanh")), matrix[rows_of("tanh")])
    with pytest.raises(ValueError, match=r"files are \['metrics', 'weights'\]; expected"):
        small_cnn_zoo.load({kind: files[kind] for kind in ("metrics", "weights")}, activation="tanh")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_every_precision_and_byte_order_is_read(tmp_path, dtype, order):
    matrix = write_zoo(tmp_path, dtype=dtype)
    np.save(tmp_path / "weights.npy", np.asarray(matrix, order=order))
    with support.precision("float64"):
        got = flat(small_cnn_zoo.load(tmp_path, activation="relu"))
    assert got.dtype == matrix.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, matrix[rows_of("relu")])
    if dtype == "<f8":
        np.testing.assert_array_equal(
            flat(small_cnn_zoo.load(tmp_path, activation="relu")), matrix[rows_of("relu")].astype(np.float32)
        )


# --- the published parts ----------------------------------------------------------------------------------------------


def published(index: list[int], part: str, activation: str, networks: int) -> list[int]:
    """The rows of a part as the published code selects them, repeated rows included."""
    steps, activations = column("step", networks), column("config.activation", networks)
    data = [row for row in index if steps[row] == 86]
    half = int(0.5 * len(data))
    first = list(range(half))
    random.Random(0).shuffle(first)
    end = int(0.8 * half)
    chosen = {"train": first[:end], "validation": first[end:], "test": list(range(half, len(data)))}[part]
    return [data[i] for i in chosen if activations[data[i]] == activation]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "networks"),
    [
        ("", 40),
        ("row\n", 55),
        pytest.param("", 55, marks=pytest.mark.slow),
        pytest.param("row\n", 40, marks=pytest.mark.slow),
    ],
)
def test_the_parts_are_the_published_ones(tmp_path, networks, header):
    matrix = write_zoo(tmp_path, networks)
    index = np.random.default_rng(3).permutation(len(matrix)).tolist()
    path = tmp_path / "split.csv"
    path.write_text(header + "".join(f"{row}\n" for row in index))
    seen = []
    for activation in ("relu", "tanh"):
        for part in ("train", "validation", "test"):
            loaded = small_cnn_zoo.load(tmp_path, activation=activation, part=part, index_file=path)
            rows = published(index, part, activation, networks)
            np.testing.assert_array_equal(flat(loaded), matrix[rows])
            np.testing.assert_array_equal(
                loaded.records["test_loss"], [float(column("test_loss", networks)[row]) for row in rows]
            )
            assert loaded.settings["part"] == part
            seen += rows
        whole = small_cnn_zoo.load(tmp_path, activation=activation, index_file=path)
        np.testing.assert_array_equal(
            flat(whole), matrix[[row for row in index if row in rows_of(activation, 86, networks)]]
        )
    assert sorted(seen) == [row for row in range(len(matrix)) if row % 3 == 2]


@pytest.mark.parametrize("final_first", [False, True])
def test_the_header_0_of_published_index_files_counts_but_is_not_read_twice(tmp_path, final_first):
    """The published code reads it as a row; if that row has the step, all parts move by one."""
    networks = 40
    matrix = write_zoo(tmp_path, networks)
    rows = metrics_rows(networks)
    if final_first:  # row 0 is then one of the rows at step 86
        for row in rows[:3]:
            row[HEADER.index("step")] = 86 if row[0] == 0 else 0
        write_metrics(tmp_path / "metrics.csv.gz", rows)
    steps = [row[HEADER.index("step")] for row in rows]
    index = np.random.default_rng(3).permutation(len(matrix)).tolist()
    path = tmp_path / "cifar10_split.csv"
    path.write_text("".join(f"{row}\n" for row in [0, *index]))
    data = [place for place, row in enumerate([0, *index]) if steps[row] == 86]
    half = int(0.5 * len(data))
    first = list(range(half))
    random.Random(0).shuffle(first)
    end = int(0.8 * half)
    chosen = {"train": first[:end], "validation": first[end:], "test": list(range(half, len(data)))}
    seen = []
    for activation in ("relu", "tanh"):
        for part, places in chosen.items():
            loaded = small_cnn_zoo.load(tmp_path, activation=activation, part=part, index_file=path)
            expected = [[0, *index][data[i]] for i in places if data[i] > 0]
            expected = [row for row in expected if rows[row][1] == activation]
            np.testing.assert_array_equal(flat(loaded), matrix[expected])
            seen += expected
    assert sorted(seen) == [row for row in range(len(matrix)) if steps[row] == 86]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n2\n", r"split\.csv has 3 rows, the zoo 36: line 4 is missing or too many"),
        ("".join(f"{row}\n" for row in [7, *range(36)]), "has 37 rows, the zoo 36: line 37"),
        ("".join(f"{row}\n" for row in [*range(36), 7]), "row 7 is listed 2 times, row 0 not at all"),
        ("".join(f"{row}\n" for row in [*range(35), 0]), "row 0 is listed 2 times, row 35 not at all"),
        ("".join(f"{row}\n" for row in [*range(35), 36]), r"line 36 is '36'; expected one of the rows 0\.\.35"),
        ("-1\n0\n", r"line 1 is '-1'"),
        ("row\n0\n1.0\n", r"line 3 is '1\.0'"),
        ("0,1\n2,3\n", r"line 2 is '2,3'"),
        ("", "has 0 rows"),
    ],
)
def test_an_index_of_another_zoo_is_refused(tmp_path, text, message):
    write_zoo(tmp_path)
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        small_cnn_zoo.load(tmp_path, activation="relu", index_file=tmp_path / "split.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: there is no such file"):
        small_cnn_zoo.load(tmp_path, activation="relu", index_file=tmp_path / "nowhere.csv")


# --- networks that diverged, and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_networks_are_named_or_left_out(tmp_path, value):
    matrix = write_zoo(tmp_path)
    bad = rows_of("relu")[2:4]
    matrix[bad[1], 5] = matrix[bad[0], -1] = value
    np.save(tmp_path / "weights.npy", matrix)
    with pytest.raises(ValueError, match=rf"2 of 8 networks .* the first in row {bad[0]}\b.*finite_only=True"):
        small_cnn_zoo.load(tmp_path, activation="relu")
    loaded = small_cnn_zoo.load(tmp_path, activation="relu", finite_only=True)
    rows = [row for row in rows_of("relu") if row not in bad]
    np.testing.assert_array_equal(flat(loaded), matrix[rows])
    np.testing.assert_array_equal(loaded.records["train_loss"], [float(column("train_loss")[row]) for row in rows])
    assert loaded.settings["left_out"] == 2
    assert small_cnn_zoo.load(tmp_path, activation="tanh", finite_only=True).settings["left_out"] == 0


def test_numbers_too_large_for_single_precision_are_named(tmp_path):
    matrix = write_zoo(tmp_path, dtype="<f8")
    matrix[rows_of("relu")[0], 0] = 1e300
    np.save(tmp_path / "weights.npy", matrix)
    with pytest.raises(ValueError, match="1 of 8 networks have a NaN or an infinity"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def test_diverged_networks_outside_the_selection_do_not_matter(tmp_path):
    matrix = write_zoo(tmp_path)
    matrix[rows_of("tanh")] = matrix[rows_of("relu", 40)] = np.nan
    np.save(tmp_path / "weights.npy", matrix)
    np.testing.assert_array_equal(flat(small_cnn_zoo.load(tmp_path, activation="relu")), matrix[rows_of("relu")])
    with pytest.raises(ValueError, match="none of 4 networks with activation 'tanh', step 86 and part None is left"):
        small_cnn_zoo.load(tmp_path, activation="tanh", finite_only=True)


def test_only_the_selected_rows_are_read_into_memory(tmp_path):
    """20 rows of a sparse file of 400 MB."""
    networks = 20_000 // len(STEPS)
    write_zoo(tmp_path, networks=1, shapes=PUBLISHED)
    rows = [[i, "tanh" if i < 20 else "relu", *row[2:]] for i, row in enumerate(metrics_rows(1) * networks)]
    for row in rows[:20]:
        row[HEADER.index("step")] = 86
    write_metrics(tmp_path / "metrics.csv.gz", rows)
    matrix = np.lib.format.open_memmap(tmp_path / "weights.npy", "w+", np.float32, (len(rows), 4970))
    matrix[:20] = np.arange(20)[:, None]
    del matrix
    small_cnn_zoo.load(tmp_path, activation="tanh")  # compiles
    tracemalloc.start()
    loaded = small_cnn_zoo.load(tmp_path, activation="tanh")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(loaded.params["Dense_0"]["bias"][:, 0], np.arange(20))
    assert peak < 40e6


# --- damaged zoos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.npy", "metrics.csv.gz", "layout.csv"])
def test_a_missing_file_is_named(tmp_path, name):
    write_zoo(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(name)}: there is no such file"):
        small_cnn_zoo.load(tmp_path, activation="relu")


class Touch:
    """An object whose pickle touches a file as it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
def test_a_hostile_matrix_is_refused_and_not_run(tmp_path, form):
    write_zoo(tmp_path)
    marker, path = tmp_path / "owned", tmp_path / "weights.npy"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Touch(marker)))
    else:
        np.save(path, np.array([[Touch(marker)]], object))
    with pytest.raises(ValueError, match=r"weights\.npy: expected an npy file of plain numbers.*refused"):
        small_cnn_zoo.load(tmp_path, activation="relu")
    assert not marker.exists()
    np.load(path, allow_pickle=True)
    assert marker.exists(), "the file is not hostile"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, matrix: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path, matrix: path.write_bytes(b""), "cannot be read"),
        (lambda path, matrix: path.write_bytes(b"hello"), "cannot be read"),
        (lambda path, matrix: np.save(path, matrix[0]), r"got float32 \(55,\)"),
        (lambda path, matrix: np.save(path, matrix.astype(int)), "got int64"),
        (lambda path, matrix: np.save(path, matrix.astype(complex)), "got complex128"),
        (lambda path, matrix: np.save(path, matrix[:, :-1]), "take 55 columns, the matrix has 54"),
        (
            lambda path, matrix: np.save(path, matrix[:-1]),
            "has 36 or more rows, .*weights.npy 35: row 35 is missing",
        ),
        (lambda path, matrix: np.save(path, matrix[[*range(36), 0]]), "36 rows, .* 37: row 36 is missing"),
    ],
)
def test_a_damaged_matrix_is_refused(tmp_path, damage, message):
    matrix = write_zoo(tmp_path)
    assert matrix.shape == (36, 55)
    damage(tmp_path / "weights.npy", matrix)
    with pytest.raises(ValueError, match=message) as caught:
        small_cnn_zoo.load(tmp_path, activation="relu")
    assert str(tmp_path) in str(caught.value)


def gzipped(folder: Path, change) -> None:
    path = folder / "metrics.csv.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def long_cell(content: bytes) -> bytes:
    lines = content.splitlines()
    lines[5] = lines[5].replace(b"relu", b"x" * 131_000).replace(b"tanh", b"x" * 131_000)
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: gzipped(folder, lambda content: content + b"\n" * 2**25), "has 0 cells"),
        (lambda folder: gzipped(folder, lambda content: content + b"x" * 2**25), r"limits\(metadata_bytes="),
        (lambda folder: gzipped(folder, lambda content: content + content[-20:] * 10**5), "rows|cells"),
        (lambda folder: gzipped(folder, lambda content: b"x," * 2**17 + b"\n" + content), "items="),
        (
            lambda folder: gzipped(folder, lambda content: b"x" * 140_000 + content),
            r"csv\.field_size_limit\(letters\)",
        ),
        (lambda folder: gzipped(folder, lambda content: b"\xff" + content), "cannot be read"),
        (
            lambda folder: (folder / "layout.csv").write_text(
                f"varname,start_idx,end_idx,size,shape\n{'x' * 10**5},,,,"
            ),
            "xxx",
        ),
        (lambda folder: os.truncate(folder / "weights.npy", 2**20), "its header says float32"),
        (
            lambda folder: (folder / "weights.npy").write_bytes(npy((2**60, 0))),
            r"got float32 \(1152921504606846976, 0\)",
        ),
        (lambda folder: (folder / "weights.npy").write_bytes(npy((2**40, 55))), "its header says float32"),
    ],
)
def test_hostile_files_are_refused_briefly(tmp_path, damage, message):
    write_zoo(tmp_path)
    damage(tmp_path)
    begin = time.process_time()
    with pytest.raises(ValueError, match=rf"{tmp_path}.*({message})") as caught:
        small_cnn_zoo.load(tmp_path, activation="relu")
    assert len(str(caught.value)) < 2000
    assert time.process_time() - begin < 5


def npy(shape: tuple[int, ...]) -> bytes:
    text = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_one_long_cell_takes_no_memory_in_every_row(tmp_path):
    write_zoo(tmp_path, 4000)
    gzipped(tmp_path, long_cell)
    tracemalloc.start()
    small_cnn_zoo.load(tmp_path, activation="relu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27  # 131,000 letters for each of 12,000 rows would be 6 GB


def test_special_files_of_a_zoo_are_refused(tmp_path):
    write_zoo(tmp_path)
    (tmp_path / "metrics.csv.gz").unlink()
    os.symlink("/dev/zero", tmp_path / "metrics.csv.gz")
    with pytest.raises((ValueError, FileNotFoundError), match=r"metrics\.csv\.gz"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def test_an_archive_of_arrays_is_no_matrix(tmp_path):
    matrix = write_zoo(tmp_path)
    with (tmp_path / "weights.npy").open("wb") as file:
        np.savez(file, matrix)
    with pytest.raises(ValueError, match=r"expected an npy file of plain numbers.*PK"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def without(name: str):
    at = HEADER.index(name)
    rows = [row[:at] + row[at + 1 :] for row in metrics_rows(12)]
    return rows, [other for other in HEADER if other != name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: without("config.activation"), r"missing are \['config.activation'\]"),
        (lambda: without("step"), r"missing are \['step'\]"),
        (lambda: (metrics_rows(12), [*HEADER[:-1], "step"]), r"repeated \['step'\]"),
        (lambda: ([*metrics_rows(12)[:-1], [1, 2]], HEADER), "line 37 has 2 cells, the header 12"),
        (lambda: ([[*row[:6], "late", *row[7:]] for row in metrics_rows(12)], HEADER), "numbers in column 'step'"),
        (lambda: ([], HEADER), "only the header"),
        (lambda: ([], []), "missing are"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, message):
    write_zoo(tmp_path)
    rows, header = content()
    write_metrics(tmp_path / "metrics.csv.gz", rows, header)
    with pytest.raises(ValueError, match=message) as caught:
        small_cnn_zoo.load(tmp_path, activation="relu")
    assert "metrics.csv.gz" in str(caught.value)


def test_a_table_without_steps_is_read_whole(tmp_path):
    matrix = write_zoo(tmp_path)
    write_metrics(tmp_path / "metrics.csv.gz", *without("step"))
    loaded = small_cnn_zoo.load(tmp_path, activation="relu", step=None)
    np.testing.assert_array_equal(flat(loaded), matrix[rows_of("relu", None)])


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-9], lambda c: c[: len(c) // 2], lambda c: b"hello", lambda c: b"\xff"]
)
def test_a_damaged_gzip_is_refused(tmp_path, damage):
    write_zoo(tmp_path)
    path = tmp_path / "metrics.csv.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"metrics\.csv\.gz: expected a gzipped CSV file"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    write_zoo(tmp_path)
    (tmp_path / "layout.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"layout\.csv: expected a CSV file, got"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def test_absent_activations_steps_and_parts_are_named(tmp_path):
    write_zoo(tmp_path)
    with pytest.raises(ValueError, match=r"no row has the activation 'gelu'; there are \['relu', 'tanh'\]"):
        small_cnn_zoo.load(tmp_path, activation="gelu")
    with pytest.raises(ValueError, match=r"no row has step 80; steps are \[0, 40, 86\]"):
        small_cnn_zoo.load(tmp_path, activation="relu", step=80)
    with pytest.raises(ValueError, match="part is 'training'; expected 'train', 'validation', 'test' or None"):
        small_cnn_zoo.load(tmp_path, activation="relu", part="training")
    write_zoo(tmp_path / "two", networks=2)
    with pytest.raises(ValueError, match="none of 0 networks with activation 'relu', step 86 and part 'train' is left"):
        small_cnn_zoo.load(tmp_path / "two", activation="relu", part="train")


def changed(**rows):
    """The layout with cells changed, by line and column: _1_end_idx=30."""
    lines = layout_lines(SMALL)
    for where, value in rows.items():
        line, name = where.removeprefix("_").split("_", 1)
        lines[int(line)][("varname", "start_idx", "end_idx", "size", "shape").index(name)] = value
    return lines


KERNEL, HEAD = "sequential/conv2d/kernel:0", "sequential/dense/kernel:0"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(_1_end_idx=21), rf"'{KERNEL}' begins at 2 and ends at 21, has size 18"),
        (changed(_1_size=17), "has size 17 and shape"),
        (changed(_1_shape="(3, 3, 1, 3)"), r"size 18 and shape \(3, 3, 1, 3\)"),
        (changed(_1_shape="__import__('os').system('true')"), "has the shape .__import__"),
        (changed(_1_shape="(3, 3, 1, 2"), "has the shape"),
        (changed(_1_shape="(3, 3, 0, 2)"), "has the shape"),
        (changed(_1_shape="()"), "has the shape"),
        (changed(_1_size="x"), "has the index or size 'x'"),
        (changed(_0_start_idx=-2), "has the index or size '-2'"),
        (changed(_1_start_idx=1, _1_end_idx=19), "overlap at column 1: one ends at 2, the next begins at 1"),
        (changed(_1_start_idx=3, _1_end_idx=21), "leave a gap at column 2: one ends at 2, the next begins at 3"),
        (changed(_0_varname="sequential/batch_norm/gamma:0"), "'sequential/batch_norm/gamma:0' is not one of a CNN"),
        (changed(_2_varname="sequential/conv2d/bias:0"), "'sequential/conv2d/bias:0' is listed twice"),
        (changed(_2_varname="sequential/conv2d_5/bias:0"), r"without \['conv2d_1/bias', 'conv2d_5/kernel'\]"),
        (changed(_4_varname="x/dense_1/bias:0"), "2 dense layers"),
        (layout_lines({KERNEL: (3, 3, 1, 5), "conv2d/bias": (5,), "conv2d_1/kernel": (3, 5), "conv2d_1/bias": ()})[:2],
         "1 convolutions and 0 dense layers"),
        (changed(_1_shape="(9, 2)"), r"expected \(size, size, in, out\)"),
        (changed(_1_shape="(1, 9, 1, 2)"), r"kernel of conv2d_0 has shape \(1, 9, 1, 2\).*expects \(1, 1, 1, 2\)"),
        (changed(_3_shape="(2, 2, 3, 2)"), r"kernel of conv2d_1 has shape \(2, 2, 3, 2\).*expects \(2, 2, 2, 2\)"),
        (changed(_5_shape="(2, 3)"), r"kernel of dense_0 has shape \(2, 3\).*expects \(3, 3\).*global mean pooling"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_of_a_cnn_is_refused(tmp_path, lines, message):
    write_zoo(tmp_path)
    write_layout(tmp_path / "layout.csv", lines)
    if len(lines) == 2:
        np.save(tmp_path / "weights.npy", np.zeros((36, 50), np.float32))
    with pytest.raises(ValueError, match=message) as caught:
        small_cnn_zoo.load(tmp_path, activation="relu")
    assert "layout.csv" in str(caught.value)


def test_a_layout_without_a_column_is_refused(tmp_path):
    write_zoo(tmp_path)
    (tmp_path / "layout.csv").write_text("varname,start_idx,end_idx,size\n")
    with pytest.raises(ValueError, match=r"missing are \['shape'\]"):
        small_cnn_zoo.load(tmp_path, activation="relu")


def test_variables_are_read_in_any_order_and_under_any_prefix(tmp_path):
    matrix = write_zoo(tmp_path)
    expected = small_cnn_zoo.load(tmp_path, activation="relu")
    lines = layout_lines(SMALL)
    for line in lines:
        line[0] = line[0].removeprefix("sequential/").removesuffix(":0").replace("conv2d_1", "conv2d_10")
        line[0] = line[0].replace("conv2d/", "conv2d_9/").replace("dense", "model/dense_4")
    write_layout(tmp_path / "layout.csv", lines[::-1])
    loaded = small_cnn_zoo.load(tmp_path, activation="relu")
    assert loaded.arch == expected.arch == CNN
    support.assert_identical(loaded.params, expected.params)
    np.testing.assert_array_equal(flat(loaded), matrix[rows_of("relu")])


# --- writing ----------------------------------------------------------------------------------------------------------

BITS = {
    "step": np.array([86, 86, 40]),
    "test_accuracy": np.array([0.1, np.nan, 1 / 3]),
    "train_loss": np.array([1.0, np.inf, 5e-324]),
    "seed": np.array([2**62 + 1, -3, 0]),
    "finished": np.array([True, False, True]),
    "name, with \"quotes\"": np.array([1.5, 2.5, -0.0]),
}  # fmt: skip


def random_cnns(arch=CNN, dtype="float32", records=None) -> zoo.Zoo:
    params = support.random_params(arch, models=(3,), dtype=dtype)
    return zoo.Zoo(arch, params, BITS if records is None else records, {"anything": 1})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, activation, dtype):
    arch = sg.cnn((2, 3, 1, 4), 3, activation=activation, kernel_size=(3, 1, 2))
    with support.precision(dtype):
        cnns = random_cnns(arch, dtype)
        small_cnn_zoo.save(tmp_path / "new" / "zoo", cnns)
        loaded = small_cnn_zoo.load(tmp_path / "new" / "zoo", activation=activation, step=None)
        assert loaded.arch == arch
        support.assert_identical(loaded.params, cnns.params)
    assert list(loaded.records) == list(BITS)
    for name, values in BITS.items():
        assert loaded.records[name].dtype == values.dtype
        assert loaded.records[name].tobytes() == values.tobytes()
    assert sorted(path.name for path in (tmp_path / "new" / "zoo").iterdir()) == [
        "layout.csv",
        "metrics.csv.gz",
        "weights.npy",
    ]


def test_what_is_written_is_what_the_published_code_expects(tmp_path):
    """Bias before kernel, TensorFlow's names and layout, rows of numbers."""
    cnns = random_cnns()
    small_cnn_zoo.save(tmp_path, cnns)
    matrix = np.load(tmp_path / "weights.npy")
    assert matrix.dtype == np.float32
    with (tmp_path / "layout.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["varname"] for line in lines] == list(SMALL)
    start = 0
    for line, (name, shape) in zip(lines, SMALL.items(), strict=True):
        end = start + math.prod(shape)
        assert line == {"varname": name, "start_idx": str(start), "end_idx": str(end), "size": str(end - start)} | {
            "shape": str(shape)
        }
        layer, kind = name.split("/")[1:]
        ours = {"conv2d": "Conv_0", "conv2d_1": "Conv_1", "dense": "Dense_0"}[layer]
        np.testing.assert_array_equal(matrix[:, start:end].reshape(3, *shape), cnns.params[ours][kind[:-2]])
        start = end
    with gzip.open(tmp_path / "metrics.csv.gz", "rt", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["config.activation"] for row in table] == ["relu"] * 3
    assert [int(row["step"]) for row in table] == [86, 86, 40]


def test_the_published_zoo_is_read_written_and_read_alike(tmp_path):
    write_zoo(tmp_path / "published", shapes=PUBLISHED)
    first = small_cnn_zoo.load(tmp_path / "published", activation="tanh", part="test")
    small_cnn_zoo.save(tmp_path / "part", first)
    second = small_cnn_zoo.load(tmp_path / "part", activation="tanh")
    assert second.arch == first.arch
    support.assert_identical(second.params, first.params)
    support.assert_identical(second.records, first.records)


def test_a_zoo_is_overwritten_only_where_that_is_asked_for(tmp_path):
    cnns = random_cnns()
    small_cnn_zoo.save(tmp_path, cnns)
    other = zoo.Zoo(CNN, support.random_params(CNN, 1, models=(3,)), {}, {})
    with pytest.raises(
        FileExistsError,
        match=r"files \['weights.npy', 'metrics.csv.gz', 'layout.csv'\] of a zoo exist already.*overwrite=True",
    ):
        small_cnn_zoo.save(tmp_path, other)
    support.assert_identical(small_cnn_zoo.load(tmp_path, activation="relu", step=None).params, cnns.params)
    small_cnn_zoo.save(tmp_path, other, overwrite=True)
    again = small_cnn_zoo.load(tmp_path, activation="relu", step=None)
    support.assert_identical(again.params, other.params)
    assert not again.records


@pytest.mark.parametrize("write", [1, 2, 3])
def test_an_interrupted_write_leaves_no_mixed_zoo(tmp_path, monkeypatch, write):
    (tmp_path / "notes.txt").write_text("a file of another kind, for which the folder is not replaced as a whole")
    small_cnn_zoo.save(tmp_path, random_cnns())
    replace, calls = small_cnn_zoo.os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == write:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(small_cnn_zoo.os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        small_cnn_zoo.save(tmp_path, random_cnns(records={}), overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"weights\.npy"):
        small_cnn_zoo.load(tmp_path, activation="relu", step=None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_failed_write_leaves_the_old_zoo(tmp_path, monkeypatch):
    cnns = random_cnns()
    small_cnn_zoo.save(tmp_path, cnns)
    monkeypatch.setattr(small_cnn_zoo.np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        small_cnn_zoo.save(tmp_path, random_cnns(records={}), overwrite=True)
    support.assert_identical(small_cnn_zoo.load(tmp_path, activation="relu", step=None).params, cnns.params)


@pytest.mark.parametrize(
    "arch",
    [
        sg.mlp((3, 4, 2)),
        sg.siren((2, 3, 1)),
        sg.cnn((1, 2), 2, strides=1),
        sg.cnn((1, 2), 2, padding="SAME"),
        sg.cnn((1, 2), 2, flatten=(5, 5)),
        support.batch_norm_mlp()[0],
    ],
    ids=str,
)
def test_architectures_that_the_format_cannot_hold_are_refused(tmp_path, arch):
    with pytest.raises(ValueError, match="cannot be stored in a Small CNN Zoo"):
        small_cnn_zoo.save(tmp_path, zoo.Zoo(arch, support.random_params(arch, models=(2,)), {}, {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"a": np.zeros((3, 2))}, r"records\['a'\] is float64 \(3, 2\)"),
        ({"a": np.array(["x", "y", "z"])}, r"records\['a'\] is <U1"),
        ({"a": np.zeros(3, np.uint64)}, "is uint64"),
        ({"": np.zeros(3)}, "under a name other than ''"),
        ({"config.activation": np.zeros(3)}, "other than '' and 'config.activation'"),
    ],
)
def test_records_that_the_format_cannot_hold_are_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        small_cnn_zoo.save(tmp_path, random_cnns(records=records))
    assert not list(tmp_path.iterdir())


def test_mixed_and_bfloat16_precision_are_refused(tmp_path):
    cnns = random_cnns()
    params = cnns.params | {"Dense_0": support.jax.tree.map(lambda x: x.astype(jnp.float16), cnns.params["Dense_0"])}
    with pytest.raises(ValueError, match=r"zoo\.params are float16, float32; expected"):
        small_cnn_zoo.save(tmp_path, zoo.Zoo(CNN, params, {}, {}))
    with pytest.raises(ValueError, match=r"zoo\.params are bfloat16"):
        small_cnn_zoo.save(tmp_path, random_cnns(dtype="bfloat16"))
    assert not list(tmp_path.iterdir())


def test_an_imported_network_of_pytorch_can_be_written(tmp_path):
    values = {"conv.weight": np.ones((2, 1, 3, 3)), "conv.bias": np.zeros(2), "fc.weight": np.ones((2, 2))}
    arch = sg.cnn((1, 2), 2)
    params = io.from_torch(arch, values | {"fc.bias": np.zeros(2)})
    small_cnn_zoo.save(tmp_path, zoo.Zoo(arch, support.rows(params, None), {}, {}))
    loaded = small_cnn_zoo.load(tmp_path, activation="relu", step=None)
    support.assert_identical(support.rows(loaded.params, 0), params)
