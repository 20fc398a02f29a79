"""One description, in the params of vanilla Flax, that refuses what does not fit it."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import architecture, matching, network, testing
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.models import graph

SIREN = support.ARCHITECTURES["siren"]


class FlaxMLP(nn.Module):
    widths: tuple
    activation: object
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        for width in self.widths[1:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x) + self.offset


class FlaxCNN(nn.Module):
    channels: tuple
    outputs: int
    activation: object
    sizes: tuple
    strides: int
    padding: str
    flatten: bool

    @nn.compact
    def __call__(self, x):
        for channels, size in zip(self.channels[1:], self.sizes, strict=True):
            x = self.activation(nn.Conv(channels, (size, size), self.strides, self.padding)(x))
        return nn.Dense(self.outputs)(x.reshape(-1) if self.flatten else x.mean((0, 1)))


@pytest.mark.parametrize(
    ("arch", "module"),
    [
        (SIREN, FlaxMLP((2, 5, 4, 1), lambda x: jnp.sin(30 * x), 0.5)),
        (support.ARCHITECTURES["tanh mlp"], FlaxMLP((3, 5, 4, 2), nn.tanh)),
        (support.ARCHITECTURES["relu cnn"], FlaxCNN((1, 3, 4), 2, nn.relu, (3, 3), 2, "VALID", flatten=False)),
        (support.ARCHITECTURES["tanh cnn"], FlaxCNN((2, 3, 4), 3, nn.tanh, (3, 2), 2, "SAME", flatten=True)),
        (
            sg.cnn((1, 2, 3), 2, activation="silu", kernel_size=(2, 5), strides=1, flatten=(7, 9)),
            FlaxCNN((1, 2, 3), 2, nn.silu, (2, 5), 1, "VALID", flatten=True),
        ),
    ],
    ids=str,
)
def test_params_and_function_are_those_of_vanilla_flax(arch, module, key):
    params, x = support.random_params(arch), support.example(arch)
    theirs = jax.eval_shape(module.init, key, x[0])["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, theirs)
    assert arch.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(theirs))
    expected = jax.jit(jax.vmap(module.apply, (None, 0)))({"params": params}, x)
    assert support.deviation(support.outputs(arch, params, x), expected) < 1e-6


def test_json_round_trip(arch):
    assert architecture.from_json(json.loads(json.dumps(arch.as_json()))) == arch


@pytest.mark.parametrize(
    "foreign",
    [
        {},
        {**SIREN.as_json(), "neurons": None},
        {**SIREN.as_json(), "neurons": [["input", 2]]},
        {**SIREN.as_json(), "layers": [{"type": "X"}]},
    ],
)
def test_foreign_json_is_refused(foreign):
    with pytest.raises(ValueError, match=r"does not describe an architecture .* expected .* got"):
        architecture.from_json(foreign)


def changed(path, value):
    """The JSON of a SIREN, with another value at a place."""
    description = json.loads(json.dumps(SIREN.as_json()))
    *places, last = path
    target = description
    for place in places:
        target = target[place]
    target[last] = value
    return description


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ([], "it has no name, neurons, parameters, layers"),
        (
            changed(["layers", 0, "activation", "name"], "evil"),
            r"layers\[0\]\.activation.*name is 'evil'; expected one of",
        ),
        (changed(["layers", 0, "activation"], 5), r"layers\[0\]\.activation is 5; expected"),
        (
            changed(["layers", 0, "activation", "frequency"], None),
            r"layers\[0\]\.activation\.frequency is None; expected",
        ),
        (changed(["layers", 0, "activation", "frequency"], 0), "frequency is 0"),
        (changed(["layers", 0, "activation", "frequency"], 1e39), r"frequency is 1e\+39; expected a finite number"),
        (changed(["layers", 0, "name"], []), r"layers\[0\]\.name is \[\]; expected a text"),
        (changed(["layers", 0, "name"], "Dense_7"), r"name the module \('Dense_7',\), which no parameter is in"),
        (changed(["layers", 1, "offset"], "x"), r"layers\[1\]\.offset is 'x'; expected a finite number"),
        (changed(["layers", 0], {"type": "MaxPool", "window": [2, 2], "strides": [2, 2]}), "MaxPool that gets vectors"),
        (changed(["layers", 0], {"type": "MaxPool", "window": [0, 2], "strides": [2, 2]}), r"window is 0; expected"),
        (changed(["layers"], {}), "layers is {}; expected a list"),
        (changed(["layers"], [{}] * 5001), r"number of layers is 5001; .*limits\(layers=5001\)"),
        (changed(["neurons", 0, 1], 4.5), r"neurons\[0\]\[1\] is 4\.5; expected a whole number"),
        (changed(["neurons", 0, 1], True), r"neurons\[0\]\[1\] is True; expected a whole number"),
        (changed(["neurons", 0, 1], 2**31), r"neurons\[0\]\[1\] is 2147483648; expected a whole number from 1"),
        (changed(["neurons", 0, 0], [1]), r"neurons\[0\]\[0\] is \[1\]; expected a text"),
        (changed(["neurons", 0, 2], "evil"), r"neurons\[0\]\[2\] is 'evil'; expected one of 'fixed'"),
        (changed(["parameters", 0, 0, 1], {}), r"parameters\[0\]\[0\]\[1\] is {}; expected a text"),
        (changed(["parameters", 0, 1, 0], ["input", -1, 1.5]), r"parameters\[0\]\[1\]\[0\]\[2\] is 1\.5; expected"),
        (changed(["parameters", 0, 1, 0], ["input", -1, 1, 2]), r"parameters\[0\]\[1\]\[0\]\[3\] is 2; expected"),
        (changed(["parameters", 0, 1, 0], ["nothing", -1, 1]), "no neuron layer 'nothing'"),
        (changed(["parameters", 0], []), r"parameters\[0\] has 0 entries"),
        (changed(["name"], None), "name is None; expected a text"),
    ],
)
def test_a_wrong_field_of_json_is_named(description, words):
    with pytest.raises(ValueError, match=rf"does not describe an architecture .*{words}") as caught:
        architecture.from_json(description)
    assert len(str(caught.value)) < 2000


def test_values_within_values_are_refused_at_once():
    for value in (doubled(60), doubled(100)):
        with pytest.raises(ValueError, match="does not describe an architecture") as caught:
            architecture.from_json(changed(["layers", 0], value))
        assert len(str(caught.value)) < 2000


def doubled(levels):
    value = {}
    for _ in range(levels):
        value = {"branch": [value, value]}
    return value


def stacked(count, *, shift=0):
    """`count` blocks of one array, each below the one before; the last one moved by `shift`."""
    neurons = [NeuronLayer(f"n{i}", 1, Scaling.FIXED) for i in range(count)] + [NeuronLayer("out", 2, Scaling.FIXED)]
    axes = (Axis("out", 1),)
    blocks = [
        Parameter(("kernel",), (Axis(f"n{i}", -1), *axes), (i + shift * (i == count - 1), 0)) for i in range(count)
    ]
    return "stacked", tuple(neurons), tuple(blocks)


def test_many_blocks_of_one_array_are_checked_in_linear_time():
    begin = time.process_time()
    assert Architecture(*stacked(4000)).array_shapes == {("kernel",): (4000, 2)}
    assert time.process_time() - begin < 10  # pairs of blocks would take minutes


@pytest.mark.parametrize("count", [5, 300])
def test_blocks_with_a_gap_or_an_overlap_are_refused(count):
    for shift in (1, -1):
        with pytest.raises(ValueError, match=r"without a gap or overlap|overlap\. Give each block"):
            Architecture(*stacked(count, shift=shift))


def test_a_block_may_overlap_one_and_leave_a_gap_of_the_same_size():
    sizes = {"a": 2, "b": 2, "c": 1}
    neurons = tuple(NeuronLayer(name, width, Scaling.FIXED) for name, width in sizes.items())
    places = {"a": (0, 0), "b": (1, 0), "c": (4, 0)}  # 2 + 2 + 1 rows of 5, row 1 twice and row 3 never
    blocks = tuple(Parameter(("kernel",), (Axis(name, -1), 1), place) for name, place in places.items())
    with pytest.raises(ValueError, match="overlap"):
        Architecture("overlap and gap", neurons, blocks)


def test_is_a_value_that_crosses_jit_and_vmap(arch, params):
    """Hashable, equal by content, without leaves: an equal description compiles nothing anew."""
    twin = architecture.from_json(json.loads(json.dumps(arch.as_json())))
    assert jax.tree.leaves(arch) == []
    assert hash(twin) == hash(arch)
    assert twin is not arch
    assert dataclasses.replace(arch, name="other") != arch
    traces = []

    @jax.jit
    def sizes(arch, params):
        traces.append(arch)
        return [jnp.size(value) for value in architecture.unpack(arch, params)]

    assert sum(sizes(arch, params)) == sum(sizes(twin, params)) == arch.num_parameters
    assert len(traces) == 1
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    support.assert_identical(jax.vmap(lambda a, p: architecture.pack(a, architecture.unpack(a, p)))(arch, stack), stack)


def test_check_stack_counts_networks_and_refuses_uneven_ones():
    stack = support.random_params(SIREN, models=(3,))
    assert architecture.check_stack(SIREN, stack) == 3
    stack["Dense_1"]["bias"] = stack["Dense_1"]["bias"][:2]
    with pytest.raises(ValueError, match=r"leading sizes \[2, 3\]; .* \[\"params\['Dense_1'\]\['bias'\]\","):
        architecture.check_stack(SIREN, stack)


def changed(path, value):
    """The SIREN's params with one entry replaced, or removed where the value is None."""
    params = support.random_params(SIREN)
    if value is None:
        del params[path[0]][path[1]]
    else:
        params.setdefault(path[0], {})[path[1]] = value
    return params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            changed(("Dense_0", "bias"), None),
            r"params\['Dense_0'\]\['bias'\] is missing; 'siren .*' expects shape \(5,\)",
        ),
        (
            changed(("Dense_9", "bias"), jnp.zeros(5)),
            r"params\['Dense_9'\]\['bias'\] is no parameter of 'siren .*has \[",
        ),
        ({"params": support.random_params(SIREN)}, r"Pass params\['params'\]"),
        (
            changed(("Dense_1", "kernel"), jnp.zeros((4, 5))),
            r"\['kernel'\] has shape \(4, 5\); 'siren .*expects \(5, 4\)",
        ),
        (changed(("Dense_1", "bias"), jnp.full(4, np.nan)), r"params\['Dense_1'\]\['bias'\] holds 4 NaN .* at \(0,\)"),
        (
            changed(("Dense_1", "bias"), jnp.array([1, 2, np.inf, 4])),
            r"holds 1 NaN or infinite .* at \(2,\); expected fi",
        ),
        (support.random_params(SIREN, models=(3,)), r"has shape \(3, 2, 5\); .* expects \(2, 5\).*jax.vmap"),
    ],
)
def test_wrong_params_are_refused_with_path_expected_and_got(params, message):
    with pytest.raises(ValueError, match=message):
        architecture.check_params(SIREN, params)


