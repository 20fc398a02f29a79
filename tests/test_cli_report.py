"""The numbers of a summary are those of the element and of the function, computed another way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, matching, symmetry
from jax_scalegmn.cli import _report
from jax_scalegmn.matching import Matching

MLP = support.ARCHITECTURES["mixed mlp"]  # tanh 5, leaky relu 4, gelu 6
ELEMENT = symmetry.Element(
    {"hidden_0": jnp.array([1, 0, 2, 4, 3]), "hidden_1": jnp.arange(4), "hidden_2": jnp.array([1, 2, 0, 3, 4, 5])},
    {
        "hidden_0": jnp.array([-1.0, 1, -1, -1, 1]),
        "hidden_1": jnp.array([0.5, 1, 4, 2]),
        "hidden_2": jnp.ones(6),
    },
)


def test_a_row_says_what_the_element_does():
    params = support.random_params(MLP)
    moved = support.act(MLP, ELEMENT, params)
    x = support.example(MLP)
    result = Matching(ELEMENT, jnp.asarray(0.5), jnp.asarray(3), jnp.asarray(False))
    row = _report.row(MLP, params, moved, moved, result, x)
    assert row["layers"] == {
        "hidden_0": {"neurons": 5, "moved": 4, "flipped": 3, "scales": [1.0, 1.0]},
        "hidden_1": {"neurons": 4, "moved": 0, "flipped": 0, "scales": [0.5, 4.0]},
        "hidden_2": {"neurons": 6, "moved": 3, "flipped": 0, "scales": [1.0, 1.0]},
    }
    assert (row["sweeps"], row["converged"]) == (3, False)
    np.testing.assert_allclose(row["similarity_before"], matching.similarity(MLP, params, moved), rtol=1e-6)
    np.testing.assert_allclose(row["similarity_after"], 1, rtol=1e-6)
    expected = support.deviation(support.outputs(MLP, moved, x), support.outputs(MLP, params, x))
    np.testing.assert_allclose(row["function_change"], expected, rtol=1e-6)
    assert row["function_change"] < 1e-5
    assert json.loads(json.dumps(row)) == row


def test_the_change_of_a_function_is_relative_to_its_largest_output():
    arch = sg.mlp((2, 3, 2))
    params = support.random_params(arch)
    shifted = params | {"Dense_1": params["Dense_1"] | {"bias": params["Dense_1"]["bias"] + jnp.array([0.0, 0.25])}}
    x = support.example(arch)
    change = _report.function_change(arch, params, shifted, x)
    np.testing.assert_allclose(change, 0.25 / np.abs(support.outputs(arch, params, x)).max(), rtol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert _report.function_change(arch, zeros, zeros, x) == 0
    assert _report.function_change(arch, params, shifted, None) is None
    huge = jax.tree.map(lambda leaf: 1e30 * leaf, params)
    with pytest.raises(ValueError, match="not finite"):
        _report.function_change(arch, huge, params, x)


def wrong(arch):
    """The same architecture with a group that its activation does not allow."""
    swap = {architecture.Scaling.PERMUTATION: architecture.Scaling.SIGN}
    neurons = tuple(dataclasses.replace(n, scaling=swap.get(n.scaling, n.scaling)) for n in arch.neuron_layers)
    return dataclasses.replace(arch, neuron_layers=neurons)


@pytest.mark.parametrize("name", ["siren", "mixed mlp", "tanh cnn"])
def test_the_group_of_an_architecture_passes(name, key):
    """Signs of dense and of convolutional layers, positive scales, and permutations alone."""
    arch = support.ARCHITECTURES[name]
    params = support.random_params(arch)
    assert _report.orbit_change(arch, params, key, support.example(arch), samples=3) < 1e-4


def test_a_group_that_the_activation_does_not_allow_is_refused(key):
    gelu = sg.mlp((3, 8, 8, 2), "gelu")
    params = support.random_params(gelu)
    x = support.example(gelu)
    assert _report.orbit_change(gelu, params, key, x) < 1e-5
    with pytest.raises(ValueError, match="described wrongly"):
        _report.orbit_change(wrong(gelu), params, key, x)


def test_random_inputs_have_a_size_that_the_network_takes(key):
    for name, shape in {"tanh mlp": (3,), "relu cnn": (32, 32, 1)}.items():
        arch = support.ARCHITECTURES[name]
        x = _report.random_inputs(arch, support.random_params(arch), key)
        assert x.shape == (16, *shape)
        assert jnp.abs(x).max() <= 1
        assert x.std() > 0.4
    square = sg.cnn((1, 2, 2), 2, flatten=(13, 13))
    x = _report.random_inputs(square, support.random_params(square), key)
    assert _report.outputs(square, support.random_params(square), x).shape == (16, 2)
    oblong = sg.cnn((1, 2), 2, strides=1, flatten=(5, 9))
    assert _report.random_inputs(oblong, support.random_params(oblong), key) is None
    bare = dataclasses.replace(square, layers=())
    assert _report.random_inputs(bare, support.random_params(bare), key) is None
