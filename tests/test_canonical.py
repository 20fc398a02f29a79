"""Canonical forms leave the function alone, and networks that differ by a symmetry, or by phases, become one."""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, symmetry, testing
from jax_scalegmn.architecture import Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.symmetry import _phase, canonical


def with_w0(arch, w0):
    """The same network with w0 in every sine."""
    layers = [
        dataclasses.replace(layer, activation=dataclasses.replace(layer.activation, frequency=w0))
        if getattr(layer, "activation", None) and layer.activation.name == "sine"
        else layer
        for layer in arch.layers
    ]
    return dataclasses.replace(arch, layers=tuple(layers))


FLAT = sg.cnn((2, 3, 4), 3, activation="sine", kernel_size=(3, 2), padding="SAME", flatten=(7, 9))
NETWORKS = {
    **{f"siren, w0 = {w0:g}": sg.siren((2, 5, 4, 1), w0=w0) for w0 in (1.0, 30.0, -7.0, 0.5)},
    "flattened cnn": FLAT,
    "flattened cnn, w0 = 30": with_w0(FLAT, 30.0),
    "pooled cnn, w0 = -7": with_w0(sg.cnn((1, 3, 4), 2, activation="sine"), -7.0),
    "sine, then relu": sg.mlp((3, 5, 4, 2), ("sine", "relu")),
    "relu, then sine": with_w0(sg.mlp((3, 5, 4, 2), ("relu", "sine")), 0.5),
    "sine, tanh, sine": with_w0(sg.mlp((3, 5, 4, 6, 2), ("sine", "tanh", "sine")), 30.0),
}
SIREN = NETWORKS["siren, w0 = 30"]
# Of the function of a network whose phases reach 1e4 half turns.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
# Of a bias, in half turns.
EXACT = {"float32": 1e-7, "float64": 2e-16}

FAST = ("siren, w0 = 30", "pooled cnn, w0 = -7", "sine, tanh, sine")
networks = pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=() if name in FAST else pytest.mark.slow, id=name) for name, arch in NETWORKS.items()],
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
wrap = jax.jit(symmetry.wrap_phase)


def sines(arch):
    """(name, name of the layer that reads it, w0) of every sine layer."""
    affine = [layer for layer in arch.layers if hasattr(layer, "name")]
    for layer, reader in itertools.pairwise(affine):
        if layer.activation.name == "sine":
            yield layer.name, reader.name, layer.activation.frequency


def with_phases(arch, largest, seed=0, dtype="float32", smallest=1e-8):
    """Generic params whose sines have phases of all sizes, log-uniform and of both signs, in radians."""
    rng = np.random.default_rng(seed)
    params = support.random_params(arch, seed, dtype)
    for name, _, w0 in sines(arch):
        shape = params[name]["bias"].shape
        phase = rng.choice([-1, 1], shape) * np.exp(rng.uniform(np.log(smallest), np.log(largest), shape))
        params[name]["bias"] = jnp.asarray(phase / w0, dtype)
    return params


