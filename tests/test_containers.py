"""Networks in any container go into every public function, with the numbers of nested dicts, and come back in it."""

import collections
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import tempfile
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
RELU = sg.infer(
    lambda params, x: jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"], network(0), X
).arch
ELEMENT = sg.symmetry.random(ARCH, jax.random.key(5))
KEY = jax.random.key(3)


def loss(apply):
    return lambda params: jnp.square(apply(params, X) - 1).mean()


def built(arch):
    """A builder's perceptron, with the names of the containers."""
    names = {"Dense_0": "up", "Dense_1": "down"}
    layers = tuple(dataclasses.replace(layer, name=names[layer.name]) for layer in arch.layers)
    parameters = tuple(dataclasses.replace(p, path=(names[p.path[0]], p.path[1])) for p in arch.parameters)
    return dataclasses.replace(arch, layers=layers, parameters=parameters)


BUILT, SIREN = built(sg.mlp((3, 5, 2), "tanh")), built(sg.siren((3, 5, 2), w0=1.0))
DRAWN = jnp.arange(6) % 2  # labels
ENCODER = sg.Encoder(sg.ScaleGMN(ARCH, features=4, num_layers=1), latent=2)


@functools.cache
def variables():
    """Compiled once, and not where tests are collected alone; no tracers, whoever asks first."""
    with jax.ensure_compile_time_eval():
        return sg.models.init(ENCODER, KEY, network(0))


def encoded(params):
    return ENCODER.apply(variables(), params)


def written(params):
    """What is in a file that a network is written to."""
    with tempfile.TemporaryDirectory() as folder:
        like = sg.io.NetworkFile({}, sg.io.FileFormat(".npz"), flat(jax.tree.map(np.asarray, network(1))))
        sg.io.write_network(f"{folder}/x.npz", ARCH, params, like)
        return dict(np.load(f"{folder}/x.npz"))


def flat(params):
    return {f"{layer}/{name}": value for layer, own in params.items() for name, value in own.items()}