def test_unpacking_never_reads_values():
    """Neither outside `jax.jit`, where it would copy them from the device, nor inside, where there are none."""
    params = jax.tree.map(lambda leaf: leaf * np.nan, support.random_params(SIREN))
    shapes = [value.shape for value in architecture.unpack(SIREN, architecture.abstract_params(SIREN))]
    assert shapes == [value.shape for value in architecture.unpack(SIREN, params)]
    assert len(jax.jit(architecture.unpack)(SIREN, params)) == 6
    jax.jit(architecture.check_params)(SIREN, params)
    assert jax.jit(architecture.check_stack)(SIREN, sg.stacks.stack(params, params)) == 2


def test_paths_and_nested_dicts_are_inverse():
    for arch in (SIREN, CONCATENATION):
        params = support.random_params(arch)
        leaves = architecture.flatten(params)
        assert {path: leaf.shape for path, leaf in leaves.items()} == arch.array_shapes
        support.assert_identical(architecture.unflatten(leaves), params)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        assert architecture.abstract_params(arch) == shapes


def test_the_rank_of_inputs_follows_from_the_layers():
    ranks = {name: arch.input_rank for name, arch in support.ARCHITECTURES.items()}
    assert ranks == {name: 3 if "cnn" in name else 1 for name in ranks}
    assert sg.resnet(8).input_rank == 3
    with pytest.raises(ValueError, match="layers is empty"):
        _ = CONCATENATION.input_rank