def flipped(kernel, odd):
    """A kernel that reads flipped units, which are fastest along its second to last axis."""
    sign = np.tile(np.where(odd, -1, 1), kernel.shape[-2] // odd.size)
    return kernel * jnp.asarray(sign[:, None], kernel.dtype)


@jax.jit
def function(arch, params, x):
    """In float64, where phases of 1e4 half turns are exact enough to judge by."""
    return support.outputs(arch, *jax.tree.map(lambda leaf: leaf.astype("float64"), (params, x)))


@networks
@dtypes
@pytest.mark.parametrize("largest", [1, 30, 3e4])
def test_the_function_is_preserved(arch, dtype, largest):
    """Of phases from tiny to 1e4 half turns; the wrapped ones are in range, and the dtype stays."""
    with support.precision("float64"):
        x = support.example(arch)
        for seed in range(3):
            params = with_phases(arch, largest, seed, dtype)
            wrapped = wrap(arch, params)
            assert {leaf.dtype for leaf in jax.tree.leaves(wrapped)} == {jnp.dtype(dtype)}
            assert support.deviation(function(arch, wrapped, x), function(arch, params, x)) < TOLERANCE[dtype]
            for name, _, w0 in sines(arch):
                phases = w0 * np.float64(wrapped[name]["bias"])
                assert np.abs(phases).max() <= math.pi / 2 * (1 + np.finfo(dtype).eps)


@networks
def test_the_function_that_float32_computes_is_preserved(arch):
    """To the network's own rounding of a few turns."""
    params, x = with_phases(arch, 10), support.example(arch)
    wrapped = wrap(arch, params)
    assert support.deviation(wrapped, params) > 0.5
    assert support.deviation(support.outputs(arch, wrapped, x), support.outputs(arch, params, x)) < 1e-5


@pytest.mark.parametrize("forgotten", ["w0", "flips", "the period"])
def test_the_function_is_lost_where_something_is_forgotten(forgotten):
    """The control of the tests above: w0 taken for 1, readers left alone, or flipped at every shift."""
    params, x = with_phases(SIREN, 3e3, smallest=1), support.example(SIREN)
    wrapped = wrap(with_w0(SIREN, 1.0) if forgotten == "w0" else SIREN, params)
    for name, reader, w0 in sines(SIREN):
        turns = np.round((params[name]["bias"] - wrapped[name]["bias"]) * w0 / np.pi)
        if forgotten == "flips":
            wrapped[reader]["kernel"] = params[reader]["kernel"]
        if forgotten == "the period":
            wrapped[reader]["kernel"] = flipped(params[reader]["kernel"], turns != 0)
    assert support.deviation(support.outputs(SIREN, wrapped, x), support.outputs(SIREN, params, x)) > 0.1


@networks
@dtypes
def test_networks_that_differ_by_half_turns_become_equal(arch, dtype):
    """By up to 6 at every unit, their readers flipped by hand; nothing is changed in the one that has none."""
    with support.precision(dtype):
        rng = np.random.default_rng(0)
        params = with_phases(arch, 1.5, dtype=dtype, smallest=0.5)
        shifted = {name: dict(layer) for name, layer in params.items()}
        for name, reader, w0 in sines(arch):
            turns = rng.integers(-6, 7, params[name]["bias"].shape)
            shifted[name]["bias"] = params[name]["bias"] + jnp.asarray(turns * (np.pi / w0), dtype)
            shifted[reader]["kernel"] = flipped(shifted[reader]["kernel"], turns % 2 == 1)
        assert support.deviation(shifted, params) > 1
        support.assert_identical(wrap(arch, params), params)
        assert support.deviation(wrap(arch, shifted), params) < {"float32": 1e-5, "float64": 1e-13}[dtype]


@networks
def test_only_the_biases_of_sines_and_the_signs_of_their_readers_change(arch):
    """Output biases, which are far beyond the range here, stay; so do kernels that read no sine."""
    params = jax.tree.map(lambda leaf: 100 * leaf, support.random_params(arch))
    wrapped = wrap(arch, params)
    biases = {name for name, _, _ in sines(arch)}
    readers = {reader for _, reader, _ in sines(arch)}
    for name, layer in params.items():
        if name not in biases:
            support.assert_identical(wrapped[name]["bias"], layer["bias"])
        if name not in readers:
            support.assert_identical(wrapped[name]["kernel"], layer["kernel"])
    assert {name for name, layer in params.items() if (wrapped[name]["bias"] != layer["bias"]).any()} == biases
    odd = [np.round((params[name]["bias"] - wrapped[name]["bias"]) * w0 / np.pi) % 2 for name, _, w0 in sines(arch)]
    assert np.concatenate(odd).any()
    for flips, (_, reader, _) in zip(odd, sines(arch), strict=True):
        support.assert_identical(wrapped[reader]["kernel"], flipped(params[reader]["kernel"], flips == 1))


# By Machin's formula, to 60 digits: as long a series as that takes.
ARC_TANGENTS = [sum(Fraction((-1) ** i, (2 * i + 1) * n ** (2 * i + 1)) for i in range(50)) for n in (5, 239)]
PI = 16 * ARC_TANGENTS[0] - 4 * ARC_TANGENTS[1]


@dtypes
def test_biases_are_exact_up_to_the_largest_phase(dtype):
    """Against fractions: 2^22 half turns in float32, 2^51 in float64, of the w0 that the dtype can hold."""
    archs = {w0: sg.siren((1, 200, 1), w0=w0) for w0 in (1.0, 30.0, -7.0, 0.5, 0.1, 1e-20, 1e20)}
    largest = 3 * 2.0 ** {"float32": 22, "float64": 51}[dtype]
    with support.precision(dtype):
        given = [with_phases(arch, largest, smallest=1, dtype=dtype) for arch in archs.values()]
        # One program for all frequencies.
        wrapped = jax.jit(lambda given: [*map(symmetry.wrap_phase, archs.values(), given)])(given)
    for w0, before, after in zip(archs, *jax.tree.map(np.asarray, (given, wrapped)), strict=True):
        half_turn = PI / Fraction(float(np.asarray(w0, dtype)))
        flips = after["Dense_1"]["kernel"] / before["Dense_1"]["kernel"]
        for b, got, sign in zip(before["Dense_0"]["bias"], after["Dense_0"]["bias"], flips[:, 0], strict=True):
            turns = round(Fraction(float(b)) / half_turn)
            assert sign == (-1) ** turns
            assert abs(Fraction(float(got)) - (Fraction(float(b)) - turns * half_turn)) < EXACT[dtype] * abs(half_turn)


@dtypes
def test_phases_beyond_the_largest_stay(dtype):
    with support.precision(dtype):
        params = with_phases(SIREN, 1e35, smallest=1e17, dtype=dtype)
        support.assert_identical(wrap(SIREN, params), params)


@networks
@dtypes
def test_wrapping_twice_is_wrapping_once(arch, dtype):
    """To the bit, with the numbers next to every border of 30 half turns among the phases."""
    with support.precision(dtype):
        params = with_phases(arch, 1e4, dtype=dtype)
        for seed, (name, _, w0) in enumerate(sines(arch)):
            bias = np.asarray((np.arange(-15, 15) + 0.5) * np.pi / w0, dtype)
            around = np.concatenate([bias, np.nextafter(bias, bias.dtype.type(9e9)), np.nextafter(bias, -bias)])
            some = np.random.default_rng(seed).choice(around, params[name]["bias"].shape)
            for biases in (params[name]["bias"], some):
                params[name]["bias"] = jnp.asarray(biases)
                once = wrap(arch, params)
                support.assert_identical(wrap(arch, once), once)


@pytest.mark.slow
@dtypes
def test_wrapping_is_the_same_compiled_or_not(dtype):
    """To the bit."""
    with support.precision(dtype):
        for largest in (1, 1e4):
            params = with_phases(SIREN, largest, dtype=dtype)
            support.assert_identical(symmetry.wrap_phase(SIREN, params), wrap(SIREN, params))


@pytest.mark.slow
@dtypes
def test_every_border_is_stable(dtype):
    """The numbers next to a quarter turn, for 20 frequencies: one wrap brings them in range, the next changes none."""
    frequencies = [float(w0) for w0 in np.exp(np.random.default_rng(0).uniform(-5, 5, 20))]

    @jax.jit
    def wrap_all(biases):
        return [_phase._wrap(bias, w0) for bias, w0 in zip(biases, frequencies, strict=True)]

    with support.precision(dtype):
        borders = [np.asarray(np.pi / 2 / w0, dtype) for w0 in frequencies]
        around = (1 + np.arange(-5, 6) * np.finfo(dtype).eps).astype(dtype)
        near = [jnp.asarray(np.concatenate([border * around, -border * around])) for border in borders]
        wrapped = [bias for bias, _ in wrap_all(near)]
        for border, once, (again, sign) in zip(borders, wrapped, wrap_all(wrapped), strict=True):
            assert np.abs(once).max() <= np.nextafter(border, border.dtype.type(9e9))
            support.assert_identical(again, once)
            assert (sign == 1).all()


@networks
def test_wrapping_commutes_with_the_group(arch, key):
    params = with_phases(arch, 30)
    assert testing.assert_equivariant(arch, functools.partial(wrap, arch), params, key, samples=4) < 1e-6


def test_stacks_are_wrapped_one_by_one():
    arch = NETWORKS["sine, then relu"]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(with_phases(arch, 100, seed) for seed in range(3)))
    wrapped = jax.jit(jax.vmap(symmetry.wrap_phase, (None, 0)))(arch, stack)
    for index in range(3):
        support.assert_identical(support.rows(wrapped, index), wrap(arch, support.rows(stack, index)))