# Each takes two networks, a stack of three and the function that reads one.
FUNCTIONS = {
    "architecture.check_params": lambda a, b, stack, f: sg.architecture.check_params(ARCH, a),
    "architecture.check_stack": lambda a, b, stack, f: sg.architecture.check_stack(ARCH, stack),
    "architecture.unpack": lambda a, b, stack, f: sg.architecture.unpack(ARCH, a),
    "inference.infer": lambda a, b, stack, f: [n.width for n in sg.infer(f, a, X).arch.neuron_layers],
    "io.to_torch": lambda a, b, stack, f: list(sg.io.to_torch(BUILT, a).values()),
    "io.write_network": lambda a, b, stack, f: list(written(a).values()),
    "landscape.path": lambda a, b, stack, f: sg.landscape.path(loss(f), a, b, num_points=3),
    "matching.activation_matching": lambda a, b, stack, f: sg.matching.activation_matching(ARCH, a, b, X),
    "matching.canonical_matching": lambda a, b, stack, f: sg.matching.canonical_matching(ARCH, a, b),
    "matching.framed": lambda a, b, stack, f: sg.matching.framed(ARCH, stack, sg.stacks.stack(*[ELEMENT] * 3)),
    "matching.orbit_distance": lambda a, b, stack, f: sg.matching.orbit_distance(ARCH, a, b),
    "matching.pairwise": lambda a, b, stack, f: sg.matching.pairwise(ARCH, stack),
    "matching.relaxation.soft_act": lambda a, b, stack, f: sg.matching.relaxation.soft_act(
        ARCH, sg.matching.relaxation.soften(ARCH, sg.matching.relaxation.logits_of(ARCH, ELEMENT)), a
    ),
    "matching.straight_through_matching": lambda a, b, stack, f: sg.matching.straight_through_matching(
        ARCH, a, b, lambda params, x: jnp.square(f(params, x)).mean(), X[:2]
    ),
    "matching.unmatched": lambda a, b, stack, f: sg.matching.unmatched(ARCH, a, b),
    "merge.repair": lambda a, b, stack, f: sg.merge.repair(ARCH, a, stack, X),
    "merge.reset_batch_norm": lambda a, b, stack, f: sg.merge.reset_batch_norm(ARCH, a, X),
    "merge.soup": lambda a, b, stack, f: sg.merge.soup(stack, jnp.array([0.0, 0.5])),
    "merge.task_arithmetic": lambda a, b, stack, f: sg.merge.task_arithmetic(a, stack, 0.5),
    "models.baselines.standardization": lambda a, b, stack, f: sg.models.baselines.standardization(ARCH, stack),
    "models.baselines.statistics": lambda a, b, stack, f: sg.models.baselines.statistics(ARCH, a),
    "models.embed": lambda a, b, stack, f: sg.models.embed(ENCODER, variables(), stack),
    "models.init": lambda a, b, stack, f: jax.tree.leaves(sg.models.init(ENCODER, KEY, a)),
    "models.graph.from_params": lambda a, b, stack, f: sg.models.graph.from_params(ARCH, a)[:2],
    "models.Encoder": lambda a, b, stack, f: encoded(a),
    "network.activations": lambda a, b, stack, f: list(sg.network.activations(ARCH, a, X).values()),
    "network.apply": lambda a, b, stack, f: sg.network.apply(ARCH, a, X),
    "network.at_means": lambda a, b, stack, f: [*sg.network.at_means(ARCH, a, X[0])],
    "network.at_places": lambda a, b, stack, f: [*sg.network.at_places(ARCH, a, X[0]).values()],
    "network.forward": lambda a, b, stack, f: sg.network.forward(
        BUILT, a, X[0], lambda path, layer, own, x, state: (sg.network.layer_output(layer, own, x), state), 0
    ),
    "network.replace_variables": lambda a, b, stack, f: sg.network.replace_variables(a, {("up", "bias"): jnp.ones(5)}),
    "network.train_apply": lambda a, b, stack, f: sg.network.train_apply(BUILT, a, X)[0],
    "report.same_function": lambda a, b, stack, f: (
        len(sg.report.same_function(ARCH, a, b, element=ELEMENT, loss=loss(f)).html) > 0
    ),
    "stacks.at_least_float32": lambda a, b, stack, f: stacks.at_least_float32(a),
    "stacks.average": lambda a, b, stack, f: stacks.average(stack),
    "stacks.check_alike": lambda a, b, stack, f: stacks.check_alike(a, b),
    "stacks.check_finite": lambda a, b, stack, f: stacks.check_finite(a),
    "stacks.check_floating": lambda a, b, stack, f: stacks.check_floating(a),
    "stacks.combine": lambda a, b, stack, f: stacks.combine(a, b, 0.5, 2.0),
    "stacks.count": lambda a, b, stack, f: stacks.count(stack),
    "stacks.lerp": lambda a, b, stack, f: stacks.lerp(a, b, 0.25),
    "stacks.stack": lambda a, b, stack, f: stacks.stack(a, b),
    "symmetry.balanced_pair": lambda a, b, stack, f: [sg.symmetry.balanced_pair(ARCH, a, b).goal],
    "symmetry.canonical.element": lambda a, b, stack, f: sg.symmetry.canonical.element(ARCH, a),
    "symmetry.wrap_phase": lambda a, b, stack, f: sg.symmetry.wrap_phase(SIREN, a),
    "testing.assert_equivariant": lambda a, b, stack, f: sg.testing.assert_equivariant(ARCH, lambda p: p, a, KEY),
    "testing.assert_invariant": lambda a, b, stack, f: sg.testing.assert_invariant(ARCH, loss(f), a, KEY),
    "training.losses.teacher_logits": lambda a, b, stack, f: sg.training.losses.teacher_logits(BUILT, stack, X),
    "zoo.classifiers.cross_entropy": lambda a, b, stack, f: sg.zoo.classifiers.cross_entropy(BUILT, a, X, DRAWN),
    "zoo.classifiers.score": lambda a, b, stack, f: sg.zoo.classifiers.score(BUILT, a, X, DRAWN),
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
    "matching.many": lambda a, b, stack, f: sg.matching.many(ARCH, stack, stack),
    "matching.sinkhorn_matching": lambda a, b, stack, f: sg.matching.sinkhorn_matching(
        ARCH, a, b, KEY, loss_fn=loss(f), num_steps=2
    ),
    "matching.search_matching": lambda a, b, stack, f: sg.matching.search_matching(
        ARCH, a, b, None, KEY, loss_fn=loss(f), start=ELEMENT, max_sweeps=1
    ),
    "matching.fit_scales": lambda a, b, stack, f: sg.matching.fit_scales(
        RELU, a, b, None, loss_fn=loss(f), num_steps=1
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
    "testing.assert_function_preserved": lambda a, b, stack, f: sg.testing.assert_function_preserved(ARCH, f, a, X),
}


# Those with an argument of such a name that need no test with every container.
OTHERS = {
    "architecture.flatten": "takes nested dicts to paths, as other functions of params get them",
    **dict.fromkeys(
        (f"distributed.{name}" for name in ("gather", "place_rows", "replicate", "shard_rows", "take")), "of any pytree"
    ),
    "io.checksum": "of any pytree's arrays",
    "models.match_size": "takes the shapes of an example for a model",
    "models.reference.encode": "its variables are those of a model",
    "training.init": "its variables are those of a model",
    "network.merge_variables": "from Flax's variables",
    "network.split_variables": "to Flax's variables",
    "network.render": "as network.apply, at the places of pixels",
    "report.widget": "as report.same_function, in a notebook",
    "stacks.abstract": "of any pytree",
    "stacks.is_concrete": "of any pytree",
    "stacks.like": "tested below",
    "stacks.reader": "tested below",
    "stacks.to_dict": "tested below",
    **dict.fromkeys(
        ("network.convolve", "network.convolve_by_patches", "network.layer_output", "network.preactivation"),
        "takes the params of one layer",
    ),
}
NETWORK_ARGUMENTS = {
    *("params", "target", "targets", "stack", "merged", "networks", "a", "b", "c", "base", "tuned", "vectors"),
    *("variables", "tree", "template"),
}


def test_no_public_function_of_networks_is_left_out():
    found = {}
    for module in pkgutil.walk_packages(sg.__path__, "jax_scalegmn."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            own = importlib.import_module(module.name)
            for name in getattr(own, "__all__", ()):
                value = getattr(own, name)
                if inspect.isfunction(value) and NETWORK_ARGUMENTS & set(inspect.signature(value).parameters):
                    found.setdefault(value, f"{module.name.removeprefix('jax_scalegmn.')}.{name}")
    assert {*found.values()} - {*FUNCTIONS} == {*OTHERS} - {*FUNCTIONS}


@functools.cache
def expected(name):
    a, b, c = map(network, range(3))
    return FUNCTIONS[name](a, b, stacks.stack(c, a, b), apply_dict)


def every_function_with_every_container():
    """Of every second function one container runs without -m slow, in turn, so that every container is there."""
    for number, name in enumerate(FUNCTIONS):
        for place, container in enumerate(CONTAINERS):
            quick = number % 2 == 0 and (place - number // 2) % len(CONTAINERS) == 0
            yield pytest.param(name, container, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "container"), list(every_function_with_every_container()))
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


class Tied(nnx.Module):
    """One layer at two places."""

    def __init__(self, seed):
        self.first = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_a_layer_that_a_module_shares_is_not_made_two():
    a, b = Tied(0), Tied(1)
    with pytest.raises(ValueError, match=r"one variable as first.bias and second.bias; .* nnx.split\(module\)"):
        sg.infer(lambda module, x: module(x), a, X)
    (graphdef, first), (_, second) = nnx.split(a), nnx.split(b)  # the cure that the message names
    arch = sg.infer(lambda state, x: nnx.merge(graphdef, state)(x), first, X).arch
    aligned = nnx.merge(graphdef, sg.matching.align(arch, second, first))
    assert aligned.first is aligned.second
    np.testing.assert_allclose(aligned(X), b(X), atol=1e-5)


def test_a_place_that_a_stack_does_not_have_is_refused():
    stack = {"w": jnp.arange(3.0)}
    assert stacks.member(stack, -1)["w"] == 2
    np.testing.assert_array_equal(stacks.member(stack, np.array([2, 0]))["w"], [2, 0])
    for place in (3, -4, np.array([0, 3]), jnp.asarray(7)):
        with pytest.raises(ValueError, match="expected places of a stack of 3, 0 to 2"):
            stacks.member(stack, place)


def test_networks_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"Equinox has no array up.scale; expected the names down.bias, .* one kind"):
        stacks.like(Equinox(**{k: Layer(**v) for k, v in network(0).items()}), {"up": {"scale": 1.0}})
    with pytest.raises(ValueError, match="Two arrays are named"):
        stacks.to_dict(collections.OrderedDict({1: jnp.ones(1), "1": jnp.ones(1)}))
