"""A network with a function of its own: computed, looked into, matched by activations and repaired like a builder's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from jax_scalegmn import landscape, merge, network, symmetry
from jax_scalegmn.matching import _functions, activation_matching, straight_through_matching

KEYS = jax.random.split(jax.random.key(0), 12)


def without_biases(params, x):
    h = jax.nn.relu(x @ params["fc1"])
    return jax.nn.relu(h @ params["fc2"]) @ params["fc3"]


def weights(key):
    keys = jax.random.split(key, 3)
    shapes = {"fc1": (4, 9), "fc2": (9, 7), "fc3": (7, 2)}
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


X = jax.random.normal(KEYS[0], (40, 4)) + 0.5
OWN = sg.infer(without_biases, weights(KEYS[1]), X[:3]).arch


def test_the_function_is_computed_on_batches_and_on_single_examples():
    params = weights(KEYS[1])
    expected = without_biases(params, X)
    np.testing.assert_allclose(network.apply(OWN, params, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: network.apply(OWN, params, x))(X), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="was traced with inputs of shape"):
        network.apply(OWN, params, X[None, None])
    with pytest.raises(ValueError, match=r"x has shape \(40, 3\).* fails on one example"):
        network.check_examples(OWN, X[:, :3])


def test_several_inputs_are_no_examples():
    several, alone = (X[:, :3], X[:, 3:]), sg.mlp((4, 3, 1))
    arch = sg.infer(lambda p, xs: without_biases(p, jnp.hstack(xs)), weights(KEYS[1]), several).arch
    for own, message in (
        (arch, r"x is a tuple; .* was traced with inputs \[\(40, 3\), \(40, 1\)\]; expected one array"),
        (OWN, r"x is a tuple; .* was traced with inputs \[\(3, 4\)\]; expected one array"),
        (alone, r"x is a tuple that is no array.* expects one array, \[examples, inputs\] with 4 in the last axis"),
    ):
        with pytest.raises(ValueError, match=message):
            network.check_examples(own, several)
        with pytest.raises(ValueError, match=message):
            _functions.check_data(own, several, None)
    with pytest.raises(ValueError, match=r"x is a tuple that is no array.* expected one array"):
        _functions.check_data(alone, several, None, lambda params, x: x)


def test_pre_activations_are_found_and_follow_the_group():
    params = weights(KEYS[1])
    element = symmetry.random(OWN, KEYS[2])
    before, after = (network.activations(OWN, p, X[0]) for p in (params, symmetry.act(OWN, element, params)))
    np.testing.assert_allclose(before["fc1"][0], X[0] @ params["fc1"], rtol=1e-5)
    for name, (value,) in before.items():
        expected = value[element.permutation[name]] * element.scale[name]
        np.testing.assert_allclose(after[name][0], expected, rtol=1e-4, atol=1e-4)


def test_two_descriptions_are_equal_if_they_hold_the_same_function():
    again = sg.infer(without_biases, weights(KEYS[1]), X[:3]).arch
    other = sg.infer(lambda params, x: without_biases(params, x), weights(KEYS[1]), X[:3]).arch
    assert again == OWN
    assert hash(again) == hash(OWN)
    assert other != OWN


def test_what_repair_cannot_correct_is_named():
    second = "its mean: it has no bias, so that its second moment is restored instead"
    assert merge.uncorrected(OWN) == {"fc1": second, "fc2": second}
    assert merge.uncorrected(sg.mlp((2, 3, 3, 1))) == {}
    assert merge.uncorrected(sg.vgg(((3,), (3,)), 2, norm="batch", input_channels=1)) == {}
    some = {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "g": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}

    def gated(params, x):
        return (jnp.tanh(x @ params["w"] + params["b"]) * (x @ params["g"])) @ params["v"]

    assert merge.uncorrected(sg.infer(gated, some, X[:3]).arch) == {"w": second}  # g has no bias
    with pytest.raises(ValueError, match="does not say how to compute"):
        merge.uncorrected(sg.architecture.from_json(OWN.as_json()))


def test_the_loss_between_networks_is_that_of_the_function():
    p, q = weights(KEYS[1]), weights(KEYS[2])

    def loss(params):
        return jnp.square(network.apply(OWN, params, X)).mean()

    found = landscape.barrier(loss, p, q, num_points=3)
    middle = {name: (p[name] + q[name]) / 2 for name in p}
    losses = [float(jnp.square(without_biases(params, X)).mean()) for params in (p, middle, q)]
    assert float(found.height) == pytest.approx(max(0, losses[1] - (losses[0] + losses[2]) / 2), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_straight_through_brings_a_moved_copy_back():
    target = weights(KEYS[1])
    params = symmetry.act(OWN, symmetry.random(OWN, KEYS[3], log_scale_std=0.1), target)
    y = without_biases(target, X)

    def loss(params, rows):
        return jnp.square(network.apply(OWN, params, X[rows]) - y[rows]).mean()

    rows = jax.random.randint(KEYS[4], (60, 16), 0, len(X))
    found = straight_through_matching(OWN, params, target, loss, rows)
    assert found.similarity > 0.99


def test_a_planted_element_is_found_from_activations():
    target = weights(KEYS[1])
    moved = symmetry.act(OWN, symmetry.random(OWN, KEYS[2]), target)
    back = symmetry.act(OWN, activation_matching(OWN, moved, target, X).element, moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), back, target)


@pytest.mark.slow
def test_without_biases_repair_restores_second_moments():
    ends = sg.stacks.stack(weights(KEYS[1]), weights(KEYS[3]))
    merged = merge.average(ends)
    repaired = merge.repair(OWN, merged, ends, X)

    def moments(params):
        values = jax.vmap(lambda x: network.activations(OWN, params, x))(X)
        return {name: (v.mean(0), v.std(0)) for name, (v,) in values.items()}

    each = jax.vmap(moments)(ends)
    for name, (mean, std) in moments(repaired).items():
        goal = jnp.square(each[name][0].mean(0)) + jnp.square(each[name][1].mean(0))
        np.testing.assert_allclose(jnp.square(mean) + jnp.square(std), goal, rtol=1e-3)
    assert (repaired["fc3"] == merged["fc3"]).all()


def branched(branches, params, x):
    return branches(dense(params, x), params["slopes"]) @ params["down"]


def dense(params, x):
    return x @ params["up"] + params["shift"]


def random(key, **shapes):
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(shapes.items())
    }


def distance_to_goal(params, ends, values):
    """The largest difference of a mean or standard deviation from the end points' average one."""

    def statistics(params):
        return jnp.stack([values(params, X).mean(0), values(params, X).std(0)])

    return float(jnp.abs(statistics(params) - jax.vmap(statistics)(ends).mean(0)).max())