@networks
def test_gradients_are_those_of_the_function(arch):
    """Through the wrapping or not, since the function is the same; a phase of exactly 0 included."""
    with support.precision("float64"):
        params, x = with_phases(arch, 30, dtype="float64"), support.example(arch, dtype="float64")
        name = next(iter(sines(arch)))[0]
        params[name]["bias"] = params[name]["bias"].at[0].set(0)

        @jax.jit
        def gradients(params):
            def loss(params):
                return jnp.square(support.outputs(arch, params, x) - 1).sum()

            return jax.grad(lambda p: loss(symmetry.wrap_phase(arch, p)))(params), jax.grad(loss)(params)

        assert support.deviation(*gradients(params)) < 1e-10


def test_a_description_with_a_smaller_group_is_wrapped_alike():
    restricted = architecture.restrict(SIREN, Scaling.PERMUTATION)
    params = with_phases(SIREN, 30)
    assert support.deviation(wrap(SIREN, params), params) > 0.1
    support.assert_identical(wrap(restricted, params), wrap(SIREN, params))


def test_half_precision_is_wrapped_to_its_own_rounding():
    arch = sg.siren((2, 5, 4, 1), w0=0.5)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), with_phases(arch, 100))
    wrapped = wrap(arch, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(wrapped)} == {jnp.dtype(jnp.bfloat16)}
    single = wrap(arch, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    support.assert_identical(wrapped, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), single))


