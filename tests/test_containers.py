"""Networks in any container go into every public function, with the numbers of nested dicts, and come back in it."""

import collections
import functools
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import nnx

import jax_scalegmn as sg
from jax_scalegmn import stacks

X = jax.random.normal(jax.random.key(9), (6, 3))


class Module(nnx.Module):
    """With dropout, whose random state is no parameter."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.up, self.down = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(jnp.tanh(self.up(x))))


class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array


class Equinox(eqx.Module):
    """With functions and a number in it."""

    up: Layer
    down: Layer
    activation: Any = jnp.tanh
    slope: int = 1

    def __call__(self, x):
        return self.activation(x @ self.up.kernel + self.up.bias) @ self.down.kernel + self.down.bias


GRAPH, _, REST = nnx.split(Module(0), nnx.Param, ...)


def as_module(params):
    return stacks.like(Module(0), params)


def as_state(params):
    return stacks.like(nnx.state(Module(0), nnx.Param), params)


def apply_dict(params, x):
    return (
        jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"] + params["down"]["bias"]
    )


# Makes the container of nested dicts, and the function that reads it.
CONTAINERS = {
    "FrozenDict": (flax.core.freeze, apply_dict),
    "OrderedDict": (collections.OrderedDict, apply_dict),
    "nnx.Module": (as_module, lambda module, x: module(x)),
    "nnx.State": (as_state, lambda state, x: nnx.merge(GRAPH, state, REST)(x)),
    "equinox": (lambda params: Equinox(Layer(**params["up"]), Layer(**params["down"])), lambda model, x: model(x)),
}


def network(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    layers = {"up": (3, 5), "down": (5, 2)}
    return {
        name: {"kernel": jax.random.normal(keys[2 * i], shape), "bias": jax.random.normal(keys[2 * i + 1], shape[1:])}
        for i, (name, shape) in enumerate(layers.items())
    }


ARCH = sg.infer(apply_dict, network(0), X).arch
ELEMENT = sg.symmetry.random(ARCH, jax.random.key(5))
KEY = jax.random.key(3)


def loss(apply):
    return lambda params: jnp.square(apply(params, X) - 1).mean()


# Each takes two networks, a stack of them and the function that reads one.
FUNCTIONS = {
    "symmetry.act": lambda a, b, stack, f: sg.symmetry.act(ARCH, ELEMENT, a),
    "symmetry.orbit": lambda a, b, stack, f: sg.symmetry.orbit(ARCH, a, KEY, 3),
    "symmetry.balance": lambda a, b, stack, f: sg.symmetry.balance(ARCH, a),
    "symmetry.balanced": lambda a, b, stack, f: sg.symmetry.balanced(ARCH, a),
    "symmetry.canonical.form": lambda a, b, stack, f: sg.symmetry.canonical.form(ARCH, a),
    "matching.align": lambda a, b, stack, f: sg.matching.align(ARCH, a, b),
    "matching.weight_matching": lambda a, b, stack, f: sg.matching.weight_matching(ARCH, a, b),
    "matching.similarity": lambda a, b, stack, f: sg.matching.similarity(ARCH, a, b),
    "matching.align_all": lambda a, b, stack, f: sg.matching.align_all(ARCH, stack),
    "matching.align_to": lambda a, b, stack, f: sg.matching.align_to(ARCH, stack, stack),
    "matching.sinkhorn_matching": lambda a, b, stack, f: sg.matching.sinkhorn_matching(
        ARCH, a, b, KEY, loss_fn=loss(f), num_steps=2
    ),
    "matching.search_matching": lambda a, b, stack, f: sg.matching.search_matching(
        ARCH, a, b, None, KEY, loss_fn=loss(f), start=ELEMENT, max_sweeps=1
    ),
    "matching.best_of": lambda a, b, stack, f: sg.matching.best_of(
        ARCH, a, b, [functools.partial(sg.matching.unmatched, ARCH)], loss(f)
    ),
    "merge.merge_many": lambda a, b, stack, f: sg.merge.merge_many(ARCH, stack, X, KEY, max_sweeps=1).params,
    "merge.lerp": lambda a, b, stack, f: sg.merge.lerp(a, b, 0.25),
    "merge.slerp": lambda a, b, stack, f: sg.merge.slerp(a, b, 0.25),
    "merge.average": lambda a, b, stack, f: sg.merge.average(stack),
    "merge.piecewise": lambda a, b, stack, f: sg.merge.piecewise(stack, 0.25),
    "merge.greedy_soup": lambda a, b, stack, f: sg.merge.greedy_soup(loss(f), stack),
    "merge.task_vector": lambda a, b, stack, f: sg.merge.task_vector(a, b),
    "merge.ties": lambda a, b, stack, f: sg.merge.ties(a, stack),
    "landscape.barrier": lambda a, b, stack, f: sg.landscape.barrier(loss(f), a, b),
    "landscape.plane": lambda a, b, stack, f: sg.landscape.plane(loss(f), a, b, stacks.member(stack, 0), num_points=3),
    "stacks.member": lambda a, b, stack, f: stacks.member(stack, 1),
    "testing": lambda a, b, stack, f: sg.testing.assert_function_preserved(ARCH, f, a, X),
}


@functools.cache
def expected(name):
    a, b, c = map(network, range(3))
    return FUNCTIONS[name](a, b, stacks.stack(c, a, b), apply_dict)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_are_those_of_dicts_and_the_type_is_kept(name, container):
    make, apply = CONTAINERS[container]
    a, b, c = (make(network(seed)) for seed in range(3))
    result = FUNCTIONS[name](a, b, stacks.stack(c, a, b), apply)
    wanted = expected(name)
    if isinstance(wanted, dict):
        assert type(result) is type(a)
        assert jax.tree.structure(result) == jax.tree.structure(a)
        result = stacks.to_dict(result)
    elif hasattr(wanted, "_fields"):
        kept = [field for field in wanted._fields if type(getattr(result, field)) is type(a)]
        assert kept == [
            field for field in wanted._fields if isinstance(getattr(wanted, field), dict) and field in NETWORKS
        ]
        result = result._replace(**{field: stacks.to_dict(getattr(result, field)) for field in kept})
    result, wanted = (jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), tree) for tree in (result, wanted))
    assert support.deviation(result, wanted) < 1e-6


NETWORKS = ("params", "aligned", "mean")


@pytest.mark.parametrize("container", CONTAINERS)
def test_architectures_are_inferred_from_functions_of_containers(container):
    make, apply = CONTAINERS[container]
    arch = sg.infer(apply, make(network(0)), X).arch
    assert arch.hidden == ARCH.hidden
    assert {*arch.parameters} == {*ARCH.parameters}


def test_lists_are_networks_too():
    """As Keras has them; arrays are named by their places."""

    def apply(params, x):
        up, bias, down = params
        return jnp.tanh(x @ up + bias) @ down

    a, b = ([network(s)["up"]["kernel"], network(s)["up"]["bias"], network(s)["down"]["kernel"]] for s in (0, 1))
    arch = sg.infer(apply, a, X).arch
    aligned = sg.matching.align(arch, b, a)
    assert type(aligned) is list
    np.testing.assert_allclose(apply(aligned, X), apply(b, X), atol=1e-5)
    assert type(sg.merge.lerp(a, aligned, 0.5)) is list


def test_whole_numbers_as_keys_stay():
    """As in the state of an `nnx.Sequential`."""
    params = {0: jnp.ones(2), 1: jnp.zeros(2)}
    assert sg.merge.lerp(params, params, 0.5).keys() == {0, 1}


def test_containers_of_two_types_meet_by_their_names():
    a, b = Equinox(**{k: Layer(**v) for k, v in network(0).items()}), network(1)
    assert support.deviation(stacks.to_dict(sg.merge.lerp(a, b, 0.5)), sg.merge.lerp(network(0), b, 0.5)) == 0


def test_networks_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"Equinox has no array up.scale; expected the names down.bias, .* one kind"):
        stacks.like(Equinox(**{k: Layer(**v) for k, v in network(0).items()}), {"up": {"scale": 1.0}})
    with pytest.raises(ValueError, match="Two arrays are named"):
        stacks.to_dict(collections.OrderedDict({1: jnp.ones(1), "1": jnp.ones(1)}))