def described(**changes):
    """A small architecture with one part of its description replaced."""
    parts = {
        "names": ("a", "b"),
        "width": 3,
        "power": 1,
        "repeat": 1,
        "axes": 1,
        "paths": ("x", "y"),
        "to": "b",
    } | changes
    neurons = tuple(NeuronLayer(name, parts["width"], Scaling.SIGN) for name in parts["names"])
    axis = Axis(parts["to"], parts["power"], parts["repeat"])
    return Architecture("small", neurons, tuple(Parameter((path,), (axis,) * parts["axes"]) for path in parts["paths"]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: described(names=("b", "b")), r"'small' names two neuron layers alike: \['b', 'b'\]"),
        (lambda: described(width=0), r"layer 'a' has width 0, not >= 1"),
        (lambda: described(paths=("x", "x")), "describes a parameter twice"),
        (lambda: described(power=2), r"\['x'\] has power 2 on 'b'; expected -1, 0 or 1"),
        (lambda: described(repeat=0), r"repeats 'b' 0 times; expected at least 1"),
        (lambda: described(axes=3), "has 3 neuron axes; expected 1 .* or 2"),
        (lambda: described(axes=0, paths=("x", "x")), "describes a parameter twice"),
        (lambda: described(to="c"), r"no neuron layer 'c'; it has \['a', 'b'\]"),
        (lambda: sg.mlp((3,)), r"widths are \(3,\); expected two or more"),
        (lambda: sg.mlp((3, 0, 2)), r"widths are \(3, 0, 2\)"),
        (lambda: sg.mlp((3, 4, 2), "swish"), "activation is 'swish', .* known are .*'tanh'"),
        (lambda: sg.mlp((3, 4, 2), ("relu", "relu")), "Got 2 activations .* for the 1 hidden"),
        (lambda: sg.mlp((3, 4, 2), "prelu"), "activation is 'prelu', .* sg.sequential has PReLU"),
        (lambda: sg.siren((2, 4, 1), w0=0.0), "w0 is 0.0; .* finite frequency other than 0"),
        (lambda: sg.siren((2, 4, 1), w0=np.nan), "w0 is nan"),
        (lambda: sg.siren((2, 4, 4, 1), w0=(30.0,)), r"w0 is \(30.0,\) for the 2 hidden layers"),
        (lambda: sg.siren((2, 4, 4, 1), w0=(30.0, 0.0)), "finite frequency other than 0"),
        (lambda: sg.cnn((1, 4), 2, padding=-1), "padding is -1; expected 'VALID' or 'SAME', or a number"),
        (lambda: sg.cnn((1, 4), 2, activation="swish"), "activation is 'swish'"),
        (lambda: sg.cnn((1, 4), 2, padding="same"), "padding is 'same'; expected 'VALID' or 'SAME'"),
        (lambda: sg.cnn((1, 4), 2, kernel_size=(3, 3)), "Got 2 kernel sizes .* for 1 convolutions"),
        (lambda: sg.cnn((1, 4), 2, kernel_size=0), "kernel sizes are .0., strides 2; expected numbers >= 1"),
        (lambda: sg.cnn((1, 4), 2, strides=0), "strides 0; expected numbers >= 1"),
        (lambda: sg.cnn((1, 4, 4), 2, flatten=(4, 4)), "Images of side 4 are too small"),
    ],
)
def test_impossible_descriptions_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_hand_written_description_without_layers_serves_all_but_network(key):
    arch, apply = support.batch_norm_mlp()
    params = support.random_params(arch)
    x = jnp.ones((1, 3))
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), params)
    assert support.deviation(apply(moved, x), apply(params, x)) < 1e-6
    support.assert_identical(jax.jit(matching.align)(arch, params, moved), moved)
    assert jax.jit(graph.from_params)(arch, params).nodes.shape == (10, 4)  # scale, bias, mean and var of every unit
    for call in (lambda: network.init(arch, key), lambda: network.apply(arch, params, x[0])):
        with pytest.raises(ValueError, match="'normalized mlp' does not say how to compute its function"):
            call()