def hand_written(scaling=Scaling.SIGN, reader=-1, bias=1, offset=0.0, w0=30.0, extra=()):
    """A description 2-3-1 of one sine layer with something amiss."""
    parameters = (
        Parameter(("Dense_0", "kernel"), (Axis("in", -1), Axis("units", 1))),
        *([Parameter(("Dense_0", "bias"), (Axis("units", bias),))] if bias is not None else []),
        *([Parameter(("Dense_1", "kernel"), (Axis("units", reader), Axis("out", 1)))] if reader is not None else []),
        Parameter(("Dense_1", "bias"), (Axis("out", 1),)),
        *extra,
    )
    neurons = (
        NeuronLayer("in", 2, Scaling.FIXED),
        NeuronLayer("units", 3, scaling),
        NeuronLayer("out", 1, Scaling.FIXED),
    )
    layers = (
        architecture.Dense("Dense_0", architecture.Activation("sine", w0), offset),
        architecture.Dense("Dense_1", None),
    )
    return architecture.Architecture("by hand", neurons, parameters, layers)


def zeros(arch):
    return architecture.pack(arch, [jnp.zeros(arch.shape(parameter)) for parameter in arch.parameters])


OWN = r"'by hand': sine layer 'Dense_0'"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (dataclasses.replace(SIREN, layers=()), r"layers is empty.*its sines and their w0 are unknown\. Give"),
        (sg.mlp((2, 3, 1), "relu"), r"'mlp 2-3-1 relu' has no sine .* got \['relu'\]\. .* as they are"),
        (sg.mlp((2, 1)), r"has no sine layer: .* got \[\]"),
        (hand_written(bias=None), rf"{OWN} keeps its phases in params\['Dense_0'\]\['bias'\], .* axes \(\)\. Give"),
        (hand_written(bias=0), rf"{OWN} keeps its phases .* power 1 .* got the axes \(Axis\(.*power=0"),
        (
            hand_written(Scaling.FIXED),
            rf"{OWN} feeds 'units' with Scaling.FIXED; expected Scaling.SIGN, .* output",
        ),
        (hand_written(offset=0.5), rf"{OWN} has offset 0.5, .* expected 0\. Move"),
        (hand_written(reader=None), rf"{OWN} .*, or nothing reads it: .* powers {{}} on it"),
        (hand_written(reader=0), rf"{OWN} shares .* powers {{\"\['Dense_1'\]\['kernel'\]\": 0}} on it"),
        (
            hand_written(extra=(Parameter(("skip", "kernel"), (Axis("in", -1), Axis("units", 1))),)),
            rf"{OWN} shares 'units'.* \"\['skip'\]\['kernel'\]\": 1}} on it; expected one reader or more",
        ),
        (
            hand_written(extra=(Parameter(("norm", "bias"), (Axis("units", 1),)),)),
            rf"{OWN} shares 'units'.* \"\['norm'\]\['bias'\]\": 1}} on it; .* Fold a normalization",
        ),
        (hand_written(w0=0.0), rf"{OWN} has frequency 0.0; expected a w0 of size 1e-20 to 1e20, like 30"),
        (hand_written(w0=math.inf), rf"{OWN} has frequency inf; expected"),
        (hand_written(w0=math.nan), rf"{OWN} has frequency nan; expected"),
    ],
)
def test_networks_without_phases_that_can_be_wrapped_are_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        symmetry.wrap_phase(arch, zeros(arch))


