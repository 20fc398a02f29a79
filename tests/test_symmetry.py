"""The elements form a group, and the group leaves the function alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import symmetry
from jax_scalegmn.architecture import Scaling


@jax.jit
def axioms(arch, params, a, b, c):
    """Pairs that the group axioms make equal."""
    act, compose, inverse = (functools.partial(f, arch) for f in (symmetry.act, symmetry.compose, symmetry.inverse))
    one = symmetry.identity(arch)
    return {
        "the identity changes nothing": (act(one, params), params),
        "identity on the left": (compose(one, a), a),
        "identity on the right": (compose(a, one), a),
        "the inverse undoes": (act(inverse(a), act(a, params)), params),
        "inverse on the left": (compose(inverse(a), a), one),
        "inverse on the right": (compose(a, inverse(a)), one),
        "associativity": (compose(compose(a, b), c), compose(a, compose(b, c))),
        "compose is act after act": (act(compose(a, b), params), act(a, act(b, params))),
    }, (act(a, params), act(compose(b, a), params), act(compose(a, b), params))


def test_group_axioms(arch, params):
    elements = support.random_elements(arch, 3)
    pairs, (moved, left, right) = axioms(arch, params, *(support.rows(elements, index) for index in range(3)))
    for claim, (got, expected) in pairs.items():
        assert support.deviation(got, expected) < 1e-5, claim
    assert support.deviation(moved, params) > 0.1  # the elements do something
    assert support.deviation(left, right) > 0.1  # and their order matters


@jax.jit
def outputs_of_orbit(arch, params, elements, x):
    return jax.vmap(lambda element: support.outputs(arch, symmetry.act(arch, element, params), x))(elements)


@pytest.mark.parametrize("dtype", support.TOLERANCE)
def test_the_function_is_preserved(arch, dtype):
    """For P, D and PD, four elements each; a permutation of one bias alone changes it."""
    with support.precision(dtype):
        params, x = support.random_params(arch, dtype=dtype), support.example(arch, dtype=dtype)
        expected = support.outputs(arch, params, x)
        for group in support.GROUPS.values():
            elements = support.random_elements(arch, 4, **group, dtype=dtype)
            for got in outputs_of_orbit(arch, params, elements, x):
                assert support.deviation(got, expected) < support.TOLERANCE[dtype]
        name = next(iter(params))
        params[name]["bias"] = params[name]["bias"][::-1]
        assert support.deviation(support.outputs(arch, params, x), expected) > 1e-2


@pytest.mark.parametrize("name", ["relu mlp", "relu cnn"])
def test_positive_scales_from_1e_minus_6_to_1e6_preserve_the_function(name):
    arch = support.ARCHITECTURES[name]
    params, x = support.random_params(arch), support.example(arch)
    elements = support.random_elements(arch, 1)
    extreme = symmetry.Element(
        elements.permutation, {k: np.float32(np.logspace(-6, 6, v.size)[None]) for k, v in elements.scale.items()}
    )
    expected = support.outputs(arch, params, x)
    assert support.deviation(outputs_of_orbit(arch, params, extreme, x)[0], expected) < 1e-5


@pytest.mark.parametrize("group", support.GROUPS.values(), ids=support.GROUPS)
def test_random_elements_are_of_the_group_that_was_asked_for(group, key):
    arch = support.ARCHITECTURES["mixed mlp"]
    draw = jax.jit(jax.vmap(lambda k: symmetry.random(arch, k, **group, log_scale_std=0.5)))
    stack = draw(jax.random.split(key, 400))
    for neurons in arch.hidden:
        order, scale = (np.asarray(mapping[neurons.name]) for mapping in stack)
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(neurons.width), (400, 1)))
        places = np.mean(order == np.arange(neurons.width), 0)
        np.testing.assert_allclose(places, 1 / neurons.width if group["permute"] else 1, atol=0.1)
        if not group["scale"] or neurons.scaling is Scaling.PERMUTATION:
            np.testing.assert_array_equal(scale, 1)
        elif neurons.scaling is Scaling.SIGN:
            assert set(np.unique(scale)) == {-1, 1}
            assert np.abs(scale.mean(0)).max() < 0.2
        else:
            assert np.log(scale).std() == pytest.approx(0.5, rel=0.1)


def test_an_orbit_holds_different_copies_of_one_function(key):
    arch = support.ARCHITECTURES["mixed mlp"]
    params = support.random_params(arch)
    stack = jax.jit(lambda k: symmetry.orbit(arch, params, k, 3))(key)
    x = support.example(arch)
    expected = support.outputs(arch, params, x)
    for index in range(3):
        one = support.rows(stack, index)
        assert support.deviation(support.outputs(arch, one, x), expected) < 1e-5
        assert support.deviation(one, support.rows(stack, index - 1)) > 0.1


def test_orbits_without_scale_move_and_without_permutation_flip():
    arch = support.ARCHITECTURES["siren"]
    params = support.random_params(arch)
    moved, flipped = (
        jax.jit(lambda k, only=only: symmetry.orbit(arch, params, k, 5, **only))(jax.random.key(1))["Dense_0"]["bias"]
        for only in (support.GROUPS["P"], support.GROUPS["D"])
    )
    bias = np.asarray(params["Dense_0"]["bias"])
    np.testing.assert_array_equal(np.sort(moved), np.tile(np.sort(bias), (5, 1)))
    np.testing.assert_array_equal(np.abs(flipped), np.tile(np.abs(bias), (5, 1)))
    assert (moved != bias).any()
    assert (flipped != bias).any()


@pytest.mark.parametrize("name", support.SIGN)
def test_act_maps_over_stacks_and_is_an_isometry_for_signs(name):
    """vmap is one by one; the gradient of |act(Q, p)|^2 / 2 is p."""
    arch = support.SIGN[name]
    stack = support.random_params(arch, models=(3,))
    elements = support.random_elements(arch, 3)
    moved = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))(arch, elements, stack)
    support.assert_identical(
        support.rows(moved, 1), support.act(arch, support.rows(elements, 1), support.rows(stack, 1))
    )

    def half_square(params):
        leaves = jax.tree.leaves(symmetry.act(arch, support.rows(elements, 0), params))
        return sum(jnp.square(leaf).sum() for leaf in leaves) / 2

    params = support.rows(stack, 0)
    assert support.deviation(jax.jit(jax.grad(half_square))(params), params) < 1e-6


def test_act_keeps_the_dtype():
    arch = support.ARCHITECTURES["siren"]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), support.random_params(arch))
    moved = support.act(arch, support.rows(support.random_elements(arch, 1), 0), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("call", [symmetry.act, symmetry.inverse, symmetry.compose])
@pytest.mark.parametrize("kind", ["stack", "foreign"])
def test_elements_that_do_not_fit_are_refused(call, kind):
    arch = support.ARCHITECTURES["siren"]
    foreign = symmetry.identity(support.ARCHITECTURES["relu cnn"])
    other = support.random_elements(arch, 2) if kind == "stack" else foreign
    rest = {symmetry.act: [support.random_params(arch)], symmetry.compose: [symmetry.identity(arch)]}.get(call, [])
    with pytest.raises(ValueError, match=r"element.permutation has layers .*'siren .* expects .*'hidden_0': \(5,\)"):
        call(arch, other, *rest)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (sg.siren((2, 3, 1)), {"scale": [1.0, -1.0, 0.5]}, "0.5 at place 2; expected \\+1 or -1"),
        (sg.mlp((2, 3, 1)), {"scale": [1.0, -1.0, 1.0]}, "-1.0 at place 1; expected positive"),
        (sg.mlp((2, 3, 1)), {"scale": [1.0, np.nan, 1.0]}, "nan at place 1"),
        (sg.mlp((2, 3, 1)), {"scale": [1e38, 1.0, 1.0]}, "at place 0; expected positive .* reciprocals are normal"),
        (sg.mlp((2, 3, 1), "gelu"), {"scale": [1.0, 1.0, 2.0]}, "2.0 at place 2; expected 1"),
        (sg.mlp((2, 3, 1)), {"permutation": [0, 0, 2]}, "lacks 1 of 3 neurons, like neuron 1"),
    ],
)
def test_elements_that_would_change_the_function_are_refused(network, change, message):
    fields = {name: {"hidden_0": jnp.asarray(value)} for name, value in change.items()}
    element = symmetry.identity(network)._replace(**fields)
    for refused in (
        lambda: symmetry.check(network, element),
        lambda: symmetry.act(network, element, support.random_params(network)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 16384), ("float32", 8.507e37), ("bfloat16", 8.507e37)])
def test_a_scale_that_params_cannot_hold_is_refused_with_the_largest_one_that_is_safe(dtype, largest):
    network = sg.mlp((2, 3, 1))
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0, dtype), support.random_params(network))
    element = symmetry.identity(network)
    for size in (largest, 1 / largest):
        element.scale["hidden_0"] = jnp.array([1.0, 1.0, size * (0.999 if size > 1 else 1.001)])
        moved = symmetry.act(network, element, params)
        assert all(bool(jnp.isfinite(leaf).all() & (leaf != 0).all()) for leaf in jax.tree.leaves(moved))
    if dtype == "float16":
        for size in (1e6, 1e-6):
            element.scale["hidden_0"] = jnp.array([1.0, 1.0, size])
            with pytest.raises(ValueError, match=r"place 2, and .* is of float16; expected at most 1.638e\+04"):
                symmetry.act(network, element, params)
