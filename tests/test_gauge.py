"""The norm-balanced gauge: equal norms, one member for every orbit, the same function, the smallest weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, matching, symmetry
from jax_scalegmn.architecture import Scaling

ARCHITECTURES = {name: support.ARCHITECTURES[name] for name in ("relu mlp", "relu cnn", "mixed mlp", "abs mlp")} | {
    "flat cnn": sg.cnn((1, 3, 4), 2, flatten=(15, 15)),
    "resnet": sg.resnet(8, widths=(4, 4, 6), input_channels=1),
    "resnet without norms": sg.resnet(8, widths=(4, 4, 6), input_channels=1, norm=None),
    "vgg": sg.vgg(((4,), (4, 6)), 3, input_channels=1, norm="batch"),
    "residual relu": support.HAND_WRITTEN["residual relu"][0],
}
balance, balanced = jax.jit(symmetry.balance), jax.jit(symmetry.balanced)
# The others are larger networks of the same kinds of layers: their programs compile for seconds.
FAST = ("relu mlp", "mixed mlp", "abs mlp", "flat cnn", "residual relu")
names = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES]
)


def norms(arch, params, layer):
    """Each neuron's squared incoming and outgoing norm, entry by entry in NumPy."""
    totals = {1: np.zeros(layer.width), -1: np.zeros(layer.width), 0: np.zeros(layer.width)}
    for parameter, value in zip(arch.parameters, architecture.unpack(arch, params), strict=True):
        for position, axis in enumerate(parameter.axes):
            if isinstance(axis, architecture.Axis) and axis.neurons == layer.name:
                rows = np.moveaxis(np.square(np.asarray(value, np.float64)), position, -1)
                totals[axis.power] += rows.reshape(-1, layer.width).sum(0)
    return totals[1], totals[-1]


@names
def test_incoming_and_outgoing_norms_are_equal(name):
    """And were not before; layers with other groups keep scale 1."""
    arch = ARCHITECTURES[name]
    params = support.random_params(arch)
    after = balanced(arch, params)
    for layer in arch.hidden:
        if layer.scaling.has_sizes:
            np.testing.assert_allclose(*norms(arch, after, layer), rtol=2e-5)
            assert not np.allclose(*norms(arch, params, layer), rtol=0.1)
        else:
            np.testing.assert_array_equal(balance(arch, params).scale[layer.name], 1)


@names
def test_an_orbit_has_one_balanced_member(name):
    """Scales from 1e-6 to 1e6, in float32 to 1e-5 of each array; permuted copies are permuted."""
    arch = ARCHITECTURES[name]
    params = support.random_params(arch)
    for seed in range(3):
        element = support.rows(support.random_elements(arch, 1, seed=seed), 0)
        rest = element._replace(scale={k: np.sign(s) for k, s in element.scale.items()})
        extreme = {k: np.sign(s) * np.abs(s) ** np.float32(4.6) for k, s in element.scale.items()}
        element = element._replace(scale=extreme)
        expected = support.act(arch, rest, balanced(arch, params))
        assert support.deviation(balanced(arch, support.act(arch, element, params)), expected) < 1e-5


def test_no_rescaling_has_smaller_weights():
    arch = ARCHITECTURES["relu mlp"]
    after = balanced(arch, support.random_params(arch))

    def size(params):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))

    @jax.jit
    @jax.vmap
    def size_nearby(key):
        return size(symmetry.act(arch, symmetry.random(arch, key, permute=False, log_scale_std=0.05), after))

    assert (size_nearby(jax.random.split(jax.random.key(0), 20)) > size(after)).all()


@pytest.mark.parametrize("arch", [ARCHITECTURES["relu mlp"], ARCHITECTURES["relu cnn"]], ids=str)
def test_the_function_is_preserved(arch):
    params, x = support.random_params(arch), support.example(arch)
    after = balanced(arch, params)
    assert support.deviation(support.outputs(arch, after, x), support.outputs(arch, params, x)) < 1e-5
    assert support.deviation(after, params) > 0.1


def test_pruned_networks_of_one_orbit_are_recognized():
    """Neurons that lost all weights of one side have a scale of their own, too."""
    arch = sg.mlp((3, 6, 5, 2), "relu")
    params = support.random_params(arch)
    params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].at[2].set(0)  # nothing reads it
    params["Dense_2"]["kernel"] = params["Dense_2"]["kernel"].at[jnp.array([0, 3])].set(0)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[:, 4].set(0)  # it reads nothing
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[4].set(0)
    for seed in range(3):
        element = symmetry.random(arch, jax.random.key(seed), log_scale_std=2.0)
        moved = support.act(arch, element, params)
        forms = [symmetry.canonical.form(arch, one) for one in (params, moved)]
        assert support.deviation(*forms) < 1e-5
        assert sg.matching.canonical_matching(arch, moved, params).similarity > 0.99999
        assert sg.matching.weight_matching(arch, moved, params).similarity > 0.99999


