"""Kinds of fault that other software of this field has: each test holds the right value for one of their members."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, cli, io, landscape, matching, merge, network, stacks, testing
from jax_scalegmn.io import tensors

R = np.random.default_rng(0)


def normal(*shape):
    return R.normal(size=shape).astype("f")


# --- names that a format sorts, and modules of equal shape ----------------------------------------------------------

EQUAL = sg.mlp((6, 6, 6, 3))
ORDER = ["input", "hidden", "output"]


def modules(shapes, bias=True):
    """A state_dict as PyTorch has it: by module, weights before biases."""
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = normal(*shape)
        if bias:
            tensors[f"{name}.bias"] = normal(shape[0])
    return tensors


def dense(*names):
    """Modules 6 -> 6 -> ... -> 3 of those names."""
    return modules({name: (3 if name == names[-1] else 6, 6) for name in names})


def as_sorted(state_dict):
    return dict(sorted(state_dict.items()))


def first_kernels(params, count=3):
    return [np.asarray(params[f"Dense_{i}"]["kernel"]).T for i in range(count)]


def assert_order(arch, state_dict, names, **options):
    params = io.from_torch(arch, state_dict, **options)
    for kernel, name in zip(first_kernels(params, len(names)), names, strict=True):
        np.testing.assert_array_equal(kernel, state_dict[f"{name}.weight"])
    again = io.to_torch(arch, params, state_dict, **options)
    assert list(again) == list(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(again[key], value)


def test_sorted_names_of_equal_shape_are_refused_until_their_order_is_said(tmp_path, capsys):
    networks = [dense(*ORDER), dense(*ORDER)]
    for name, state_dict in zip("ab", networks, strict=True):
        safetensors.numpy.save_file(state_dict, tmp_path / f"{name}.safetensors")
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    arch = ["--arch", "mlp:6-6-6-3,relu"]
    for command in (["align", a, b, "--out", c], ["merge", a, b, "--out", c], ["check", a, b]):
        for described in (arch, ["--activation", "relu"]):
            assert cli.main([*command, *described]) == 2
            err = capsys.readouterr().err
            assert "['hidden', 'input'] have equal shapes" in err
            assert "--order" in err
            assert "order=" in err
    assert not (tmp_path / "c.safetensors").exists()
    assert cli.main(["align", a, b, "--out", c, *arch, "--order", "input, hidden,output"]) == 0
    assert "of the described network" in capsys.readouterr().out

    def function(state_dict, x):
        for name in ORDER:
            x = x @ state_dict[f"{name}.weight"].T + state_dict[f"{name}.bias"]
            x = x if name == "output" else np.maximum(x, 0)
        return x

    x = normal(20, 6)
    before, after = function(networks[0], x), function(safetensors.numpy.load_file(c), x)
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    assert cli.main(["check", a, *arch, "--order", "inptu,hidden,output"]) == 2
    assert "Did you mean 'input'" in capsys.readouterr().err


def test_a_sorted_dict_in_python_is_refused_and_an_order_of_pytorchs_is_read():
    state_dict = dense(*ORDER)
    assert_order(EQUAL, state_dict, ORDER)
    by_dtype = as_sorted(state_dict | {"output.bias": state_dict["output.bias"].astype("float64")})
    by_dtype = {k: v for wide in (True, False) for k, v in by_dtype.items() if (v.dtype == "float64") == wide}
    by_kind = {key: state_dict[key] for key in sorted(state_dict, key=lambda key: (key[-1] != "t", key))}
    for lost in (as_sorted(state_dict), by_dtype, by_kind, jax.tree.map(np.asarray, state_dict)):
        with pytest.raises(ValueError, match=r"\['hidden', 'input'\] have equal shapes.*order="):
            io.from_torch(EQUAL, lost)
        assert_order(EQUAL, lost, ORDER, order=ORDER)
        assert_order(EQUAL, lost, ORDER, order=ORDER[:2])


@pytest.mark.parametrize(
    "names",
    [
        ["0", "2", "10"],
        ["fc1", "fc2", "fc10"],
        ["net.layers.9.lin", "net.layers.10.lin", "net.layers.11.lin"],
        ["Dense_0", "Dense_1", "Dense_2"],
        ["fc1", "fc2", "out"],  # out has a shape of its own
        ["linear_1a", "linear_2a", "head"],
    ],
)
def test_names_that_number_themselves_tell_their_order(names):
    assert_order(EQUAL, as_sorted(dense(*names)), names)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["fc1", "fc2", "fc"], ["enc.0", "dec.0", "out"]])
def test_where_neither_shapes_nor_numbers_tell_the_order_is_unknown(names):
    square, state_dict = sg.mlp((4, 4, 4, 4)), modules(dict.fromkeys(names, (4, 4)))
    with pytest.raises(ValueError, match="have equal shapes, and their order is unknown: the names are sorted"):
        io.from_torch(square, as_sorted(state_dict))
    assert_order(square, as_sorted(state_dict), names, order=names)
    if names[0] != "a":  # not in an order that sorting gives
        assert_order(square, dict(reversed(as_sorted(state_dict).items())), names, order=names)


def test_shapes_that_force_the_order_need_no_names():
    arch, names = sg.mlp((5, 4, 3, 2)), ["z", "m", "a"]
    state_dict = modules({"z": (4, 5), "m": (3, 4), "a": (2, 3)})
    assert_order(arch, as_sorted(state_dict), names)
    assert_order(arch, dict(reversed(state_dict.items())), names)
    some = sg.mlp((5, 4, 4, 4, 2))  # forced at the ends alone
    state_dict = modules({"z": (4, 5), "m": (4, 4), "k": (4, 4), "a": (2, 4)})
    with pytest.raises(ValueError, match=r"Modules \['k', 'm'\] have equal shapes"):
        io.from_torch(some, as_sorted(state_dict))
    assert_order(some, as_sorted(state_dict), ["z", "m", "k", "a"], order=["m", "k"])
    assert_order(some, state_dict, ["z", "m", "k", "a"])


def test_numbers_that_contradict_the_order_of_the_file_are_named():
    state_dict = dense("fc2", "fc1", "out")
    with pytest.raises(ValueError, match="contradicts the numbers"):
        io.from_torch(EQUAL, state_dict)
    assert_order(EQUAL, state_dict, ["fc2", "fc1", "out"], order=["fc2", "fc1", "out"])


def test_wrong_orders_are_named():
    state_dict = as_sorted(dense(*ORDER))
    for order, message in [
        (["inputs", "hidden", "output"], r"names 'inputs', which is no module.*Did you mean 'input'\?"),
        (["qqq"], "names 'qqq', which is no module; there are"),
        (["input", "input"], "names a module twice"),
        ("input", "expected a list"),
        (["hidden"], "have equal shapes"),  # says nothing
        (["output", "input", "hidden"], "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            io.from_torch(EQUAL, state_dict, order=order)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_files_of_sorted_names_are_refused_in_every_format(tmp_path, suffix):
    state_dict, path = dense(*ORDER), tmp_path / f"a{suffix}"
    tensors.write(path, as_sorted(state_dict))
    with pytest.raises(ValueError, match=rf"a\{suffix}: Modules .* have equal shapes"):
        io.read_network(path, EQUAL)
    file = io.read_network(path, EQUAL, order=ORDER)
    assert file.order == tuple(ORDER)
    io.write_network(tmp_path / f"b{suffix}", EQUAL, file.params, file)
    for key, value in tensors.read(tmp_path / f"b{suffix}").items():
        np.testing.assert_array_equal(value, state_dict[key])
    if suffix != ".safetensors":
        tensors.write(path, state_dict, overwrite=True)
        assert io.read_network(path, EQUAL).order == tuple(ORDER)


def test_flax_names_are_the_layers_and_take_no_order(tmp_path):
    params = support.random_params(EQUAL)
    path = tmp_path / "a.npz"
    tensors.write(path, {f"{name}/{kind}": value for name, of in params.items() for kind, value in of.items()})
    support.assert_identical(io.read_network(path, EQUAL).params, params)
    with pytest.raises(ValueError, match="Leave it out"):
        io.read_network(path, EQUAL, order=["Dense_0"])


def normalized(widths, prefix="", conv="conv", norm="bn"):
    """Convolutions 3x3 and batch normalizations conv1, bn1, conv2, ... of PyTorch."""
    state_dict = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
        state_dict[f"{prefix}{conv}{i}.weight"] = normal(outputs, inputs, 3, 3)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state_dict[f"{prefix}{norm}{i}.{kind}"] = np.abs(normal(outputs))
        state_dict[f"{prefix}{norm}{i}.num_batches_tracked"] = np.array(3)
    return state_dict


def test_convolutions_and_normalizations_of_equal_shape():
    arch = sg.vgg(((4, 4), (4,)), 2, norm="batch", input_channels=4)
    good = normalized((4, 4, 4, 4)) | {"fc.weight": normal(2, 4), "fc.bias": normal(2)}
    expected = io.from_torch(arch, good)
    support.assert_identical(io.from_torch(arch, as_sorted(good)), expected)
    registered = dict(sorted(good.items(), key=lambda item: "bn" in item[0]))  # all convolutions first
    support.assert_identical(io.from_torch(arch, registered), expected)
    unnumbered = {key.translate(str.maketrans("123", "bca")): value for key, value in good.items()}
    support.assert_identical(io.from_torch(arch, unnumbered), expected)  # in PyTorch's order
    with pytest.raises(ValueError, match=r"Modules \['bna', 'bnb', 'bnc', 'conva', 'convb', 'convc'\]"):
        io.from_torch(arch, as_sorted(unnumbered))
    order = ["convb", "bnb", "convc", "bnc", "conva", "bna"]
    support.assert_identical(io.from_torch(arch, as_sorted(unnumbered), order=order), expected)


def test_a_sorted_residual_network_of_torchvision_is_read():
    """Its numbers, its shapes, and each normalization next to its convolution leave one order."""
    arch = sg.resnet(10, widths=(4, 4), outputs=2, input_channels=3)
    params = support.random_params(arch)
    module_of = {}
    layers = dict.fromkeys(parameter.path[:-1] for parameter in arch.parameters)
    blocks = sorted({layer[0] for layer in layers if len(layer) == 2}, key=lambda name: int(name.split("_")[1]))
    for layer in layers:
        kind, number = layer[-1].split("_")
        name = {"Conv": "conv", "BatchNorm": "bn", "Dense": "fc"}[kind] + (
            "" if kind == "Dense" else str(int(number) + 1)
        )
        at = blocks.index(layer[0]) if len(layer) == 2 else None
        prefix = "" if at is None else f"layer{at // 2 + 1}.{at % 2}."
        module_of[".".join(layer)] = prefix + name.replace("conv3", "downsample.0").replace("bn3", "downsample.1")
    kinds = io.to_torch(arch, params)
    state_dict = {f"{module_of[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": v for key, v in kinds.items()}
    support.assert_identical(io.from_torch(arch, as_sorted(state_dict)), params)


# --- modules without the usual weight and bias ----------------------------------------------------------------------

SMALL = sg.mlp((4, 8, 3))


def moved(arch, params, seed=5):
    """The params of the same function, moved by a random element."""
    return support.act(arch, support.rows(support.random_elements(arch, 1, seed=seed), 0), params)


def test_a_bias_that_is_not_there_is_zero_and_is_not_written():
    for state_dict in (
        modules({"0": (8, 4), "2": (3, 8)}, bias=False),
        {**modules({"0": (8, 4)}), "2.weight": normal(3, 8)},
    ):
        params = io.from_torch(SMALL, state_dict)
        assert not params["Dense_1"]["bias"].any()
        assert io.storable(SMALL, state_dict) is SMALL
        new = io.to_torch(SMALL, moved(SMALL, params), state_dict)
        assert list(new) == list(state_dict)
        support.assert_identical(io.from_torch(SMALL, new), moved(SMALL, params))
        with pytest.raises(ValueError, match=r"\['Dense_1'\]\['bias'\] is not 0 everywhere.*no bias to store"):
            io.to_torch(SMALL, params | {"Dense_1": {**params["Dense_1"], "bias": np.ones(3, "f")}}, state_dict)


SPELLINGS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@pytest.mark.parametrize(("g", "v"), SPELLINGS)
@pytest.mark.parametrize("shape", [(8, 1), (1, 1), ()])
def test_weight_normalization_is_read_and_written_in_both_spellings(g, v, shape):
    state_dict = {"0.bias": normal(8), f"0.{g}": normal(*shape), f"0.{v}": normal(8, 4)} | modules({"2": (3, 8)})
    params = io.from_torch(SMALL, state_dict)

    def kernel(state_dict):
        direction = state_dict[f"0.{v}"]
        norm = np.linalg.norm(direction, axis=1, keepdims=True) if shape == (8, 1) else np.linalg.norm(direction)
        return (direction * (state_dict[f"0.{g}"] / norm)).T

    np.testing.assert_allclose(params["Dense_0"]["kernel"], kernel(state_dict), rtol=2e-6)
    other = moved(SMALL, params)
    new = io.to_torch(SMALL, other, state_dict)
    assert {key: (value.shape, value.dtype) for key, value in new.items()} == {
        key: (np.shape(value), value.dtype) for key, value in state_dict.items()
    }
    np.testing.assert_allclose(kernel(new), other["Dense_0"]["kernel"], rtol=2e-6)
    dead = jax.tree.map(lambda leaf: leaf * 0, params)  # g = 0, and not 0 / 0
    assert np.array_equal(kernel(io.to_torch(SMALL, dead, state_dict)), dead["Dense_0"]["kernel"])


SPECTRAL = (
    ("weight_orig", "weight_u", "weight_v"),
    ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
)


@pytest.mark.parametrize("names", SPECTRAL)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_spectral_normalization_is_read_and_written_in_both_spellings(tmp_path, names, ending):
    """As PyTorch computes it in evaluation mode: weight / (u @ weight.flatten(1) @ v)."""
    w, u, v = (f"0.{name}" for name in names)
    state_dict = {"0.bias": normal(6), w: normal(6, 2, 3, 3), u: normal(6), v: normal(18)}
    state_dict |= modules({"3": (3, 6)})
    arch = sg.cnn((2, 6), 3)
    tensors.write(tmp_path / f"a{ending}", state_dict)
    file = io.read_network(tmp_path / f"a{ending}", arch)

    def kernel(stored):
        return (stored[w] / (stored[u] @ stored[w].reshape(6, -1) @ stored[v])).transpose(2, 3, 1, 0)

    np.testing.assert_allclose(file.params["Conv_0"]["kernel"], kernel(state_dict), rtol=2e-5)
    merged = merge.lerp(file.params, moved(arch, file.params), 0.5)  # of another norm than 1
    io.write_network(tmp_path / f"b{ending}", arch, merged, file)
    new = tensors.read(tmp_path / f"b{ending}")
    assert {key: (value.shape, value.dtype) for key, value in new.items()} == {
        key: (value.shape, value.dtype) for key, value in state_dict.items()
    }
    np.testing.assert_allclose(kernel(new), merged["Conv_0"]["kernel"], atol=2e-6)
    np.testing.assert_allclose(
        io.read_network(tmp_path / f"b{ending}", arch).params["Conv_0"]["kernel"], merged["Conv_0"]["kernel"], atol=2e-6
    )
    with pytest.raises(ValueError, match="a weight of zeros has no spectral normalization"):
        io.write_network(tmp_path / f"c{ending}", arch, jax.tree.map(jnp.zeros_like, merged), file)


def test_tensors_that_no_plain_module_has_are_named_with_their_cause(tmp_path):
    def spectral(*values):
        return {f"0.{name}": value for name, value in zip(SPECTRAL[0], values, strict=True)}

    rest = {"0.bias": normal(8)} | modules({"2": (3, 8)})
    for extra, message in [
        ({"0.weight_orig": normal(8, 4), "0.weight_u": normal(8)}, "spectral normalization"),
        (
            {"0.weight_orig": normal(8, 4), "0.weight_u": normal(7), "0.weight_v": normal(4)},
            r"weight_u'\] has shape \(7,\)",
        ),
        ({"0.weight_orig": normal(8, 4), "0.weight_u": normal(8) * 0, "0.weight_v": normal(4)}, "divides by u W v = 0"),
        (
            {"0.parametrizations.weight.original": normal(8, 4), "0.parametrizations.weight.0._u": normal(8)},
            "spectral normalization",
        ),
        ({"0.weight_orig": normal(8, 4), "0.weight_mask": normal(8, 4)}, "pruned"),
        ({"0.parametrizations.weight.original": normal(8, 4)}, "a parametrization"),
        ({"0.weight_g": normal(8, 1)}, "one of the two tensors of weight normalization"),
        ({"0.weight_g": normal(3, 1), "0.weight_v": normal(8, 4)}, r"has g \(3, 1\) for v"),
    ]:
        tensors.write(tmp_path / "a.pt", extra | rest, overwrite=True)
        with pytest.raises(ValueError, match=message) as caught:
            io.read_network(tmp_path / "a.pt", SMALL)
        assert "another network" not in str(caught.value)
        assert "Remove it" not in str(caught.value)


VGG = sg.vgg(((4,),), 2, norm="batch")


def test_a_batch_normalization_without_affine_stores_permutations_alone():
    state_dict = {"0.weight": normal(4, 3, 3, 3), "1.running_mean": normal(4), "1.running_var": normal(4) ** 2}
    state_dict |= {"n_averaged": np.array(7)} | modules({"9": (2, 4)})
    params = io.from_torch(VGG, state_dict)
    assert (params["BatchNorm_0"]["scale"] == 1).all()
    arch = io.storable(VGG, state_dict)
    assert [neurons.scaling.value for neurons in arch.hidden] == ["permutation"]
    other = moved(arch, params)
    new = io.to_torch(arch, other, state_dict)
    assert list(new) == list(state_dict)
    assert new["n_averaged"] == 7
    support.assert_identical(io.from_torch(arch, new), other)
    scaled = support.act(VGG, support.rows(support.random_elements(VGG, 1), 0), params)
    with pytest.raises(ValueError, match=r"\['scale'\] is not 1 everywhere.*io.storable"):
        io.to_torch(VGG, scaled, state_dict)
    with pytest.raises(ValueError, match="track_running_stats=False"):
        io.from_torch(VGG, {key: value for key, value in state_dict.items() if key != "1.running_mean"})


def test_the_bias_of_a_convolution_before_a_batch_normalization():
    state_dict = {"0.weight": normal(4, 3, 3, 3), "0.bias": normal(4)}
    state_dict |= {f"1.{kind}": np.abs(normal(4)) for kind in ("weight", "bias", "running_mean", "running_var")}
    state_dict |= modules({"9": (2, 4)})
    params = io.from_torch(VGG, state_dict)
    np.testing.assert_array_equal(params["BatchNorm_0"]["mean"], state_dict["1.running_mean"] - state_dict["0.bias"])
    new = io.to_torch(VGG, moved(VGG, params), state_dict)
    assert not new["0.bias"].any()
    assert list(new) == list(state_dict)
    support.assert_identical(io.from_torch(VGG, new), moved(VGG, params))


# --- tensors that are one tensor ------------------------------------------------------------------------------------


def tied():
    w = normal(8, 4)
    return {"enc.weight": w, "enc.bias": normal(8), "dec.weight": w.T, "dec.bias": normal(4)}


@pytest.mark.parametrize(("activation", "scaling"), [("relu", "permutation"), ("tanh", "sign")])
def test_a_tied_autoencoder_stays_tied(activation, scaling):
    whole, state_dict = sg.mlp((4, 8, 4), activation), tied()
    arch = io.storable(whole, state_dict)
    assert [neurons.scaling.value for neurons in arch.hidden] == [scaling]
    params = io.from_torch(whole, state_dict)
    new = io.to_torch(arch, moved(arch, params), state_dict)
    np.testing.assert_array_equal(new["enc.weight"], new["dec.weight"].T)
    assert not np.array_equal(new["enc.weight"], state_dict["enc.weight"])
    with pytest.raises(ValueError, match=r"'enc.weight'\] and .*'dec.weight'\] are one tensor.*io.storable"):
        io.to_torch(whole, support.random_params(whole), state_dict)


def test_a_module_used_twice_fixes_the_neurons_beside_it_or_is_refused():
    arch = sg.mlp((4, 8, 8, 8, 3))
    state_dict = modules({"0": (8, 4), "2": (8, 8), "4": (8, 8), "6": (3, 8)})
    state_dict["4.bias"] = state_dict["2.bias"]
    assert [n.name for n in io.storable(arch, state_dict).hidden] == ["hidden_0"]
    state_dict["4.weight"] = state_dict["2.weight"]
    with pytest.raises(ValueError, match=r"'2\.\w+'\] and .*'4\.\w+'\] are one tensor, which leaves .* no symmetry"):
        io.storable(arch, state_dict)
    state_dict["4.bias"] = normal(8)
    buffer = normal(100)
    state_dict |= {"2.weight": buffer[:64].reshape(8, 8), "4.weight": buffer[36:].reshape(8, 8)}
    with pytest.raises(ValueError, match=r"'2.weight'\] and .*'4.weight'\] overlap"):
        io.storable(arch, state_dict)
    flat = normal(128)  # disjoint views of one buffer are two tensors
    views = {"2.weight": flat[:64].reshape(8, 8), "4.weight": flat[64:].reshape(8, 8), "4.bias": normal(8)}
    assert io.storable(arch, state_dict | views) is arch


def test_tensors_that_a_file_says_are_one_are_one_in_memory(tmp_path):
    arch, state_dict = sg.mlp((4, 8, 4)), tied()
    copies = {key: value.copy() for key, value in state_dict.items()}
    groups = (("enc.weight", "dec.weight"),)
    file = io.as_network(io.ArrayFile(tmp_path / "a.pt", io.FileFormat(".pt"), copies, shared=groups), arch)
    assert np.shares_memory(file.stored["enc.weight"], file.stored["dec.weight"])
    assert io.storable(arch, file.stored) != arch
    with pytest.raises(ValueError, match="are one tensor, and would be written as two"):
        io.write_network(tmp_path / "b.pt", arch, support.random_params(arch), file)
    groups = (("enc.bias", "dec.bias"),)
    with pytest.raises(ValueError, match=r"'enc\.bias' and 'dec\.bias' share memory"):
        io.as_network(io.ArrayFile(tmp_path / "a.pt", io.FileFormat(".pt"), copies, shared=groups), arch)


# --- merging in half precision --------------------------------------------------------------------------------------


def test_half_precision_is_summed_in_float32_and_kept():
    dtype = "float16"
    one = {"w": jnp.ones((400, 400), dtype)}  # whose square is too large for it
    two = {"w": 2 * one["w"]}
    wide = np.linspace(0, 1, 3)[1]  # a float64
    stack = stacks.stack(one, two)
    results = {
        "slerp": merge.slerp(one, two, 0.5),
        "lerp": merge.lerp(one, two, wide),
        "traced t": jax.jit(lambda t: merge.lerp(one, two, t))(jnp.asarray(0.5)),
        "average": merge.average(stack),
        "piecewise": merge.piecewise(stack, jnp.asarray(0.5)),
        "soup": merge.soup(stack, jnp.array([0.0, 1.0])),
        "greedy": merge.greedy_soup(lambda p: jnp.where(p["w"][0, 0] == 2, 0.0, 1.0), stack).params,
        "tasks": merge.task_arithmetic(one, stacks.stack(merge.task_vector(one, two)), 0.5),
        "ties": merge.ties(one, stacks.stack(two), density=1.0, weight=0.5),
    }
    for name, result in results.items():
        assert result["w"].dtype == dtype, name
        assert (result["w"] == 1.5).all(), name


def test_sums_of_small_steps_in_half_precision_are_those_of_float32():
    base = {"w": jnp.full(1, 256.0, "bfloat16")}
    vectors = {"w": jnp.full((8, 1), 0.5, "bfloat16")}  # each of them alone is less than half a rounding
    assert merge.task_arithmetic(base, vectors, 1.0)["w"] == 260


def test_a_barrier_and_a_plane_of_half_precision():
    p, q, r = ({"w": jnp.asarray(normal(3), "bfloat16")} for _ in range(3))

    def loss(params):
        assert params["w"].dtype == "bfloat16"
        return params["w"].astype(jnp.float32).sum()

    assert abs(landscape.barrier(loss, p, q, num_points=3).height) < 0.1
    assert np.isfinite(landscape.plane(loss, p, q, r, num_points=2).losses).all()


# --- leaves that are no floating-point numbers ----------------------------------------------------------------------


def test_counters_and_masks_stay_as_they_are():
    state = {"w": jnp.ones(3), "steps": jnp.array(7), "mask": jnp.array([True, False])}
    other = {"w": 2 * jnp.ones(3), "steps": jnp.array(9), "mask": jnp.array([False, False])}
    third = {"w": jnp.arange(3.0), "steps": jnp.array(9), "mask": jnp.array([False, False])}
    stack = stacks.stack(state, other)
    for result in (
        merge.lerp(state, other, 0.5),
        merge.slerp(state, other, 0.5),
        merge.average(stack),
        merge.greedy_soup(lambda p: -p["w"].sum(), stack).params,
        merge.task_arithmetic(state, stacks.stack(merge.task_vector(state, other)), 0.5),
        merge.ties(state, stack, density=1.0),
    ):
        support.assert_identical({k: result[k] for k in ("steps", "mask")}, {k: state[k] for k in ("steps", "mask")})

    def loss(params):
        assert params["steps"].dtype == jnp.int32
        assert params["mask"].dtype == bool
        return params["w"].sum() + params["steps"]

    assert landscape.plane(loss, state, other, third, num_points=2, margin=0.0).losses[0, 0] == 10
    assert landscape.path(loss, state, other, num_points=2).metrics[0] == 10


def test_integer_weights_are_refused_at_the_door():
    arch = sg.mlp((2, 4, 1))
    params = support.random_params(arch)
    whole = jax.tree.map(lambda leaf: jnp.round(leaf * 100).astype(jnp.int8), params)
    for call in (
        lambda: matching.weight_matching(arch, whole, params),
        lambda: matching.weight_matching(arch, params, whole),
        lambda: jax.eval_shape(lambda p: matching.weight_matching(arch, p, params), whole),
        lambda: matching.canonical_matching(arch, whole, params),
        lambda: matching.activation_matching(arch, whole, params, jnp.ones((3, 2))),
        lambda: matching.sinkhorn_matching(arch, whole, params),
        lambda: matching.align_all(arch, stacks.stack(whole, whole)),
        lambda: network.apply(arch, whole, jnp.ones(2)),
        lambda: io.to_torch(arch, whole),
    ):
        with pytest.raises(ValueError, match=r"\['Dense_0'\]\['bias'\] is int8; expected floating-point numbers"):
            call()


# --- one diverged network among many --------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [matching.assignment.hungarian, matching.assignment.scipy])
def test_a_diverged_network_does_not_stop_the_others(assign):
    arch = sg.mlp((2, 4, 1))
    reference = support.random_params(arch, seed=9)
    zoo = stacks.stack(*(support.random_params(arch, seed) for seed in range(4)))
    ill = jax.tree.map(lambda leaf: leaf, zoo)
    ill["Dense_0"]["bias"] = zoo["Dense_0"]["bias"].at[2, 0].set(jnp.nan)
    match = jax.jit(jax.vmap(lambda p: matching.weight_matching(arch, p, reference, assign=assign)))
    well, result = match(zoo), match(ill)
    others = jnp.array([0, 1, 3])
    support.assert_identical(stacks.member(result, others), stacks.member(well, others))
    assert np.isnan(result.similarity[2])
    assert result.converged.tolist() == [*well.converged[:2].tolist(), False, bool(well.converged[3])]


@pytest.mark.slow
def test_every_matcher_marks_a_diverged_network():
    arch = sg.mlp((2, 4, 1))
    reference, x = support.random_params(arch, seed=9), jnp.ones((5, 2)) * jnp.arange(5.0)[:, None]
    ill = support.random_params(arch)
    ill["Dense_1"]["kernel"] = jnp.asarray(ill["Dense_1"]["kernel"]).at[0, 0].set(jnp.inf)
    zoo = stacks.stack(support.random_params(arch), ill)
    for match in (
        matching.unmatched,
        matching.canonical_matching,
        lambda arch, p, target: matching.activation_matching(arch, p, target, x),
    ):
        result = jax.vmap(lambda p, match=match: match(arch, p, reference))(zoo)
        assert np.isfinite(result.similarity[0])
        assert np.isnan(result.similarity[1])
        assert not result.converged[1]


# --- a check that zeros and ones hide errors from -------------------------------------------------------------------


def test_fresh_networks_hide_no_wrong_description():
    arch = sg.vgg(((4,),), 2, norm="batch", input_channels=1)
    params = network.init(arch, jax.random.key(0))
    x = jnp.asarray(normal(2, 4, 4, 1))
    apply = jax.jit(lambda p, x: jax.vmap(lambda v: network.apply(arch, p, v))(x))
    assert testing.assert_function_preserved(arch, apply, params, x, samples=2) < 1e-5
    index, mean = next((i, p) for i, p in enumerate(arch.parameters) if p.path[-1] == "mean")
    bad = dataclasses.replace(mean, axes=(architecture.Axis(mean.axes[0].neurons, 1),))  # right is power 0
    wrong = dataclasses.replace(arch, parameters=(*arch.parameters[:index], bad, *arch.parameters[index + 1 :]))
    with pytest.raises(AssertionError, match="mean"):
        testing.assert_function_preserved(wrong, apply, params, x, samples=2)


# --- groups that are right but too small ------------------------------------------------------------------------------

EVEN = {"cos": jnp.cos, "square": jnp.square, "gaussian": lambda z: jnp.exp(-z * z)}
ODD = {
    "clip": lambda z: jnp.clip(z, -1, 1),
    "min of max": lambda z: jnp.minimum(jnp.maximum(z, -0.5), 0.5),
    "max of min": lambda z: jnp.maximum(jnp.minimum(z, 0.5), -0.5),
    "clamp": lambda z: jax.lax.clamp(-1.0, z, 1.0),
    "hard_tanh": jax.nn.hard_tanh,
}


@jax.jit
def hard_tanh(z):
    """Not JAX's function of that name."""
    return jnp.where(z > 1, 1, jnp.where(z < -2, -2, z))