def test_hand_written_descriptions_are_wrapped_and_params_checked():
    """Also where two kernels read the sines."""
    arch = hand_written(extra=(Parameter(("head", "kernel"), (Axis("units", -1), Axis("out", 1))),))
    params = jax.tree.map(jnp.ones_like, zeros(arch))
    params["Dense_0"]["bias"] = jnp.array([0.0, 1.0, 2.0]) * np.pi / 30
    wrapped = wrap(arch, params)
    np.testing.assert_allclose(wrapped["Dense_0"]["bias"], 0, atol=1e-7)
    np.testing.assert_array_equal(wrapped["Dense_1"]["kernel"][:, 0], [1, -1, 1])
    np.testing.assert_array_equal(wrapped["head"]["kernel"][:, 0], [1, -1, 1])
    with pytest.raises(ValueError, match=r"params\['head'\]\['kernel'\] is missing"):
        symmetry.wrap_phase(arch, {name: layer for name, layer in params.items() if name != "head"})


CLOSED_FORM = {**support.ARCHITECTURES, "resnet": sg.resnet(8, widths=(4, 4, 6), input_channels=1)}


@jax.jit
def all_forms(arch, elements, params, other):
    """Of params, of all members of their orbit and of another network: the margins and the canonical forms."""
    members = jax.vmap(symmetry.act, (None, 0, None))(arch, elements, params)
    every = jax.tree.map(lambda a, b, c: jnp.concatenate([a[None], b, c[None]]), params, members, other)
    elements, margins = jax.vmap(canonical.element, (None, 0))(arch, every)
    return margins, jax.vmap(symmetry.act, (None, 0, 0))(arch, elements, every)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "resnet" else ()) for name in CLOSED_FORM]
)
def test_an_orbit_has_one_canonical_form_with_its_function(name):
    """Of every member, to 1e-5 in float32: 20 networks have one form, up to rounding."""
    arch = CLOSED_FORM[name]
    params, x = support.random_params(arch), support.example(arch)
    elements = support.random_elements(arch, 20)
    margins, forms = jax.device_get(all_forms(arch, elements, params, support.random_params(arch, 1)))
    assert margins.min() > 1e-5
    form, *of_members, of_other = (support.rows(forms, index) for index in range(22))
    for of_member in of_members:
        assert support.deviation(of_member, form) < 1e-5
    assert support.deviation(form, params) > 0.1
    assert support.deviation(of_other, form) > 0.1
    assert support.deviation(support.outputs(arch, form, x), support.outputs(arch, params, x)) < 1e-5


def test_a_form_is_the_network_moved_by_its_element():
    """Compiled with it, to the bit; and alike for one network of a stack."""
    arch = support.ARCHITECTURES["mixed mlp"]
    stack = support.random_params(arch, models=(3,))
    form, moved = jax.jit(
        lambda p: (canonical.form(arch, p), symmetry.act(arch, canonical.element(arch, p).element, p))
    )(support.rows(stack, 1))
    support.assert_identical(form, moved)
    together = jax.jit(jax.vmap(canonical.form, (None, 0)))(arch, stack)
    assert support.deviation(support.rows(together, 1), form) < 1e-6


@pytest.mark.parametrize("tie", ["equal neurons", "a neuron of zeros"])
def test_margin_is_0_at_ties(tie):
    arch = support.ARCHITECTURES["tanh mlp"]
    params = support.random_params(arch)
    for name, leaf in params["Dense_0"].items():
        params["Dense_0"][name] = leaf.at[..., 1].set(leaf[..., 0] if tie == "equal neurons" else 0)
    find = jax.jit(canonical.element)
    element, margin = find(arch, params)
    assert margin == 0
    assert all((np.abs(scale) == 1).all() for scale in element.scale.values())
    assert find(arch, support.random_params(arch)).margin > 0