def test_one_layer_is_the_closed_form():
    """s^4 = outgoing^2 / incoming^2."""
    arch = sg.mlp((3, 4, 2))
    params = support.random_params(arch)
    incoming, outgoing = norms(arch, params, arch.hidden[0])
    np.testing.assert_allclose(balance(arch, params).scale["hidden_0"], (outgoing / incoming) ** 0.25, rtol=1e-5)


@pytest.mark.parametrize("side", ["incoming", "outgoing", "both"])
def test_neurons_with_weights_on_one_side_get_norm_1_and_those_without_any_keep_scale_1(side):
    arch = ARCHITECTURES["relu mlp"]
    params = support.random_params(arch)
    if side != "outgoing":
        params["Dense_0"] = {"kernel": params["Dense_0"]["kernel"].at[:, 1].set(0), "bias": jnp.zeros(5)}
    if side != "incoming":
        params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].at[1].set(0)
    scale = balance(arch, params).scale["hidden_0"]
    incoming, outgoing = (one[1] for one in norms(arch, balanced(arch, params), arch.hidden[0]))
    expected = {"incoming": (0, 1), "outgoing": (1, 0), "both": (0, 0)}[side]
    np.testing.assert_allclose((incoming, outgoing), expected, rtol=1e-5)
    assert (scale[1] == 1) == (side == "both")
    assert np.isfinite(scale).all()
    assert (scale != 1).sum() >= 4
    zeros = jax.tree.map(jnp.zeros_like, params)
    support.assert_identical(balanced(arch, zeros), zeros)


def test_batches_and_float64():
    arch = ARCHITECTURES["relu mlp"]
    with support.precision("float64"):
        stack = support.random_params(arch, models=(3,), dtype="float64")
        together = jax.jit(jax.vmap(symmetry.balanced, (None, 0)))(arch, stack)
        for index in range(3):
            alone = balanced(arch, support.rows(stack, index))
            assert support.deviation(support.rows(together, index), alone) < 1e-12
            np.testing.assert_allclose(*norms(arch, alone, arch.hidden[0]), rtol=1e-12)


def test_a_network_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"params\['Dense_0'\]\['kernel'\]"):
        symmetry.balance(ARCHITECTURES["relu mlp"], support.random_params(support.ARCHITECTURES["siren"]))


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16", "float64"), ("bfloat16",), ("float32", "float64")])
def test_any_precision_is_balanced_with_float64_switched_on(dtypes):
    """Half precision in float32, mixed arrays in their widest; weight matching goes on from any element there."""
    arch = ARCHITECTURES["relu mlp"]
    with support.precision("float64"):
        params = support.random_params(arch, dtype="float64")
        params = {
            name: jax.tree.map(lambda x, i=i: x.astype(dtypes[i % len(dtypes)]), layer)
            for i, (name, layer) in enumerate(params.items())
        }
        exact = balance(arch, jax.tree.map(lambda x: x.astype("float64"), params)).scale
        for name, scale in balance(arch, params).scale.items():
            np.testing.assert_allclose(scale, exact[name], rtol=1e-5)
        planted = support.rows(support.random_elements(arch, 1, scale=False), 0)
        result = matching.weight_matching(arch, params, symmetry.act(arch, planted, params), start=planted)
        np.testing.assert_array_equal(result.element.permutation["hidden_1"], planted.permutation["hidden_1"])


@pytest.mark.parametrize("name", ["relu mlp", "mixed mlp", "siren"])
def test_an_element_between_balanced_networks_becomes_one_between_the_given(name):
    """A planted element's permutations and signs are all that is left between the balanced networks."""
    arch = support.ARCHITECTURES[name]
    params, planted = support.random_params(arch), support.rows(support.random_elements(arch, 1, seed=3), 0)
    target = support.act(arch, planted, params)
    pair = jax.jit(symmetry.balanced_pair)(arch, params, target)
    assert all(neurons.scaling is not Scaling.POSITIVE for neurons in pair.arch.hidden)
    isometry = planted._replace(scale={name: np.sign(scale) for name, scale in planted.scale.items()})
    assert support.deviation(support.act(pair.arch, isometry, pair.source), pair.goal) < 1e-5
    element = pair.between_given(isometry)
    assert support.deviation(support.act(arch, element, params), target) < 1e-5
    assert support.deviation(element.scale, planted.scale) < 1e-5
    wrong = pair.between_given(symmetry.identity(arch))
    assert support.deviation(support.act(arch, wrong, params), target) > 1e-2


def test_a_pair_names_the_network_that_does_not_fit():
    arch, other = support.ARCHITECTURES["relu mlp"], support.ARCHITECTURES["siren"]
    with pytest.raises(ValueError, match=r"target\['Dense_0'\]\['kernel'\] has shape"):
        symmetry.balanced_pair(arch, support.random_params(arch), support.random_params(other))
