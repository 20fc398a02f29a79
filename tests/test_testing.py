"""The checks that users run pass on what is right and name what is wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import testing
from jax_scalegmn.architecture import Axis, Scaling

SIREN = support.ARCHITECTURES["siren"]


def test_right_descriptions_pass(arch, params, key):
    """And the largest deviation that was seen is returned."""
    x = support.example(arch)
    worst = testing.assert_function_preserved(arch, lambda p, x: support.outputs(arch, p, x), params, x, key, samples=2)
    assert 0 <= worst <= 1e-5


def test_inputs_and_key_are_optional():
    """Without inputs `apply` is of params alone; without a key it is key 0. Each key has its own deviation here."""
    arch = support.ARCHITECTURES["relu mlp"]
    params, key, other = support.random_params(arch), jax.random.key(0), jax.random.key(1)
    preserved = functools.partial(testing.assert_function_preserved, arch, tolerance=np.inf)

    def apply(params, x):
        return x * params["Dense_0"]["bias"].sum()

    def closed(params):
        return apply(params, 2.0)

    worst = preserved(apply, params, 2.0, key)
    for same in (
        preserved(apply, params, 2.0),
        preserved(closed, params),
        preserved(closed, params, key=key),
        preserved(closed, params, None, key),
    ):
        assert same == worst
    assert preserved(closed, params, key=other) != worst
    sines = functools.partial(jax.tree.map, jnp.sin)
    for check, fn in [(testing.assert_invariant, closed), (testing.assert_equivariant, sines)]:
        worst = check(arch, fn, params, tolerance=np.inf)
        assert check(arch, fn, params, key, tolerance=np.inf) == worst
        assert check(arch, fn, params, other, tolerance=np.inf) != worst


@pytest.mark.parametrize("name", ["relu mlp", "relu cnn"])
def test_rescales_from_1e_minus_6_to_1e6_are_drawn_where_asked_for(name):
    """Right functions pass every check with them; one that saturates at 100 passes at small scales alone."""
    arch = support.ARCHITECTURES[name]
    params, x = support.random_params(arch), support.example(arch)

    def right(params):
        return support.outputs(arch, params, x)

    def clipped(params):
        return jax.tree.map(lambda leaf: jnp.clip(leaf, -100, 100), params)

    for check, fn, wrong, message in [
        (testing.assert_function_preserved, right, lambda p: right(clipped(p)), "does not describe this function"),
        (testing.assert_invariant, right, lambda p: right(clipped(p)), "Not invariant .* deviates by"),
        (testing.assert_equivariant, doubled, clipped, "Not equivariant .* deviates by"),
    ]:
        assert check(arch, fn, params, log_scale_std=4.6) < 1e-5
        assert check(arch, wrong, params, log_scale_std=0.5) < 1e-5
        with pytest.raises(AssertionError, match=message):
            check(arch, wrong, params, log_scale_std=4.6)


def with_power(arch, path, position, power):
    """The description with one axis's power replaced."""
    parameters = []
    for parameter in arch.parameters:
        axes = list(parameter.axes)
        if parameter.path == path:
            axes[position] = dataclasses.replace(axes[position], power=power)
        parameters.append(dataclasses.replace(parameter, axes=tuple(axes)))
    return dataclasses.replace(arch, parameters=tuple(parameters))


@pytest.mark.parametrize(
    ("path", "position", "power", "right"),
    [
        (("norm", "bias"), 0, 0, 1),
        (("norm", "mean"), 0, 1, 0),
        (("dense", "kernel"), 1, 1, 0),
        (("head", "kernel"), 0, 0, -1),
    ],
)
def test_the_axis_with_a_wrong_power_is_named(path, position, power, right, key):
    arch, apply = support.batch_norm_mlp()
    params, x = support.random_params(arch), jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    assert testing.assert_function_preserved(arch, apply, params, x, key, samples=2) < 1e-5
    where = "".join(rf"\['{part}'\]" for part in path)
    advice = rf"One change .*params{where} axis {position} \('units'\) should have power {right}, not {power}"
    wrong = with_power(arch, path, position, power)
    with pytest.raises(AssertionError, match=rf"'normalized mlp' does not describe .*\['units'\]. {advice}"):
        testing.assert_function_preserved(wrong, apply, params, x, key)
    with pytest.raises(AssertionError, match=rf"'normalized mlp' does not describe .*\['units'\]. {advice}"):
        testing.assert_function_preserved(wrong, lambda params: apply(params, x), params)