@pytest.mark.parametrize(
    ("reads", "feeds", "message"),
    [
        (Axis("h", 1), Axis("x", -1), r"powers 1 and -1; .*Transpose kernels that are \[out, in\]"),
        (Axis("h", -1), Axis("h", 1), "leads from 'h' to itself"),
    ],
)
def test_kernels_lead_from_what_they_read_to_what_they_feed(reads, feeds, message):
    neurons = (NeuronLayer("x", 2, Scaling.FIXED), NeuronLayer("h", 2, Scaling.SIGN))
    with pytest.raises(ValueError, match=message):
        Architecture("wrong", neurons, (Parameter(("kernel",), (reads, feeds)),))


# Blocks: a kernel that reads a concatenation of two neuron layers, [3 + 4, 2], between them.
CONCATENATION = Architecture(
    "concatenation",
    (
        NeuronLayer("input", 2, Scaling.FIXED),
        NeuronLayer("left", 3, Scaling.SIGN),
        NeuronLayer("right", 4, Scaling.POSITIVE),
        NeuronLayer("output", 2, Scaling.FIXED),
    ),
    (
        Parameter(("left", "kernel"), (Axis("input", -1), Axis("left", 1))),
        Parameter(("right", "kernel"), (Axis("input", -1), Axis("right", 1))),
        Parameter(("head", "kernel"), (Axis("left", -1), Axis("output", 1)), (0, 0)),
        Parameter(("head", "kernel"), (Axis("right", -1), Axis("output", 1)), (3, 0)),
        Parameter(("head", "bias"), (Axis("output", 1),)),
    ),
)