NEITHER = {
    "another hard_tanh": hard_tanh,
    "relu6": jax.nn.relu6,
    "another bound": lambda z: jnp.clip(z, -1, 2),
    "a half that is used twice": lambda z: jnp.minimum(low := jnp.maximum(z, -1.0), 1.0) + low,
    "no data": lambda z: jax.nn.gelu(z),
}


@pytest.mark.parametrize("layout", ["in, out", "out, in"])
@pytest.mark.parametrize("name", [*EVEN, *ODD, *NEITHER])
def test_even_activations_and_odd_clips_have_signs(name, layout):
    act = (EVEN | ODD | NEITHER)[name]
    turned = layout == "out, in"

    def fn(params, x):
        w, v = (params[name].T if turned else params[name] for name in "wv")
        return act(x @ w + params["b"]) @ v

    params = {"w": normal(4, 6), "b": normal(6), "v": normal(6, 3)}
    params = {key: jnp.asarray(value.T if turned else value) for key, value in params.items()}
    arch = sg.infer(fn, params, normal(5, 4)).arch
    (units,) = arch.hidden
    assert units.name == "w"  # the parameter that writes it, in both layouts
    assert units.scaling.value == ("permutation" if name in NEITHER else "sign")
    if name in NEITHER:
        return
    testing.assert_function_preserved(arch, jax.jit(fn), params, normal(5, 4), samples=1)
    if name not in ("cos", "clip"):
        return
    signs = jnp.array([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    moved = {"w": params["w"] * (signs[:, None] if turned else signs), "b": params["b"] * signs, "v": params["v"]}
    if name in ODD:
        moved["v"] = params["v"] * (signs if turned else signs[:, None])
    support.assert_identical(matching.align(arch, moved, params), params)


RELUS = {
    "relu": jax.nn.relu,
    "where": lambda z: jnp.where(z > 0, z, 0),
    "where not": lambda z: jnp.where(z < 0, jnp.zeros_like(z), z),
    "maximum": lambda z: jnp.maximum(0, z),
    "minimum": lambda z: -jnp.minimum(-z, 0.0),
    "clip": lambda z: jnp.clip(z, min=0),
    "mask": lambda z: z * (z > 0),
    "select": lambda z: jnp.select([z > 0], [z], 0.0),
    "leaky where": lambda z: jnp.where(z > 0, 1.0, 0.1) * z,
    "leaky maximum": lambda z: jnp.maximum(z, 0.1 * z),
    "abs as where": lambda z: jnp.where(z < 0, -z, z),
    "half of both": lambda z: (z + jnp.abs(z)) / 2,
}


@pytest.mark.parametrize("layout", ["in, out", "out, in"])
@pytest.mark.parametrize("name", RELUS)
def test_homogeneous_activations_have_positive_scales_however_they_are_written(name, layout):
    turned = layout == "out, in"

    def fn(params, x):
        w, v = (params[name].T if turned else params[name] for name in "wv")
        return RELUS[name](x @ w + params["b"]) @ v

    params = {"w": normal(4, 6), "b": normal(6), "v": normal(6, 3)}
    params = {key: jnp.asarray(value.T if turned else value) for key, value in params.items()}
    arch, notes = sg.infer(fn, params, normal(5, 4))
    assert [units.scaling.value for units in arch.hidden] == ["positive"]
    assert notes == ()
    testing.assert_function_preserved(arch, jax.jit(fn), params, normal(5, 4), samples=1)


# By name the activation, and whether it hides signs.
WITH_BOTH = {
    "abs": (jnp.abs, True),
    "root of the square": (lambda z: jnp.sqrt(jnp.square(z)), True),
    "norm of pairs": (lambda z: jnp.sqrt(jnp.square(z) + jnp.square(2 * z)), True),
    "none": (lambda z: z, False),
    "signed square, rooted": (lambda z: jnp.abs(z) * jnp.sign(z), False),
}


@pytest.mark.parametrize("layout", ["in, out", "out, in"])
@pytest.mark.parametrize("name", WITH_BOTH)
def test_homogeneous_activations_of_either_parity_have_signs_and_positive_scales(name, layout):
    (act, even), turned = WITH_BOTH[name], layout == "out, in"

    def fn(params, x):
        w, v = (params[name].T if turned else params[name] for name in "wv")
        return act(x @ w + params["b"]) @ v

    params = {"w": normal(5, 12), "b": normal(12), "v": normal(12, 3)}
    params = {key: jnp.asarray(value.T if turned else value) for key, value in params.items()}
    arch, notes = sg.infer(fn, params, normal(7, 5))
    assert [units.scaling for units in arch.hidden] == [architecture.Scaling.NONZERO]
    assert notes == ()
    assert architecture.from_json(arch.as_json()) == dataclasses.replace(arch, function=None)
    testing.assert_function_preserved(arch, jax.jit(fn), params, normal(7, 5), samples=2)
    # Not by `symmetry.act`: incoming arrays times q, outgoing ones by 1 / q, or 1 / |q| past an even function.
    q = jnp.asarray(np.random.default_rng(2).choice([-1, 1], 12) * np.exp(normal(12)))
    undone = 1 / (jnp.abs(q) if even else q)
    across = (lambda s: s[:, None]) if turned else (lambda s: s)
    moved = {
        "w": params["w"] * across(q),
        "b": params["b"] * q,
        "v": params["v"] * (undone if turned else undone[:, None]),
    }
    np.testing.assert_allclose(fn(moved, x := normal(7, 5)), fn(params, x), rtol=1e-4, atol=1e-4)
    aligned = matching.align(arch, moved, params)
    for key, value in params.items():
        np.testing.assert_allclose(aligned[key], value, atol=1e-5)


MATCHERS = {
    "weights": lambda arch, a, b, x: matching.weight_matching(arch, a, b),
    "activations": lambda arch, a, b, x: matching.activation_matching(arch, a, b, x),
    "search": lambda arch, a, b, x: matching.search_matching(arch, a, b, x, jax.random.key(2), max_sweeps=1),
    "sinkhorn": lambda arch, a, b, x: matching.sinkhorn_matching(arch, a, b, num_steps=2),
    "straight-through": lambda arch, a, b, x: matching.straight_through_matching(
        arch, a, b, x=x, key=jax.random.key(3), num_steps=2
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MATCHERS)
def test_the_planted_element_of_a_network_with_abs_is_found_by_every_matcher(name):
    arch = sg.mlp((5, 12, 10, 3), "abs")
    params, x = support.random_params(arch), jnp.asarray(normal(200, 5))
    element = sg.symmetry.random(arch, jax.random.key(1))
    assert {float(sign) for name in element.scale for sign in np.sign(element.scale[name])} == {-1.0, 1.0}
    there = sg.symmetry.act(arch, element, params)
    assert support.deviation(support.outputs(arch, there, x), support.outputs(arch, params, x)) < 1e-5
    back = sg.symmetry.inverse(arch, element)
    found = MATCHERS[name](arch, there, params, x)
    for layer, order in back.permutation.items():
        np.testing.assert_array_equal(found.element.permutation[layer], order)
        np.testing.assert_allclose(found.element.scale[layer], back.scale[layer], rtol=1e-4)


def test_a_search_tells_the_signs_before_abs_from_those_after():
    """From a start with every sign wrong, by exchanges that flip incoming arrays alone."""
    arch = sg.mlp((3, 4, 2), "abs")
    params, x = support.random_params(arch), jnp.asarray(normal(50, 3))
    flips = sg.symmetry.Element({"hidden_0": jnp.arange(4)}, {"hidden_0": -jnp.ones(4)})
    found = matching.search_matching(arch, params, params, x, jax.random.key(0), start=flips)
    assert float(found.loss) < 1e-10
    np.testing.assert_array_equal(np.sign(found.element.scale["hidden_0"]), 1)


# --- smaller groups without a reason ----------------------------------------------------------------------------------


def convolved(params, x):
    """Two convolutions with max pooling, in PyTorch's layout; the second has 5 channels on 2 x 2 places."""
    for i in "12":
        x = jax.lax.conv_general_dilated(x, params[f"{i}.weight"], (1, 1), "VALID") + params[f"{i}.bias"][:, None, None]
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return x


def flattened(params, x):
    maps = convolved(params, x)
    assert x.reshape(len(x), -1).ndim == 2  # a result that nothing uses pins no layer
    hidden = jax.nn.relu(maps.reshape(len(x), -1) @ params["3.weight"].T + params["3.bias"])
    return hidden @ params["4.weight"].T


def summed(params, x):
    return jnp.einsum("ochw,nchw->no", params["3.weight"], convolved(params, x))


def channels_first(head):
    shapes = {"1.weight": (4, 2, 3, 3), "1.bias": (4,), "2.weight": (5, 4, 3, 3), "2.bias": (5,)} | head
    return {name: jnp.asarray(normal(*shape)) for name, shape in shapes.items()}


HEADS = {
    flattened: {"3.weight": (6, 20), "3.bias": (6,), "4.weight": (3, 6)},
    summed: {"3.weight": (6, 5, 2, 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("fn", HEADS, ids=lambda fn: fn.__name__)
def test_maps_that_are_flattened_with_channels_slowest(fn):
    params, x = channels_first(HEADS[fn]), normal(3, 2, 14, 14)
    arch, notes = sg.infer(fn, params, x)
    names = ["1.weight", "2.weight", "3.weight"] if fn is flattened else ["1.weight", "2.weight"]
    assert [(n.name, n.scaling.value) for n in arch.hidden] == [(name, "positive") for name in names]
    assert not [note for note in notes if "output" in note]
    assert arch.array_shapes == {(key,): value.shape for key, value in params.items()}
    assert architecture.from_json(arch.as_json()) == dataclasses.replace(arch, function=None)
    testing.assert_function_preserved(arch, jax.jit(fn), params, x, samples=1)
    if fn is summed:
        return
    aligned = matching.align(arch, moved(arch, params), params)
    for name, value in params.items():
        np.testing.assert_allclose(aligned[name], value, rtol=1e-4, atol=1e-5)
    position = next(i for i, parameter in enumerate(arch.parameters) if parameter.joined)
    right = arch.parameters[position]
    assert right.joined == (2,)
    fastest = dataclasses.replace(right, axes=(right.axes[0], architecture.Axis("2.weight", 1, 4)), joined=())
    other = dataclasses.replace(
        arch, parameters=(*arch.parameters[:position], fastest, *arch.parameters[position + 1 :])
    )
    with pytest.raises(AssertionError, match=r"2\.weight"):  # channels fastest is another function
        testing.assert_function_preserved(other, jax.jit(fn), params, x, samples=1)


def test_joined_axes_of_blocks_and_of_no_size_are_refused():
    neurons = (sg.NeuronLayer("a", 2, sg.Scaling.FIXED), sg.NeuronLayer("b", 3, sg.Scaling.POSITIVE))
    axes = (sg.Axis("a", -1), 4, sg.Axis("b", 1))
    assert sg.Architecture("n", neurons, (sg.Parameter(("w",), axes, joined=(1,)),)).array_shapes == {("w",): (8, 3)}
    for options in ({"joined": (2,)}, {"joined": (0,)}, {"joined": (1,), "start": (0, 0, 0)}):
        with pytest.raises(ValueError, match="joins axes"):
            sg.Architecture("n", neurons, (sg.Parameter(("w",), axes, **options),))


# --- errors that name their cure --------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    arch = sg.mlp((64, 4, 3))
    params = support.random_params(arch)
    renamed = {f"fc{i}": params[f"Dense_{i}"] for i in (0, 1)}
    with pytest.raises(ValueError, match=r"is no parameter of .* The shapes are these: rename the arrays, or infer"):
        matching.align(arch, renamed, renamed)
    with pytest.raises(ValueError, match=r"Flatten each example: x\.reshape\(len\(x\), -1\)"):
        matching.activation_matching(arch, params, params, jnp.ones((5, 8, 8)))
    with pytest.raises(ValueError, match=r"Pass x\[None\] for one example"):
        matching.activation_matching(arch, params, params, jnp.ones(64))


def test_the_command_line_names_its_own_option(tmp_path, capsys):
    tensors.write(tmp_path / "a.npz", modules({"0": (4, 3), "2": (2, 4)}))
    (tmp_path / "b.npz").touch()
    paths = [str(tmp_path / name) for name in ("a.npz", "a.npz", "b.npz")]
    assert cli.main(["align", *paths[:2], "--activation", "relu", "--out", paths[2]]) == 2
    assert "Pass --overwrite to replace it" in capsys.readouterr().err


# --- the function that is described is not the user's -----------------------------------------------------------------


def test_repair_with_the_slope_that_the_network_has():
    slope = sg.layers.Activation("leaky_relu", slope=0.2)
    arch = sg.sequential([sg.layers.Dense(8), slope, sg.layers.Dense(8), slope, sg.layers.Dense(3)], (6,))
    p, q = ({name: jnp.asarray(normal(*shape)) for (name,), shape in arch.array_shapes.items()} for _ in range(2))
    x = jnp.asarray(normal(200, 6))

    def std(params):
        z = x @ params["0.weight"].T + params["0.bias"]
        return (jnp.where(z > 0, z, 0.2 * z) @ params["2.weight"].T + params["2.bias"]).std(0)

    repaired = merge.repair(arch, merge.lerp(p, q, 0.5), stacks.stack(p, q), x)
    np.testing.assert_allclose(std(repaired), (std(p) + std(q)) / 2, rtol=1e-4)


def test_builders_take_the_slope_that_the_network_has():
    arch = sg.architecture.parse("mlp:6-8-8-3,leaky_relu(0.2)")
    assert arch == sg.mlp((6, 8, 8, 3), "leaky_relu(0.2)") == sg.architecture.from_json(arch.as_json())
    assert {layer.scaling for layer in arch.hidden} == {sg.Scaling.POSITIVE}
    p, q = (network.init(arch, jax.random.key(seed)) for seed in (0, 1))
    x = jnp.asarray(normal(200, 6))

    def std(params):
        first, second = params["Dense_0"], params["Dense_1"]
        z = x @ first["kernel"] + first["bias"]
        return (jnp.where(z > 0, z, 0.2 * z) @ second["kernel"] + second["bias"]).std(0)

    repaired = merge.repair(arch, merge.lerp(p, q, 0.5), stacks.stack(p, q), x)
    np.testing.assert_allclose(std(repaired), (std(p) + std(q)) / 2, rtol=1e-4)
    assert "slope" not in json.dumps(sg.mlp((6, 8, 3), "leaky_relu").as_json())  # so that older descriptions stay


@pytest.mark.parametrize(
    ("name", "value"), [("gelu_exact", -0.158655), ("elu", -0.632121), ("relu6", 0.0), ("leaky_relu(0.3)", -0.3)]
)
def test_builders_know_the_activations_of_pytorch(name, value):
    arch = sg.mlp((1, 1, 1), name)
    params = {f"Dense_{i}": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)} for i in range(2)}
    assert float(network.apply(arch, params, jnp.array([-1.0]))[0]) == pytest.approx(value, abs=1e-5)
    assert float(network.apply(arch, params, jnp.array([9.0]))[0]) == (6 if name == "relu6" else 9)


@pytest.mark.parametrize("name", ["leaky_relu(x)", "leaky_relu(inf)", "leaky_relu()"])
def test_a_slope_is_a_finite_number(name):
    with pytest.raises(ValueError, match="expected a finite slope"):
        sg.mlp((2, 2, 1), name)
    description = sg.mlp((2, 2, 1), "relu").as_json()
    description["layers"][0]["activation"]["slope"] = 0.5
    with pytest.raises(ValueError, match=r"slope is 0\.5, which relu does not have"):
        sg.architecture.from_json(description)