def test_a_group_that_is_too_large_is_named(key):
    """Relu does not commute with signs."""
    arch = support.ARCHITECTURES["relu mlp"]
    neurons = [dataclasses.replace(n, scaling=Scaling.SIGN) if n.name == "hidden_1" else n for n in arch.neuron_layers]
    wrong = dataclasses.replace(arch, neuron_layers=tuple(neurons))
    params, x = support.random_params(arch), support.example(arch)
    with pytest.raises(AssertionError, match=r"whose group acts wrongly: \['hidden_1'\]. No single power explains it"):
        testing.assert_function_preserved(wrong, lambda p, x: support.outputs(arch, p, x), params, x, key, samples=2)


def test_an_axis_of_the_wrong_neuron_layer_is_found(key):
    """A square kernel whose two layers are exchanged."""
    arch = sg.mlp((3, 4, 4, 2), "tanh")
    turned = dataclasses.replace(arch.parameters[2], axes=(Axis("hidden_1", -1), Axis("hidden_0", 1)))
    wrong = dataclasses.replace(arch, parameters=(*arch.parameters[:2], turned, *arch.parameters[3:]))
    params, x = support.random_params(arch), support.example(arch)
    with pytest.raises(AssertionError, match=r"acts wrongly: \['hidden_0', 'hidden_1'\]"):
        testing.assert_function_preserved(wrong, lambda p, x: support.outputs(arch, p, x), params, x, key, samples=1)


def energy(params):
    """Invariant under permutations and signs."""
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))


def doubled(params):
    """Equivariant under all."""
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def bias_sum(params):
    """Invariant under permutations, but not under signs."""
    return params["Dense_0"]["bias"].sum()


def rectified(params):
    """Equivariant under permutations, but not under signs."""
    return jax.tree.map(jax.nn.relu, params)


@pytest.mark.parametrize(
    ("check", "right", "wrong", "word"),
    [
        (testing.assert_invariant, energy, bias_sum, "invariant"),
        (testing.assert_equivariant, doubled, rectified, "equivariant"),
    ],
)
def test_symmetric_functions_pass_and_others_fail(check, right, wrong, word, key):
    """Under the part of the group that was asked for."""
    params = support.random_params(SIREN)
    assert check(SIREN, right, params, key, samples=3) < 1e-5
    assert check(SIREN, wrong, params, key, samples=3, scale=False) < 1e-5
    with pytest.raises(AssertionError, match=rf"Not {word} under .*permute=False, scale=True\): element \d dev"):
        check(SIREN, wrong, params, key, permute=False)
    check(SIREN, wrong, params, key, samples=3, tolerance=1e3)


def test_nan_fails_every_check(key):
    params, x = support.random_params(SIREN), support.example(SIREN)
    with pytest.raises(AssertionError, match=r"Not invariant .* deviates by inf"):
        testing.assert_invariant(SIREN, lambda p: energy(p) * np.nan, params, key)
    with pytest.raises(AssertionError, match=r"Not invariant .* deviates by inf"):
        testing.assert_invariant(SIREN, lambda p: jnp.log(bias_sum(p) - bias_sum(params) - 1), params, key)
    with pytest.raises(AssertionError, match="changes the output by inf"):
        testing.assert_function_preserved(SIREN, lambda p, x: x * np.nan, params, x, key)


def test_zeros_are_equal_to_zeros_alone(key):
    """Where nothing was expected, the deviation is absolute."""
    params = jax.tree.map(jnp.zeros_like, support.random_params(SIREN))
    outputs = iter([params, params, params, jax.tree.map(jnp.ones_like, params)])
    assert testing.assert_equivariant(SIREN, lambda _: next(outputs), params, key, samples=1) == 0
    with pytest.raises(AssertionError, match=r"deviates by 1.00e\+00"):
        testing.assert_equivariant(SIREN, lambda _: next(outputs), params, key, samples=1)
