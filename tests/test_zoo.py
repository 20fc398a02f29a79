"""Networks trained in one program are those trained one by one, and files are read back bit for bit."""

import json
import struct
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import support

import jax_scalegmn as sg
from jax_scalegmn import network, zoo

ARCH = sg.siren((2, 4, 1), w0=10.0)
IMAGES = np.random.default_rng(0).uniform(size=(3, 4, 4)).astype(np.float32)
LABELS, INDEX = np.array([7, 8, 9]), np.array([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def fitted():
    return zoo.fit_images(ARCH, IMAGES, LABELS, image_index=INDEX, seed=3, num_steps=30, learning_rate=0.01)


def mean_square(params, row):
    return jnp.square(network.apply(ARCH, params, row["x"]) - row["y"]).mean()


DATA = {"x": jnp.linspace(-1, 1, 10).reshape(5, 2), "y": jnp.linspace(0, 1, 5)}
KEYS = jax.random.split(jax.random.key(1), 5)


def fit(rows, **options):
    options = {"num_steps": 10, "tx": optax.adam(0.01)} | options
    return zoo.fit(ARCH, mean_square, support.rows(DATA, rows), KEYS[rows], **options)


def test_every_network_is_the_one_fitted_alone():
    """However many are trained at once, a number that leaves a rest included; progress counts each network once."""
    whole = fit(slice(None))
    for size in (1, 4):
        done = []
        other = fit(slice(None), networks_at_once=size, progress=done.append)
        assert support.deviation(other.params, whole.params) < 1e-5
        np.testing.assert_allclose(other.records["loss"], whole.records["loss"], rtol=1e-3, atol=1e-8)
        assert sorted(done) == sorted({1: [1] * 5, 4: [4, 1]}[size])
    alone = fit(slice(3, 4))
    assert support.deviation(alone.params, whole[3:4].params) < 1e-5
    assert support.deviation(whole[2:3].params, whole[3:4].params) > 1e-2


def test_fitting_lowers_every_loss_from_the_initial_one():
    last = fit(slice(None), num_steps=100)
    first = jax.jit(jax.vmap(lambda row, key: mean_square(network.init(ARCH, key), row)))(DATA, KEYS)
    assert (last.records["loss"] < 0.5 * first).all()
    assert last.settings == {"steps": 100, "initialization": "standard"}


def test_records_tell_where_every_network_comes_from(fitted):
    assert len(fitted) == 5
    assert set(fitted.records) == {"loss", "psnr", "image_index", "label", "seed"}
    np.testing.assert_array_equal(fitted.records["image_index"], INDEX)
    np.testing.assert_array_equal(fitted.records["label"], LABELS[INDEX])
    np.testing.assert_array_equal(fitted.records["seed"], 3)
    np.testing.assert_allclose(fitted.records["psnr"], -10 * np.log10(fitted.records["loss"]), rtol=1e-6)
    assert fitted.settings == {"steps": 30, "initialization": "near_zero", "learning_rate": 0.01, "w0": 10.0}
    drawn = jax.jit(jax.vmap(lambda p: network.render(ARCH, p, (4, 4))))(fitted.params)
    np.testing.assert_allclose(fitted.records["loss"], np.square(drawn - IMAGES[INDEX]).mean((1, 2)), rtol=1e-4)
    assert not np.allclose(drawn[0], drawn[3])  # two independent fits of one image


def test_color_images_are_fitted_by_one_output_per_channel(fitted):
    arch = sg.siren((2, 4, 3), w0=10.0)
    colors = np.random.default_rng(1).uniform(size=(2, 4, 4, 3)).astype(np.float32)
    inrs = zoo.fit_images(arch, colors, LABELS, image_index=np.array([1, 0]), num_steps=30, learning_rate=0.01)
    drawn = jax.jit(jax.vmap(lambda p: network.render(arch, p, (4, 4))))(inrs.params)
    np.testing.assert_allclose(inrs.records["loss"], np.square(drawn - colors[[1, 0]]).mean((1, 2, 3)), rtol=1e-4)
    options = {"image_index": INDEX, "seed": 3, "num_steps": 30, "learning_rate": 0.01}
    assert support.deviation(zoo.fit_images(ARCH, IMAGES[..., None], LABELS, **options).params, fitted.params) < 1e-5
    for wrong in (IMAGES, colors[..., :2]):
        with pytest.raises(ValueError, match=r"has 3 outputs and expects \[images, height, width, 3\]"):
            zoo.fit_images(arch, wrong, LABELS, image_index=INDEX)


def test_slices_indices_and_masks_pick_networks(fitted):
    for rows in (slice(1, 3), np.array([1, 2]), fitted.records["label"] == 8):
        part = fitted[rows]
        np.testing.assert_array_equal(part.records["image_index"], INDEX[rows])
        support.assert_identical(part.params, support.rows(fitted.params, rows))


def test_scales_are_root_mean_squares_and_1_where_all_is_zero():
    params = support.random_params(ARCH, models=(4,))
    params["Dense_1"]["bias"] *= 0
    got = zoo.scales(zoo.Zoo(ARCH, params, {}, {}))
    expected = [np.sqrt(np.square(value).mean()) for value in (layer[k] for layer in params.values() for k in layer)]
    np.testing.assert_allclose(got, [*expected[:-1], 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(slice(None), tx=optax.sgd(1e30)), r"5 of 5 networks diverged .* in row 0. Lower the"),
        (lambda: fit(slice(0)), r"there are none: \[0\]"),
        (lambda: zoo.fit(ARCH, mean_square, DATA, KEYS[:3], tx=optax.sgd(1), num_steps=1), r"how many .*\[3, 5\]"),
        (lambda: fit(slice(None), num_steps=0), "num_steps is 0; expected a number >= 1"),
        (lambda: fit(slice(None), networks_at_once=0), "networks_at_once is 0; expected a number >= 1"),
        (
            lambda: zoo.fit_images(ARCH, 2 * IMAGES, INDEX, image_index=INDEX),
            r"Pixels are from .* expected .* \[0, 1\]",
        ),
        (lambda: zoo.fit_images(ARCH, IMAGES, INDEX, image_index=np.array([3])), r"entries outside of 0..2"),
        (
            lambda: zoo.Zoo(ARCH, support.random_params(ARCH, models=(2,)), {"loss": np.ones(3)}, {}),
            r"zoo.records\['loss'\] has 3 rows, zoo.params 2 networks: row 2 is missing",
        ),
        (lambda: zoo.Zoo(ARCH, support.random_params(ARCH), {}, {}), "leading sizes"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_are_read_back_bit_for_bit(fitted, tmp_path):
    path = tmp_path / "new" / "folder" / "inrs.safetensors"
    zoo.save(fitted, path)
    loaded = zoo.load(path)
    support.assert_identical(loaded.params, fitted.params)
    support.assert_identical(loaded.records, fitted.records)
    assert (loaded.arch, loaded.settings) == (fitted.arch, fitted.settings)
    assert [file.name for file in path.parent.iterdir()] == ["inrs.safetensors"]  # no temporary file is left


def test_records_of_any_byte_order_are_kept_and_names_are_refused(fitted, tmp_path):
    path, count = tmp_path / "inrs.safetensors", len(fitted)
    foreign = {kind: np.arange(count).astype(kind) for kind in (">i4", ">f8", "<u2", "?")}
    zoo.save(zoo.Zoo(fitted.arch, fitted.params, foreign, {}), path)
    for kind, values in zoo.load(path).records.items():
        np.testing.assert_array_equal(values, foreign[kind])
        assert values.dtype == np.dtype(kind).newbyteorder("=")
    with pytest.raises(ValueError, match=r"zoo.records\['name'\] is <U1; expected numbers or truth values"):
        zoo.save(zoo.Zoo(fitted.arch, fitted.params, {"name": np.array(["a"] * count)}, {}), tmp_path / "other")


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_parts_are_the_slices_of_the_zoo(fitted, tmp_path, size):
    zoo.save(fitted, tmp_path / "inrs.safetensors")
    parts = list(zoo.parts(tmp_path / "inrs.safetensors", size))
    assert [len(part) for part in parts] == [min(size, 5 - first) for first in range(0, 5, size)]
    joined = zoo.concatenate(parts)
    support.assert_identical(joined.params, fitted.params)
    support.assert_identical(joined.records, fitted.records)
    assert (joined.arch, joined.settings) == (fitted.arch, fitted.settings)


def test_parts_take_the_memory_of_one_part(tmp_path):
    path, count = tmp_path / "large.safetensors", 20_000
    params = {"Dense_0": {"kernel": np.ones((count, 2, 100), np.float32), "bias": np.ones((count, 100), np.float32)}}
    zoo.save(zoo.Zoo(sg.mlp((2, 100)), params, {}, {}), path)
    del params
    tracemalloc.start()
    try:
        assert sum(len(part) for part in zoo.parts(path, 500)) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 4e6
    with pytest.raises(ValueError, match="size is 0; expected 1 or more"):
        zoo.parts(path, 0)


def rewritten(path, change):
    """The file with its arrays and header changed, as a foreign writer would leave it."""
    arrays = safetensors.numpy.load_file(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    del header["sha256"]
    change(arrays, header)
    path.write_bytes(safetensors.numpy.save(arrays, metadata=header))


def flipped(path):
    """The file with one bit of its last number changed."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_architecture(arrays, header):
    header["arch"] = json.dumps(sg.siren((2, 5, 1)).as_json())


def not_a_number(arrays, header):
    arrays["params/Dense_0/bias"][2, 1] = np.nan


def of_another_dtype(path):
    """One tensor, of numbers of half a byte."""
    header = json.dumps(
        {
            "__metadata__": {"format": "jax_scalegmn.zoo/1", "arch": "{}", "settings": "{}"},
            "params/x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "truncated or foreign"),
        (lambda path: path.write_bytes(b"not a zoo"), "truncated or foreign"),
        (flipped, "not what zoo.save wrote, by its checksum"),
        (lambda path: path.write_bytes(safetensors.numpy.save({"x": np.ones(2)})), "format is None, expected 'jax"),
        (lambda path: rewritten(path, lambda arrays, header: header.update(format="v0")), "format is 'v0', expected"),
        (lambda path: rewritten(path, lambda arrays, header: header.update(arch="{}")), "does not describe an arch"),
        (lambda path: rewritten(path, lambda arrays, header: header.update(arch="{")), "Expecting property name"),
        (lambda path: rewritten(path, other_architecture), r"\['Dense_0'\]\['kernel'\] has shape \(2, 4\)"),
        (lambda path: rewritten(path, lambda a, _: a.pop("params/Dense_1/bias")), r"\['Dense_1'\]\['bias'\] is miss"),
        (
            lambda path: rewritten(path, lambda a, _: a.update({"records/x": np.ones(2)})),
            r"has 2 rows, zoo.params 5 networks: row 2 is missing|arrays have \[\(2,\), \(5,\)\] rows",
        ),
        (lambda path: rewritten(path, lambda a, _: a.update({"x": np.ones(2)})), "x is additional"),
        (lambda path: rewritten(path, lambda a, _: a.update({"params/Dense_0": np.ones(2)})), "is additional"),
        (lambda path: rewritten(path, lambda a, _: a.update({"records/x": np.ones(())})), "have no axis"),
        (lambda path: rewritten(path, lambda _, header: header.pop("arch")), "its header has no arch"),
        (lambda path: rewritten(path, lambda _, header: header.pop("settings")), "its header has no settings"),
        (lambda path: rewritten(path, lambda _, header: header.update(arch="[" * 10**5)), "nesting of its JSON"),
        (lambda path: rewritten(path, lambda _, header: header.update(settings="[" * 10**5)), "nesting of its JSON"),
        (lambda path: rewritten(path, lambda _, header: header.update(format="x" * 10**5)), "format is 'xxx"),
        (of_another_dtype, "F4|additional|dtype|truncated"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**25) + b"{" + bytes(2**25)), "metadata_bytes="),
        (lambda path: rewritten(path, not_a_number), r"\['Dense_0'\]\['bias'\] holds 1 NaN .* at \((2|0), 1\)"),
    ],
)
@pytest.mark.parametrize("read", [zoo.load, lambda path: list(zoo.parts(path, 2))], ids=["load", "parts"])
def test_damaged_and_foreign_files_are_refused_with_their_path(fitted, tmp_path, damage, message, read):
    path = tmp_path / "inrs.safetensors"
    zoo.save(fitted, path)
    damage(path)
    with pytest.raises(ValueError, match=rf"inrs.safetensors: .*({message})") as caught:
        read(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.slow
def test_zoos_are_used_without_flax():
    program = (
        "import sys, jax_scalegmn.zoo\nprint([name for name in ('flax', 'orbax', 'jraph') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: there is no such zoo"):
        zoo.load(tmp_path / "none.safetensors")
