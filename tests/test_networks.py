"""A network is read from and written to every format with the same bits, names, wrappers and dtypes."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import support
from flax import serialization, traverse_util

import jax_scalegmn as sg
from jax_scalegmn import io, network
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.io import tensors

NETWORKS = {
    "relu mlp": support.ARCHITECTURES["relu mlp"],
    "tanh cnn": support.ARCHITECTURES["tanh cnn"],
    "resnet": sg.resnet(8, widths=(2, 3, 2), outputs=2),
}
MLP = NETWORKS["relu mlp"]


def tensors_of(arch, params):
    """The tensors of a PyTorch module, counters included."""
    state_dict = {}
    for name, value in io.to_torch(arch, params).items():
        state_dict[f"net.{name}"] = value
        if name.endswith("running_var"):
            state_dict[f"net.{name.removesuffix('running_var')}num_batches_tracked"] = np.array(7)
    return state_dict


def flat(tree, mark):
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree), sep=mark)


def write_msgpack(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


def write_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def write_wrapped(path, state_dict):
    tensors.write(path, state_dict, wrapper="model")


# Name of the file -> (how it is written, of what).
FORMATS = {
    "torch.pt": (tensors.write, tensors_of),
    "wrapped.pth": (write_wrapped, tensors_of),
    "torch.npz": (tensors.write, tensors_of),
    "torch.safetensors": (tensors.write, tensors_of),
    "slashes.npz": (tensors.write, lambda arch, params: flat(network.split_variables(params), "/")),
    "dots.safetensors": (tensors.write, lambda arch, params: flat(params, ".")),
    "slashes.safetensors": (tensors.write, lambda arch, params: flat({"params": params}, "/")),
    "bare.msgpack": (write_msgpack, lambda arch, params: params),
    "variables.msgpack": (write_msgpack, lambda arch, params: network.split_variables(params)),
    "params.msgpack": (write_msgpack, lambda arch, params: {"params": params}),
    "orbax": (write_orbax, lambda arch, params: network.split_variables(params)),
}


def saved(folder, name, arch, params):
    """The path of a file with that network."""
    write, tree = FORMATS[name]
    write(folder / name, tree(arch, params))
    return folder / name


def sibling(path):
    return path.with_name(f"new{path.suffix}")


@pytest.mark.parametrize("arch", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_network_comes_back_from_every_format(tmp_path, name, arch):
    params = support.random_params(arch)
    path = saved(tmp_path, name, arch, params)
    file = io.read_network(path, arch)
    support.assert_identical(file.params, params)
    assert file.format == io.FileFormat(path.suffix or "orbax", "model" if name == "wrapped.pth" else None)
    other = support.random_params(arch, seed=1)
    io.write_network(sibling(path), arch, other, file)
    expected = io.read_arrays(saved(tmp_path, f"{name}", arch, other) if remove(path) else path)
    got = io.read_arrays(sibling(path))
    assert got.format == expected.format
    support.assert_identical(got.arrays, expected.arrays)
    if path.suffix != ".safetensors":
        assert str(got.arrays) == str(expected.arrays), "another order"


def remove(path):
    """True once nothing is there."""
    if path.is_dir():
        path.rename(path.with_name("old"))
    else:
        path.unlink()
    return True


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "orbax"])
def test_half_precision_is_computed_in_float32_and_written_as_it_was(tmp_path, name, dtype):
    if name.endswith("npz") and dtype == "bfloat16":
        pytest.skip("npz has no bfloat16")
    params = support.random_params(MLP, dtype=dtype)
    path = saved(tmp_path, name, MLP, params)
    file = io.read_network(path, MLP)
    assert {leaf.dtype for leaf in jax.tree.leaves(file.params)} == {np.dtype("float32")}
    support.assert_identical(jax.tree.map(lambda leaf: leaf.astype(dtype), file.params), params)
    io.write_network(sibling(path), MLP, file.params, file)
    support.assert_identical(io.read_arrays(sibling(path)).arrays, file.stored)


@pytest.mark.parametrize("name", ["torch.pt", "bare.msgpack", "orbax"])
def test_double_precision_is_kept_where_jax_has_it(tmp_path, name):
    with support.precision("float64"):
        params = support.random_params(MLP, dtype="float64")
        path = saved(tmp_path, name, MLP, params)
        file = io.read_network(path, MLP)
        support.assert_identical(file.params, params)
        io.write_network(sibling(path), MLP, file.params, file)
        support.assert_identical(io.read_network(sibling(path), MLP).params, params)
    single = io.read_network(path, MLP)
    support.assert_identical(single.params, jax.tree.map(lambda leaf: np.asarray(leaf, "float32"), params))


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_only_replaced_on_request(tmp_path, name):
    params = support.random_params(MLP)
    path = saved(tmp_path, name, MLP, params)
    file = io.read_network(path, MLP)
    other = support.random_params(MLP, seed=1)
    with pytest.raises(FileExistsError, match="it exists already"):
        io.write_network(path, MLP, other, file)
    support.assert_identical(io.read_network(path, MLP).params, params)
    io.write_network(path, MLP, other, file, overwrite=True)
    support.assert_identical(io.read_network(path, MLP).params, other)


@pytest.mark.parametrize("name", FORMATS)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name, monkeypatch):
    params = support.random_params(MLP)
    path = saved(tmp_path, name, MLP, params)
    file = io.read_network(path, MLP)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)  # before anything is replaced
    with pytest.raises(OSError, match=f"{path}: .*no space left"):
        io.write_network(path, MLP, support.random_params(MLP, seed=1), file, overwrite=True)
    monkeypatch.undo()
    support.assert_identical(io.read_network(path, MLP).params, params)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_and_other_networks_are_refused_in_every_format(tmp_path, name):
    params = support.random_params(MLP)
    path = saved(tmp_path, name, MLP, params)
    for arch in (*(sg.mlp(widths) for widths in ((3, 5, 5, 2), (3, 5, 2), (3, 5, 4, 2, 2))), NETWORKS["resnet"]):
        with pytest.raises(ValueError, match=name):
            io.read_network(path, arch)
    file = io.read_network(path, MLP)
    spoilt = {**params, "Dense_1": {**params["Dense_1"], "bias": jnp.full(4, jnp.nan)}}
    with pytest.raises(ValueError, match="NaN"):
        io.write_network(sibling(path), MLP, spoilt, file)
    assert not sibling(path).exists()
    remove(path)
    write, tree = FORMATS[name]
    write(path, jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.size == 4 else leaf, tree(MLP, params)))
    with pytest.raises(ValueError, match=f"{name}.*NaN"):
        io.read_network(path, MLP)


def test_arrays_that_do_not_belong_there_are_named(tmp_path):
    params = support.random_params(MLP)
    path = tmp_path / "x.msgpack"
    for tree, message in [
        ({"params": params, "opt_state": {"count": np.array(3)}}, r"additional \[.*'opt_state'.*save its params alone"),
        ({"params": {**params, "Dense_9": np.ones(1)}}, r"additional \[.*'Dense_9'"),
        ({**params, "Dense_1": {"kernel": params["Dense_1"]["kernel"]}}, r"missing are .*'Dense_1'.*'bias'"),
        ({**params, "Dense_1": {"kernel": params["Dense_1"]["kernel"], "bias": np.ones(4, int)}}, "is int64; expected"),
        ({**params, "Dense_1": {"kernel": params["Dense_1"]["kernel"], "bias": 3.0}}, "is float"),
    ]:
        write_msgpack(path, tree)
        with pytest.raises(ValueError, match=f"x.msgpack: .*{message}"):
            io.read_network(path, MLP)
    tensors.write(tmp_path / "x.npz", {"net.0.weight": np.ones(3), "step": np.array(3)})
    with pytest.raises(ValueError, match=r"missing are .*additional .*'net.0.weight'.*'step'"):
        io.read_network(tmp_path / "x.npz", MLP)


def test_truncated_files_and_foreign_names_are_refused(tmp_path):
    for name in FORMATS:
        if name != "orbax":
            path = saved(tmp_path, name, MLP, support.random_params(MLP))
            path.write_bytes(path.read_bytes()[:-40])
            with pytest.raises(ValueError, match=name):
                io.read_network(path, MLP)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(30))
    with pytest.raises(ValueError, match=r"x\.h5: expected tensors by name"):
        io.read_arrays(tmp_path / "x.h5")
    for suffix in (".pt", ".msgpack", ".h5x"):
        with pytest.raises(FileNotFoundError, match="absent"):
            io.read_arrays(tmp_path / f"absent{suffix}")


def test_a_network_is_written_in_the_format_in_which_it_came(tmp_path):
    params = support.random_params(MLP)
    files = {name: io.read_network(saved(tmp_path, name, MLP, params), MLP) for name in ("torch.pt", "orbax")}
    with pytest.raises(ValueError, match=r"ends in \.pt or \.pth.*got '\.npz'"):
        io.write_network(tmp_path / "y.npz", MLP, params, files["torch.pt"])
    io.write_network(tmp_path / "y.pth", MLP, params, files["torch.pt"])
    with pytest.raises(ValueError, match="expected the name of a folder"):
        io.write_network(tmp_path / "y.pt", MLP, params, files["orbax"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="never replaced"):
        io.write_network(tmp_path / "folder", MLP, params, files["orbax"], overwrite=True)
    with pytest.raises(FileNotFoundError, match="Make the folder first"):
        io.write_network(tmp_path / "absent" / "y.pt", MLP, params, files["torch.pt"])


def test_numbers_too_large_for_their_dtype_are_named(tmp_path):
    params = support.random_params(MLP, dtype="float16")
    for name in ("torch.pt", "bare.msgpack"):
        file = io.read_network(saved(tmp_path, name, MLP, params), MLP)
        large = file.params | {"Dense_0": jax.tree.map(lambda leaf: 1e6 * leaf, file.params["Dense_0"])}
        with pytest.raises(ValueError, match="too large for its dtype float16"):
            io.write_network(sibling(tmp_path / name), MLP, large, file)


def test_several_parameters_may_be_blocks_of_one_array(tmp_path):
    widths, starts = {"a": 2, "b": 3, "out": 1}, {"a": (0, 0), "b": (2, 0)}
    neurons = tuple(NeuronLayer(name, width, Scaling.FIXED) for name, width in widths.items())
    blocks = (Parameter(("head", "kernel"), (Axis(name, -1), Axis("out", 1)), at) for name, at in starts.items())
    arch = Architecture("concatenation", neurons, tuple(blocks))
    params = {"head": {"kernel": jnp.arange(5.0)[:, None]}}
    write_msgpack(tmp_path / "x.msgpack", params)
    file = io.read_network(tmp_path / "x.msgpack", arch)
    support.assert_identical(file.params, params)
    io.write_network(tmp_path / "y.msgpack", arch, params, file)
    assert (tmp_path / "y.msgpack").read_bytes() == (tmp_path / "x.msgpack").read_bytes()


# --- what a file tells about the architecture -----------------------------------------------------------------------

ONES = np.ones((3, 3))


@pytest.mark.parametrize("name", FORMATS)
def test_the_widths_of_a_dense_chain_follow_from_every_format(tmp_path, name):
    arch = sg.mlp((3, *range(4, 15), 2), "tanh")  # more than ten layers, so that sorted names would be wrong
    path = saved(tmp_path, name, arch, support.random_params(arch))
    assert io.infer_mlp(io.read_arrays(path), "tanh") == arch


@pytest.mark.parametrize(
    ("name", "arrays", "activation", "message"),
    [
        ("x.npz", {"Dense_0/kernel": ONES}, "sine", "frequency of sines"),
        ("x.npz", {"Dense_0/kernel": ONES, "Dense_1/kernel": ONES}, "rely", "symmetry group is unknown"),
        ("x.npz", {"Dense_0/kernel": ONES, "Dense_1/kernel": ONES[:2]}, "relu", "not a chain of dense"),
        ("x.npz", {"Conv_0/kernel": np.ones((2, 3, 3, 1))}, "relu", "expected the kernels Dense_0"),
        ("x.npz", {"in/kernel": ONES, "out/kernel": ONES}, "relu", "expected the kernels Dense_0"),
        ("x.npz", {"noise": np.ones(3)}, "relu", "expected the kernels Dense_0"),
        ("x.pt", {"0.weight": np.ones((2, 3, 3, 3))}, "relu", "not a chain of dense"),
        ("x.pt", {"0.bias": np.ones(2)}, "relu", "not a chain of dense"),
        ("x.safetensors", {"a.weight": ONES, "b.weight": ONES[:2], "c.weight": ONES[:, :2]}, "relu", "several chains"),
    ],
)
def test_what_is_no_dense_chain_of_known_order_is_named(tmp_path, name, arrays, activation, message):
    tensors.write(tmp_path / name, arrays)
    with pytest.raises(ValueError, match=message):
        io.infer_mlp(io.read_arrays(tmp_path / name), activation)


@pytest.mark.parametrize("name", ["x.npz", "x.pt", "x.safetensors", "x.msgpack"])
def test_errors_stay_short_and_quick_whatever_names_a_file_has(tmp_path, name):
    many = {f"{'x' * 200}{place}.{kind}": ONES for place in range(200) for kind in ("weight", "other")}
    for arrays in ({"y" * 9000: ONES}, many):
        path = tmp_path / name
        if path.suffix == ".msgpack":
            path.write_bytes(serialization.msgpack_serialize(dict(arrays)))
        else:
            tensors.write(path, arrays, overwrite=True)
        file = io.read_arrays(path)
        for call in (lambda: io.as_network(file, MLP), lambda: io.infer_mlp(file, "relu")):  # noqa: B023
            begin = time.process_time()
            with pytest.raises(ValueError, match=name) as caught:
                call()
            assert len(str(caught.value)) < 2000
            assert time.process_time() - begin < 5


def test_a_chain_of_more_modules_than_python_recurses_is_found():
    widths = [3] * 1200
    names = np.random.default_rng(0).permutation([f"m{place}" for place in range(len(widths) - 1)])
    arrays = {
        f"{name}.weight": np.broadcast_to(np.float32(1), (out, inside))
        for name, inside, out in zip(names, widths, widths[1:], strict=False)
    }
    file = io.ArrayFile(Path("x.safetensors"), io.FileFormat(".safetensors"), arrays)
    assert [layer.width for layer in io.infer_mlp(file, "relu").neuron_layers] == widths