def concatenation(params, x):
    left, right = jnp.tanh(x @ params["left"]["kernel"]), jax.nn.relu(x @ params["right"]["kernel"])
    return jnp.concatenate([left, right], -1) @ params["head"]["kernel"] + params["head"]["bias"]


def test_blocks_are_parts_of_an_array():
    params = support.random_params(CONCATENATION)
    blocks = architecture.unpack(CONCATENATION, params)
    assert params["head"]["kernel"].shape == CONCATENATION.array_shapes["head", "kernel"] == (7, 2)
    np.testing.assert_array_equal(blocks[2], params["head"]["kernel"][:3])
    np.testing.assert_array_equal(blocks[3], params["head"]["kernel"][3:])
    support.assert_identical(architecture.pack(CONCATENATION, blocks), params)
    stack = support.random_params(CONCATENATION, models=(3,))
    assert architecture.check_stack(CONCATENATION, stack) == 3
    support.assert_identical(
        jax.vmap(lambda p: architecture.pack(CONCATENATION, architecture.unpack(CONCATENATION, p)))(stack), stack
    )
    with pytest.raises(ValueError, match=r"\['head'\]\['kernel'\] has shape \(3, 2\); .* expects \(7, 2\)"):
        architecture.unpack(CONCATENATION, {**params, "head": {**params["head"], "kernel": blocks[2]}})


