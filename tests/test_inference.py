"""Descriptions that are read off functions: those of the builders, right on every network, and never too large."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen as nn
from flax.core import freeze
from jax import lax

from jax_scalegmn import architecture, builders, graph, matching, network, testing
from jax_scalegmn.architecture import Architecture, Axis, Scaling

FIXED, PERMUTATION, SIGN, POSITIVE = Scaling


def generic(tree, seed: int = 0, dtype="float32"):
    """Params without a special value; variances and gains are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        positive = str(path[-1].key) in ("var", "scale", "gain")
        return jnp.asarray(np.abs(value) + 0.3 if positive else value, dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def inputs(*shape, seed: int = 1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), dtype)


def linen(module: nn.Module, x):
    """A Flax network as a function of its merged params, with params."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return lambda params, x: module.apply(network.split_variables(params), x), generic(network.merge_variables(shapes)), x


def arrays(**shapes):
    return generic({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()})


def scalings(arch: Architecture) -> dict[str, Scaling]:
    return {neurons.name: neurons.scaling for neurons in arch.hidden}


def assert_same_description(found: Architecture, expected: Architecture) -> None:
    """The same arrays, groups and axes up to names of layers on which a group acts; powers where a scale acts."""
    assert {p.path for p in found.parameters} == {p.path for p in expected.parameters}
    names = {}
    for parameter in expected.parameters:
        (twin,) = [other for other in found.parameters if other.path == parameter.path]
        assert found.shape(twin) == expected.shape(parameter)
        for axis, other in zip(parameter.axes, twin.axes, strict=True):
            assert isinstance(axis, Axis) == isinstance(other, Axis), (parameter, twin)
            if isinstance(axis, Axis):
                scaling = expected.layer(axis.neurons).scaling
                assert scaling is FIXED or names.setdefault(axis.neurons, other.neurons) == other.neurons
                assert (found.layer(other.neurons).scaling, other.repeat) == (scaling, axis.repeat)
                assert scaling not in (SIGN, POSITIVE) or other.power == axis.power, (parameter, twin)
    assert len(set(names.values())) == len(names) == len(found.hidden)


# --- the builders' networks -----------------------------------------------------------------------------------------

WIDTHS = {"widths": (4, 6), "outputs": 3, "input_channels": 2}
BUILT = {
    **support.ARCHITECTURES,
    "width 1": builders.mlp((2, 1, 3, 1), ("relu", "tanh")),
    **{
        f"vgg {activation} {norm} {pooling}": builders.vgg(
            ((4, 6), (4,)), 3, input_channels=2, activation=activation, norm=norm, groups=groups, pooling=pooling
        )
        for activation, norm, groups, pooling in [
            ("tanh", "batch", None, "max"),
            ("tanh", "layer", None, "mean"),
            ("relu", None, None, "max"),
            ("relu", "group", 2, "mean"),
        ]
    },
    **{
        f"resnet {activation} {norm} {groups}": builders.resnet(6, activation=activation, norm=norm, groups=groups, **WIDTHS)
        for activation, norm, groups in [
            ("relu", "batch", None),
            ("tanh", None, None),
            ("gelu", "layer", None),
            ("relu", "group", 1),
            ("relu", "group", 2),
        ]
    },
}


@pytest.mark.parametrize("arch", BUILT.values(), ids=BUILT)
def test_the_builders_descriptions_are_found(arch):
    x = support.example(arch) if arch.neurons[0].name == "input" and len(arch.name.split()[0]) < 6 else None
    x = inputs(2, 6, 8, arch.neurons[0].width) if arch.name.startswith(("vgg", "resnet")) else x

    def apply(params, x):
        return jax.vmap(lambda one: network.apply(arch, params, one))(x)

    found = architecture.infer(apply, jax.eval_shape(lambda: support.random_params(arch)), x)
    assert_same_description(found.arch, arch)
    assert found.arch.name == "inferred from apply"
    assert found.arch.layers == ()
    assert (found.arch.neurons[0].name, found.arch.neurons[-1].name) == ("input", "output")
    fixed = any(n.scaling is FIXED for n in arch.neurons[1:-1])
    assert any("`reshape` splits its axis" in note for note in found.notes) == fixed


def test_a_builders_description_with_another_group_is_not_what_is_found():
    arch = BUILT["mixed mlp"]
    other = architecture.restrict(arch, SIGN)
    found = architecture.infer(
        lambda p, x: network.apply(arch, p, x), support.random_params(arch), support.example(arch)[0]
    )
    with pytest.raises(AssertionError):
        assert_same_description(found.arch, other)


@pytest.mark.parametrize("name", support.HAND_WRITTEN)
def test_hand_written_descriptions_are_found_or_surpassed(name):
    arch, apply = support.HAND_WRITTEN[name]
    params, x = support.random_params(arch), inputs(4, 3)
    found = architecture.infer(apply, params, x).arch
    if name == "layer norm":  # by hand only permutations, but what the normalisations put on the head can take off
        assert scalings(found) == {"embed": POSITIVE, "up": POSITIVE}
    else:
        assert sorted(s.value for s in scalings(found).values()) == sorted(s.value for s in scalings(arch).values())
    testing.assert_function_preserved(found, apply, params, x, samples=2)
