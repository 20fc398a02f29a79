"""The functions and the initial weights of the described networks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import builders, network

SIREN = support.ARCHITECTURES["siren"]


def test_first_coordinate_is_the_column_and_columns_run_fastest():
    expected = [(-1, -1), (0, -1), (1, -1), (-1, 1), (0, 1), (1, 1)]
    np.testing.assert_array_equal(network.coordinates(2, 3), np.float32(expected))


def test_an_inr_of_its_first_input_draws_a_ramp_along_the_columns():
    arch = builders.siren((2, 1))
    params = {"Dense_0": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.zeros(1)}}
    expected = np.tile(np.linspace(-1, 1, 4) + 0.5, (3, 1))
    np.testing.assert_allclose(network.render(arch, params, (3, 4)), expected, atol=1e-6)


def test_siren_is_its_formula():
    """h' = sin(w0 (h W + b)), output h W + b + 0.5, in plain NumPy."""
    params = support.random_params(SIREN)
    layers = [[np.float64(params[f"Dense_{i}"][name]) for name in ("kernel", "bias")] for i in range(3)]
    h = np.float64(network.coordinates(6, 5))
    for kernel, bias in layers[:-1]:
        h = np.sin(30 * (h @ kernel + bias))
    expected = (h @ layers[-1][0] + layers[-1][1] + 0.5).reshape(6, 5)
    image = network.render(SIREN, params, (6, 5))
    assert image.std() > 0.1
    np.testing.assert_allclose(image, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "initialization", "bounds"),
    [
        (
            builders.siren((2, 200, 200, 50)),
            network.standard,
            [(1 / 2, 1 / math.sqrt(2)), (math.sqrt(6 / 200) / 30, 1 / math.sqrt(200)), (math.sqrt(3 / 200), 0)],
        ),
        (
            builders.siren((2, 200, 200, 50)),
            network.near_zero,
            [(0.1, 0), (math.sqrt(6 / 200) / 30, 0), (1 / math.sqrt(200), 0)],
        ),
        (builders.mlp((20, 100, 20)), network.standard, [(math.sqrt(6 / 20), 0), (math.sqrt(3 / 100), 0)]),
        (builders.cnn((3, 50), 20), network.standard, [(math.sqrt(6 / 27), 0), (math.sqrt(3 / 50), 0)]),
        (builders.mlp((20, 100, 20), "tanh"), network.standard, [(math.sqrt(3 / 20), 0), (math.sqrt(3 / 100), 0)]),
    ],
)
def test_initial_weights_are_uniform_within_their_bounds(arch, initialization, bounds, key):
    params = network.init(arch, key, initialization=initialization)
    for layer, expected in zip(params.values(), bounds, strict=True):
        for value, bound in zip((layer["kernel"], layer["bias"]), expected, strict=True):
            assert 0.9 * bound <= jnp.abs(value).max() <= bound * (1 + 1e-6)
        assert layer["kernel"].std() == pytest.approx(expected[0] / math.sqrt(3), rel=0.1)
        assert abs(layer["kernel"].mean()) < 0.1 * expected[0]


def test_different_keys_and_layers_start_differently(key):
    arch = builders.mlp((4, 4, 4, 4), "tanh")  # three kernels of one distribution
    stack = jax.jit(jax.vmap(lambda k: network.init(arch, k)))(jax.random.split(key, 2))
    assert len(np.unique([layer["kernel"] for layer in stack.values()])) == 3 * 2 * 16


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("siren", (3,), r"x has shape \(3,\); 'siren .*\[inputs\] with 2 in the last axis"),
        ("siren", (7, 2), r"x has shape \(7, 2\).*Use jax.vmap"),
        ("relu cnn", (7, 9, 2), r"x has shape \(7, 9, 2\).*\[height, width, channels\] with 1 in"),
        ("relu cnn", (2, 7, 9, 1), "Use jax.vmap"),
        ("relu cnn", (6, 9, 1), r"x has shape \(6, 9, 1\), too small for .*'Conv_1'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, shape, expected):
    arch = support.ARCHITECTURES[name]
    with pytest.raises(ValueError, match=expected):
        network.apply(arch, support.random_params(arch), jnp.zeros(shape))


def test_only_an_inr_renders():
    arch = support.ARCHITECTURES["tanh mlp"]
    with pytest.raises(ValueError, match=r"maps 3 inputs to 2 outputs; an INR .* 2 coordinates to 1"):
        network.render(arch, support.random_params(arch), (4, 4))


def test_the_regime_of_the_published_inrs_is_refused_for_other_networks():
    with pytest.raises(ValueError, match=r"near_zero is of SIRENs.*'tanh'. Use standard"):
        network.init(support.ARCHITECTURES["tanh mlp"], jax.random.key(0), initialization=network.near_zero)