def test_blocks_go_through_json_and_whole_arrays_are_written_as_before():
    described = json.loads(json.dumps(CONCATENATION.as_json()))
    assert architecture.from_json(described) == CONCATENATION
    assert [len(fields) for fields in described["parameters"]] == [2, 2, 3, 3, 2]


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (((0, 0), (2, 0)), r"blocks of shapes \(3, 2\) at \(0, 0\) and \(4, 2\) at \(2, 0\) overlap"),
        (((0, 0), (4, 0)), r"shape \(8, 2\) has blocks for 14 of its 16 entries"),
        (((1, 0), (4, 0)), r"shape \(8, 2\) has blocks for 14 of its 16 entries"),
        (((-3, 0), (0, 0)), "expected offsets >= 0"),
        (((0,), (3,)), "expected one number of axes"),
        (((), (3, 0)), "each with its start"),
    ],
)
def test_blocks_that_overlap_or_leave_a_gap_are_refused(starts, message):
    blocks = [
        dataclasses.replace(block, start=start)
        for block, start in zip(CONCATENATION.parameters[2:4], starts, strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            CONCATENATION, parameters=(*CONCATENATION.parameters[:2], *blocks, *CONCATENATION.parameters[4:])
        )


def test_the_group_acts_on_blocks():
    """And a description with the blocks' layers exchanged is a wrong one."""
    params, x = support.random_params(CONCATENATION), jnp.asarray([[1.0, 0.5], [-0.3, 2.0]])
    testing.assert_function_preserved(CONCATENATION, concatenation, params, x)
    whole = Parameter(("head", "kernel"), (7, Axis("output", 1)))
    unread = dataclasses.replace(
        CONCATENATION, parameters=(*CONCATENATION.parameters[:2], whole, CONCATENATION.parameters[4])
    )
    with pytest.raises(AssertionError, match=r"acts wrongly: \['left', 'right'\]"):
        testing.assert_function_preserved(unread, concatenation, params, x)


def test_matching_and_graphs_see_blocks_as_arrays():
    params = support.random_params(CONCATENATION)
    moved = support.act(CONCATENATION, support.rows(support.random_elements(CONCATENATION, 1), 0), params)
    found = jax.jit(matching.weight_matching)(CONCATENATION, params, moved)
    assert support.deviation(support.act(CONCATENATION, found.element, params), moved) < 1e-5
    built = jax.jit(graph.from_params)(CONCATENATION, params)
    assert built.edges.shape[0] == 2 * 3 + 2 * 4 + 3 * 2 + 4 * 2
    support.assert_identical(jax.jit(graph.to_params)(CONCATENATION, built), params)


def test_vectors_with_spatial_axes_take_several_columns_of_a_graph():
    """A depthwise kernel, a repeated bias, and kernels of one and of two spatial axes side by side."""
    neurons = (
        NeuronLayer("x", 2, Scaling.FIXED),
        NeuronLayer("h", 3, Scaling.POSITIVE),
        NeuronLayer("y", 2, Scaling.FIXED),
    )
    parameters = (
        Parameter(("conv",), (2, 3, Axis("x", -1), Axis("h", 0))),
        Parameter(("depthwise",), (3, 2, 1, Axis("h", 1))),
        Parameter(("repeated",), (Axis("h", 0, 2),)),
        Parameter(("line",), (4, Axis("h", -1), Axis("y", 1))),
    )
    arch = Architecture("spatial vectors", neurons, parameters)
    assert graph.topology(arch).columns == (6, 0, 2)
    assert graph.topology(arch).kernel_size == (4, 3)
    params = support.random_params(arch)
    support.assert_identical(jax.jit(graph.to_params)(arch, jax.jit(graph.from_params)(arch, params)), params)


def test_params_of_a_description_of_variables_are_told_with_their_cure():
    arch = Architecture(
        "variables",
        (NeuronLayer("input", 2, Scaling.FIXED),),
        (Parameter(("params", "bias"), (Axis("input", 1),)),),
    )
    with pytest.raises(ValueError, match=r"pass \{'params': params\}, or infer it from params alone"):
        architecture.unpack(arch, {"bias": np.zeros(2)})


def test_what_is_passed_in_place_of_an_architecture_is_told_with_its_cure():
    # A user's program does not check types at run time, as the tests do.
    code = """
import jax_scalegmn as sg
arch = sg.mlp((2, 3, 1))
for other in ({}, sg.Inference(arch, ())):
    try:
        sg.architecture.unpack(other, {})
    except ValueError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "arch is of type dict; expected an Architecture. The architecture comes first, then params.",
        "arch is of type Inference; expected an Architecture. Pass its .arch.",
    ]