BRANCHES = {
    "slopes": lambda h, s: jnp.where(h > 0, h, s * h),
    "gate": lambda h, s: h * jax.nn.sigmoid(s * h),
    "no other branch": lambda h, s: jnp.where(h > 0, s * h, 0),
    "shift of the first": lambda h, s: jnp.tanh(h + s) + jnp.tanh(h),
    "shift of the second": lambda h, s: jnp.tanh(h) + jnp.tanh(h + s),
    "both": lambda h, s: jnp.tanh(s * h) + jnp.tanh((s + 1) * h),
}


@pytest.mark.parametrize(
    "name", [name if name in ("slopes", "both") else pytest.param(name, marks=pytest.mark.slow) for name in BRANCHES]
)
def test_a_parameter_of_one_branch_leaves_the_pre_activation_before_it_to_be_repaired(name):
    shapes = {"up": (4, 6), "shift": (6,), "down": (6, 2), "slopes": (6,)}
    one, two = (random(key, **shapes) for key in KEYS[4:6])
    arch = sg.infer(functools.partial(branched, BRANCHES[name]), one, X[:3]).arch
    assert merge.uncorrected(arch) == {}
    ends = sg.stacks.stack(one, two)
    merged = merge.average(ends)
    repaired = merge.repair(arch, merged, ends, X)
    assert distance_to_goal(merged, ends, dense) > 0.1
    assert distance_to_goal(repaired, ends, dense) < 1e-5
    support.assert_identical(repaired["slopes"], merged["slopes"])
    (value,) = network.activations(arch, one, X[0])["up"]
    np.testing.assert_allclose(value, dense(one, X[:1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_before_the_slopes_of_a_list_of_layers_the_dense_layer_is_repaired(per_channel):
    arch = sg.sequential([sg.layers.Dense(6), sg.layers.PReLU(per_channel=per_channel), sg.layers.Dense(2)], (4,))
    one, two = (random(key, **{path[0]: shape for path, shape in arch.array_shapes.items()}) for key in KEYS[4:6])
    ends = sg.stacks.stack(one, two)
    merged = merge.average(ends)
    repaired = merge.repair(arch, merged, ends, X)
    assert merge.uncorrected(arch) == {}
    assert distance_to_goal(repaired, ends, lambda p, x: x @ p["0.weight"].T + p["0.bias"]) < 1e-5
    support.assert_identical(repaired["1.weight"], merged["1.weight"])


# The shapes of kernels and biases, and what is computed of the values that they give.
PACKED = {
    "gated": ((6, 2), lambda h, down: (jax.nn.silu(h[:, :6]) * h[:, 6:]) @ down),
    "two layers": ((12, 2), lambda h, down: jnp.tanh(h[:, :5]) @ down[:5] + jnp.sin(h[:, 5:]) @ down[5:]),
}


@pytest.mark.parametrize(
    ("name", "turned"),
    [("gated", False), *(pytest.param(*some, marks=pytest.mark.slow) for some in [("gated", True), ("two layers", 0)])],
)
def test_every_part_of_a_packed_bias_restores_the_means_of_its_layer(name, turned):
    down, rest = PACKED[name]

    def packed(params, x):
        return x @ (params["up"].T if turned else params["up"]) + params["shift"]

    shapes = {"up": (12, 4) if turned else (4, 12), "shift": (12,), "down": down}
    one, two = (random(key, **shapes) for key in KEYS[4:6])
    arch = sg.infer(lambda params, x: rest(packed(params, x), params["down"]), one, X[:3]).arch
    assert merge.uncorrected(arch) == {}
    ends = sg.stacks.stack(one, two)
    repaired = merge.repair(arch, merge.average(ends), ends, X)
    assert distance_to_goal(merge.average(ends), ends, packed) > 0.1
    assert distance_to_goal(repaired, ends, packed) < 1e-5


@pytest.mark.parametrize("kind", ["LayerNorm", pytest.param("RMSNorm", marks=pytest.mark.slow)])
def test_what_flax_normalizes_is_repaired_after_its_scale_and_nowhere_else(kind):
    """Flax multiplies the scale by the inverse size first: that product is no pre-activation."""
    module = getattr(nn, kind)()

    def normed(params, x):
        return module.apply({"params": {k: params[k] for k in ("scale", "bias") if k in params}}, dense(params, x))

    vectors = {"scale": (6,), "bias": (6,)} if kind == "LayerNorm" else {"scale": (6,)}
    one, two = (random(key, up=(4, 6), shift=(6,), down=(6, 2), **vectors) for key in KEYS[4:6])
    arch = sg.infer(lambda params, x: jnp.tanh(normed(params, x)) @ params["down"], one, X[:3]).arch
    (place,) = arch.function.places
    assert {arch.parameters[index].path[0] for index, _ in place.gains} == set(vectors)
    (values,) = jax.vmap(lambda x: network.at_places(arch, one, x))(X).values()
    np.testing.assert_allclose(values, normed(one, X), rtol=1e-4, atol=1e-5)
    ends = sg.stacks.stack(one, two)
    repaired = merge.repair(arch, merge.average(ends), ends, X)
    support.assert_identical(repaired["up"], merge.average(ends)["up"])
    if kind == "LayerNorm":
        assert merge.uncorrected(arch) == {}
        assert distance_to_goal(repaired, ends, normed) < 1e-5


SEQUENCES = jax.random.normal(KEYS[8], (40, 5, 4)) + 0.5
SHIFTS = {
    "positions": lambda p, h: h + p["places"],
    "positions of a batch": lambda p, h: h + p["places"][None],
    "a difference": lambda p, h: p["places"] - h,
    "a difference from a bias": lambda p, h: p["places"] - (h + p["shift"]),
}


@pytest.mark.parametrize(
    "name",
    [*list(SHIFTS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(SHIFTS)[1:])],
)
def test_shifts_of_positions_move_the_means_over_all_of_them(name):
    def values(params, x):
        return SHIFTS[name](params, x @ params["up"])

    shapes = {"up": (4, 6), "places": (5, 6), "shift": (6,), "down": (6, 2)}
    one, two = (random(key, **shapes) for key in KEYS[4:6])
    arch = sg.infer(lambda p, x: jnp.tanh(values(p, x)).mean(1) @ p["down"], one, SEQUENCES[:3]).arch
    assert merge.uncorrected(arch) == {}
    ends = sg.stacks.stack(one, two)
    merged = merge.average(ends)
    repaired = merge.repair(arch, merged, ends, SEQUENCES)

    def flat(params, x):
        return values(params, SEQUENCES).reshape(-1, 6)

    assert distance_to_goal(merged, ends, flat) > 0.1
    assert distance_to_goal(repaired, ends, flat) < 1e-5
    moved = repaired["places"] - merged["places"] * (repaired["up"] / merged["up"])[0]
    np.testing.assert_allclose(moved, jnp.broadcast_to(moved[0], moved.shape), atol=1e-5)


def test_attention_is_repaired_over_its_heads_and_these_are_named():
    """One kernel sets the sizes of heads and of what is along them: the wider layer's."""
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jax.random.normal(KEYS[8], (4, 5, 6))
    shapes = jax.eval_shape(module.init, KEYS[0], x)["params"]
    one, two = (
        {name: random(key, **{k: v.shape for k, v in own.items()}) for name, own in shapes.items()} for key in KEYS[4:6]
    )
    arch = sg.infer(lambda params, x: module.apply({"params": params}, x), one, x).arch
    assert merge.uncorrected(arch) == {
        "query": "its mean and standard deviation: its parameters act in other places, too"
    }
    ends = sg.stacks.stack(one, two)
    merged = merge.average(ends)
    repaired = merge.repair(arch, merged, ends, x)
    for name in ("query", "key", "value"):

        def flat(params, _, name=name):
            return (jnp.einsum("nti,ihd->nthd", x, params[name]["kernel"]) + params[name]["bias"]).reshape(-1, 3)

        assert distance_to_goal(merged, ends, flat) > 0.1
        assert distance_to_goal(repaired, ends, flat) < 1e-5


def rows(params, ids):
    return params["table"][ids.astype(int)].mean(1) + params["shift"]


# Some array acts in a second place.
TIED = {
    "embedding": lambda p, x: jnp.tanh(rows(p, x)) @ p["table"].T,
    "larger": lambda p, x: jnp.maximum(dense(p, x), p["shift"]) @ p["down"],
    "selected": lambda p, x: jnp.where(x[:, :1] > 0, dense(p, x), p["shift"]) @ p["down"],
    "joined": lambda p, x: (
        jnp.tanh(jnp.stack([h := dense(p, x), jnp.broadcast_to(p["shift"], h.shape)], 1)) @ p["down"]
    ),
    "returned": lambda p, x: (jnp.tanh(dense(p, x)) @ p["down"], jnp.abs(p["shift"]).sum()[None]),
}
IDS = jax.random.randint(KEYS[8], (40, 5), 0, 11).astype(float)


@pytest.mark.parametrize(
    "name", [name if name in ("embedding", "larger") else pytest.param(name, marks=pytest.mark.slow) for name in TIED]
)
def test_arrays_that_act_in_another_place_are_left_and_named(name):
    one, two = (random(key, table=(11, 6), up=(4, 6), shift=(6,), down=(6, 2)) for key in KEYS[4:6])
    x = IDS if name == "embedding" else X
    arch = sg.infer(TIED[name], one, x[:3]).arch
    (hidden,) = arch.hidden
    left = "its mean and standard deviation: its parameters act in other places, too"
    assert merge.uncorrected(arch) == {hidden.name: left}
    ends = sg.stacks.stack(one, two)
    merged = merge.average(ends)
    support.assert_identical(merge.repair(arch, merged, ends, x), merged)


def test_a_table_that_is_read_once_is_repaired():
    one, two = (random(key, table=(11, 6), shift=(6,), down=(6, 2)) for key in KEYS[4:6])
    arch = sg.infer(lambda params, ids: jnp.tanh(rows(params, ids)) @ params["down"], one, IDS[:3]).arch
    ends = sg.stacks.stack(one, two)
    repaired = merge.repair(arch, merge.average(ends), ends, IDS)
    assert merge.uncorrected(arch) == {}
    assert distance_to_goal(merge.average(ends), ends, lambda params, _: rows(params, IDS)) > 0.1
    assert distance_to_goal(repaired, ends, lambda params, _: rows(params, IDS)) < 1e-5


def test_a_normalization_beside_a_skip_and_the_layer_before_it_are_both_repaired():
    """The normalization's scale and bias set its outputs alone, kernel and bias of the layer the skip."""

    def norm(params, h):
        return (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True) * params["scale"] + params["bias"]

    def skipped(params, x):
        h = dense(params, x)
        return (h + jnp.tanh(norm(params, h) @ params["in"] + params["b"]) @ params["out"]) @ params["down"]

    shapes = {"up": (4, 6), "shift": (6,), "scale": (6,), "bias": (6,), "in": (6, 3), "b": (3,), "out": (3, 6)}
    one, two = (random(key, **shapes, down=(6, 2)) for key in KEYS[4:6])
    arch = sg.infer(skipped, one, X[:3]).arch
    ends = sg.stacks.stack(one, two)
    repaired = merge.repair(arch, merge.average(ends), ends, X)
    for values in (dense, lambda params, x: norm(params, dense(params, x))):
        assert distance_to_goal(merge.average(ends), ends, values) > 0.1
        assert distance_to_goal(repaired, ends, values) < 1e-5


def test_repair_of_a_builders_network_is_the_same_by_its_layers_and_by_its_function():
    arch = sg.mlp((4, 6, 5, 2), "tanh")
    one, two = (network.init(arch, key) for key in KEYS[4:6])
    ends = sg.stacks.stack(one, two)
    own = sg.infer(lambda p, x: jax.vmap(lambda v: network.apply(arch, p, v))(x), one, X[:3]).arch
    merged = merge.average(ends)
    results = [merge.repair(arch, merged, ends, X), merge.repair(own, merged, ends, X)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)
    support.assert_identical(merge.reset_batch_norm(own, merged, X), merged)


@pytest.mark.parametrize("name", ["vgg", pytest.param("resnet", marks=pytest.mark.slow)])
def test_statistics_are_reset_by_the_function_as_by_the_layers(name):
    options = {"norm": "batch", "input_channels": 1}
    arch = sg.vgg(((4,), (5,)), 2, **options) if name == "vgg" else sg.resnet(8, widths=(4, 5, 6), **options)
    params, x = network.init(arch, KEYS[6]), jax.random.normal(KEYS[7], (10, 8, 8, 1))
    own = sg.infer(lambda p, x: jax.vmap(lambda v: network.apply(arch, p, v))(x), params, x[:3]).arch
    expected = merge.reset_batch_norm(arch, params, x)
    assert support.deviation(expected, params) > 0.1
    for batch_size in (None, 4):
        got = merge.reset_batch_norm(own, params, x, batch_size=batch_size)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_statistics_of_layers_that_are_joined_before_their_normalization_are_reset():
    def normed(params, x):
        h = jnp.concatenate([x @ params["first"], x @ params["second"]], -1)
        return (h - params["mean"]) / jnp.sqrt(params["var"] + 1e-5)

    shapes = {"first": (4, 3), "second": (4, 5), "mean": (8,), "var": (8,), "down": (8, 2)}
    params = jax.tree.map(jnp.abs, random(KEYS[6], **shapes))
    arch = sg.infer(lambda params, x: jnp.tanh(normed(params, x)) @ params["down"], params, X[:3]).arch
    assert len(arch.parameters) == 8
    reset = merge.reset_batch_norm(arch, params, X)
    np.testing.assert_allclose(normed(reset, X).mean(0), np.zeros(8), atol=1e-5)
    np.testing.assert_allclose(normed(reset, X).std(0), np.ones(8), atol=1e-4)
    support.assert_identical(reset["down"], params["down"])


def test_arrays_of_weak_types_are_those_of_strong_ones():
    """JAX makes `jnp.full(8, 2.0)` weakly typed, and traces other operations for it."""

    def apply(params, x):
        h = (x @ params["up"] - params["mean"]) * jax.lax.rsqrt(params["var"] + 1e-5) + params["bias"]
        return jnp.tanh(h) @ params["down"]

    def network(var):
        leaves = {"up": (3, 5), "mean": 5, "bias": 5, "down": (5, 2)}
        return {name: jnp.ones(shape) for name, shape in leaves.items()} | {"var": var}

    x = jax.random.normal(jax.random.key(0), (8, 3))
    weak, strong = network(jnp.full(5, 2.0)), network(jnp.full(5, 2.0, jnp.float32))
    assert weak["var"].weak_type
    for first, second in ((weak, strong), (strong, weak)):
        arch = sg.infer(apply, first, x).arch
        reset = sg.merge.reset_batch_norm(arch, second, x)
        np.testing.assert_allclose(reset["mean"], (x @ second["up"]).mean(0), rtol=1e-5)
    doubles = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), strong)
    assert sg.infer(apply, doubles, np.asarray(x, np.float64)).arch.hidden == arch.hidden


def test_statistics_that_are_not_subtracted_once_are_named():
    shapes = {"bn.running_mean": (4,), "bn.running_var": (4,), "in": (3, 4), "out": (4, 2)}
    params, x = {name: jnp.ones(shape) for name, shape in shapes.items()}, jax.random.normal(KEYS[0], (6, 3))

    def folded(p, x):
        gain = jax.lax.rsqrt(p["bn.running_var"] + 1e-5)
        return jax.nn.relu(x @ p["in"] * gain - p["bn.running_mean"] * gain) @ p["out"]

    def twice(p, x):
        h = x @ p["in"] - p["bn.running_mean"]
        return jax.nn.relu(jax.nn.relu(h) - p["bn.running_mean"]) @ p["out"] / p["bn.running_var"].sum()

    def moved(p, x):
        return jax.nn.relu(x @ p["in"] - (p["bn.running_mean"] + 1)) @ p["out"] / p["bn.running_var"].sum()

    for function, count in ((folded, 0), (twice, 2), (moved, 0)):
        arch = sg.infer(function, params, x).arch
        with pytest.raises(
            ValueError, match=rf"the mean params\['bn.running_mean'\] from {count} values; expected one"
        ):
            merge.reset_batch_norm(arch, params, x)


def conv(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")  # NCHW and OIHW, as PyTorch has them


def norm(params, x):
    mean, var, scale, bias = (params[k][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def channels_first(params, x):
    x = jax.nn.relu(norm(params["bn"], conv(params["stem"]["weight"], x)))
    branch = jax.nn.relu(norm(params["bn1"], conv(params["conv1"]["weight"], x)))
    x = jax.nn.relu(x + norm(params["bn2"], conv(params["conv2"]["weight"], branch)))
    return x.mean((2, 3)) @ params["fc"]["weight"].T


def torch_like(key):
    keys = iter(jax.random.split(key, 20))
    shapes = {"stem": (5, 2, 3, 3), "conv1": (4, 5, 3, 3), "conv2": (5, 4, 3, 3), "fc": (3, 5)}
    params = {name: {"weight": jax.random.normal(next(keys), shape) / 3} for name, shape in shapes.items()}
    for name, width in {"bn": 5, "bn1": 4, "bn2": 5}.items():
        stored = ("running_mean", "running_var", "weight", "bias")
        params[name] = {k: jax.random.uniform(next(keys), (width,), minval=0.5, maxval=1.5) for k in stored}
    return params


@pytest.mark.slow
def test_channels_first_convolutions_and_residual_sums_are_matched_and_repaired():
    one, two = torch_like(KEYS[6]), torch_like(KEYS[7])
    x = jax.random.normal(KEYS[8], (12, 2, 4, 4))
    arch = sg.infer(channels_first, one, x[:2]).arch
    written = [[str(arch.parameters[i]) for i, _ in place.gains] for place in arch.function.places]
    assert written == [[f"['{name}']['{k}']" for k in ("weight", "bias")] for name in ("bn", "bn1", "bn2")]
    assert sorted(len(values) for values in network.activations(arch, one, x[0]).values()) == [1, 2]
    moved = symmetry.act(arch, symmetry.random(arch, KEYS[9]), one)
    back = symmetry.act(arch, activation_matching(arch, moved, one, x).element, moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), back, one)
    ends = sg.stacks.stack(one, two)
    repaired = merge.repair(arch, merge.average(ends), ends, x)

    def std(params):
        return norm(params["bn"], conv(params["stem"]["weight"], x)).std((0, 2, 3))

    np.testing.assert_allclose(std(repaired), jax.vmap(std)(ends).mean(0), rtol=1e-3)
