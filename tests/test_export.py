"""Every public function that can be compiled exports for CPU, CUDA and TPU: no callback, no float64, no open shape."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import landscape, matching, merge, models, network, stacks, symmetry, training
from jax_scalegmn.matching import assignment, relaxation
from jax_scalegmn.network import moments
from jax_scalegmn.training import losses
from jax_scalegmn.zoo import classifiers

PLATFORMS = ("cpu", "cuda", "tpu")
# Layers of 9 neurons are assigned by another solver than narrower ones.
ARCHITECTURES = {
    "siren": sg.siren((2, 9, 9, 1)),
    "tanh mlp": sg.mlp((3, 9, 4, 2), "tanh"),
    "relu mlp": sg.mlp((3, 9, 4, 2), "relu"),
    "mixed mlp": sg.mlp((3, 9, 4, 6, 2), ("tanh", "leaky_relu", "gelu")),
    "relu cnn": sg.cnn((1, 9, 4), 2),
    "tanh cnn": sg.cnn((2, 3, 9), 3, activation="tanh", kernel_size=(3, 2), padding="SAME", flatten=(7, 9)),
    "batch norm": support.batch_norm_mlp()[0],
    "layer norm": support.layer_norm_mlp()[0],
    "residual tanh": support.residual_mlp("tanh")[0],
}
RESNET = sg.resnet(8, widths=(4, 9, 12), outputs=3)
MLP = ARCHITECTURES["tanh mlp"]
INFERRED = sg.infer(functools.partial(sg.network.apply, MLP), support.random_params(MLP), support.example(MLP)[0]).arch
OWN = {"inferred": INFERRED}
QUICK = ("siren", "relu cnn")


def size(params):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))


def model(arch):
    return sg.Encoder(sg.ScaleGMN(arch, features=4, num_layers=1))


def variables(made, params):
    return support.random_variables(made, params)


def step(arch, a, x, key):
    """One training step of an autoencoder whose loss matches, on two networks."""
    made = sg.autoencoder(arch, 4, num_layers=1)
    tx = optax.sgd(0.1)
    loss = losses.inr_reconstruction(made, size=(3, 3), orbit_weight=0.3)
    begin = variables(made, a)
    state = training.State(begin, tx.init(begin), key, jnp.asarray(0))
    return training.make_step(loss, tx)(state, stacks.stack(a, a))


# name -> (arch, two networks, examples, key) -> its result. Of the networks' weights alone, and of what they compute.
ON_WEIGHTS = {
    "symmetry.act": lambda arch, a, b, x, key: symmetry.act(arch, symmetry.random(arch, key), a),
    "symmetry.balance": lambda arch, a, b, x, key: symmetry.balance(arch, a),
    "symmetry.balanced": lambda arch, a, b, x, key: symmetry.balanced(arch, a),
    "symmetry.balanced_pair": lambda arch, a, b, x, key: symmetry.balanced_pair(arch, a, b)[1:3],
    "symmetry.compose": lambda arch, a, b, x, key: symmetry.compose(
        arch, symmetry.random(arch, key), symmetry.random(arch, key)
    ),
    "symmetry.identity": lambda arch, a, b, x, key: symmetry.identity(arch),
    "symmetry.inverse": lambda arch, a, b, x, key: symmetry.inverse(arch, symmetry.random(arch, key)),
    "symmetry.orbit": lambda arch, a, b, x, key: symmetry.orbit(arch, a, key, 3),
    "symmetry.random": lambda arch, a, b, x, key: symmetry.random(arch, key),
    "symmetry.canonical.element": lambda arch, a, b, x, key: symmetry.canonical.element(arch, a),
    "symmetry.canonical.form": lambda arch, a, b, x, key: symmetry.canonical.form(arch, a),
    "matching.align": lambda arch, a, b, x, key: matching.align(arch, a, b),
    "matching.align_all": lambda arch, a, b, x, key: matching.align_all(
        arch, stacks.stack(a, b, a), frame=matching.Reference.CENTRAL
    ),
    "matching.align_to": lambda arch, a, b, x, key: matching.align_to(arch, stacks.stack(a, b), stacks.stack(b, a)),
    "matching.best_of": lambda arch, a, b, x, key: matching.best_of(
        arch, a, b, [functools.partial(matching.weight_matching, arch)], size
    ),
    "matching.canonical_matching": lambda arch, a, b, x, key: matching.canonical_matching(arch, a, b),
    "matching.cycle_consistency": lambda arch, a, b, x, key: matching.cycle_consistency(
        arch, matching.relative(arch, jax.vmap(lambda k: symmetry.random(arch, k))(jax.random.split(key, 3)))
    ),
    "matching.framed": lambda arch, a, b, x, key: matching.framed(
        arch, stacks.stack(a, b), jax.vmap(lambda k: symmetry.random(arch, k))(jax.random.split(key))
    ),
    "matching.orbit_distance": lambda arch, a, b, x, key: jax.value_and_grad(matching.orbit_distance, 2)(arch, a, b),
    "matching.pairwise": lambda arch, a, b, x, key: matching.pairwise(arch, stacks.stack(a, b, a)),
    "matching.relative": lambda arch, a, b, x, key: matching.relative(
        arch, jax.vmap(lambda k: symmetry.random(arch, k))(jax.random.split(key, 3))
    ),
    "matching.similarity": lambda arch, a, b, x, key: matching.similarity(arch, a, b),
    "matching.sinkhorn_matching": lambda arch, a, b, x, key: matching.sinkhorn_matching(arch, a, b, num_steps=2),
    "matching.unmatched": lambda arch, a, b, x, key: matching.unmatched(arch, a, b),
    "matching.weight_matching": lambda arch, a, b, x, key: matching.weight_matching(arch, a, b, key, restarts=2),
    "matching.relaxation.harden": lambda arch, a, b, x, key: relaxation.harden(arch, logits(arch, a)),
    "matching.relaxation.logits_of": lambda arch, a, b, x, key: relaxation.logits_of(arch, symmetry.random(arch, key)),
    "matching.relaxation.soften": lambda arch, a, b, x, key: relaxation.soften(arch, logits(arch, a)),
    "matching.relaxation.soft_act": lambda arch, a, b, x, key: relaxation.soft_act(
        arch, relaxation.soften(arch, logits(arch, a)), a
    ),
    "merge.average": lambda arch, a, b, x, key: merge.average(stacks.stack(a, b)),
    "merge.greedy_soup": lambda arch, a, b, x, key: merge.greedy_soup(size, stacks.stack(a, b)),
    "merge.lerp": lambda arch, a, b, x, key: merge.lerp(a, b, 0.5),
    "merge.piecewise": lambda arch, a, b, x, key: merge.piecewise(stacks.stack(a, b, a), 0.7),
    "merge.slerp": lambda arch, a, b, x, key: merge.slerp(a, b, 0.5),
    "merge.soup": lambda arch, a, b, x, key: merge.soup(stacks.stack(a, b), jnp.linspace(0, 1, 3)),
    "merge.task_arithmetic": lambda arch, a, b, x, key: merge.task_arithmetic(a, stacks.stack(b, a)),
    "merge.task_vector": lambda arch, a, b, x, key: merge.task_vector(a, b),
    "merge.ties": lambda arch, a, b, x, key: merge.ties(a, stacks.stack(b, a)),
    "models.baselines.statistics": lambda arch, a, b, x, key: models.baselines.statistics(arch, a),
    "models.graph.from_params": lambda arch, a, b, x, key: models.graph.from_params(arch, a),
    "models.embed": lambda arch, a, b, x, key: model(arch).apply(variables(model(arch), a), a),
    "landscape.barrier": lambda arch, a, b, x, key: landscape.barrier(size, a, b, num_points=3),
    "landscape.path": lambda arch, a, b, x, key: landscape.path(size, a, b, num_points=3),
    "landscape.plane": lambda arch, a, b, x, key: landscape.plane(size, a, b, stacks.lerp(a, b, 2.0), num_points=3),
    "training.make_evaluation": lambda arch, a, b, x, key: training.make_evaluation(
        lambda variables, row, key: (size(row), {})
    )(0, stacks.stack(a, b)),
}
ON_FUNCTIONS = {
    "matching.activation_matching": lambda arch, a, b, x, key: matching.activation_matching(arch, a, b, x),
    "matching.search_matching": lambda arch, a, b, x, key: matching.search_matching(arch, a, b, x, key, max_sweeps=1),
    "matching.straight_through_matching": lambda arch, a, b, x, key: matching.straight_through_matching(
        arch, a, b, x=x, key=key, num_steps=2
    ),
    "merge.merge_many": lambda arch, a, b, x, key: merge.merge_many(arch, stacks.stack(a, b), x, key, max_sweeps=1),
    "merge.repair": lambda arch, a, b, x, key: merge.repair(arch, merge.lerp(a, b, 0.5), stacks.stack(a, b), x),
    "network.activations": lambda arch, a, b, x, key: network.activations(arch, a, x[0]),
    "network.apply": lambda arch, a, b, x, key: network.apply(arch, a, x[0]),
    "network.init": lambda arch, a, b, x, key: network.init(arch, key),
    "network.train_apply": lambda arch, a, b, x, key: network.train_apply(arch, a, x),
    "zoo.classifiers.cross_entropy": lambda arch, a, b, x, key: classifiers.cross_entropy(
        arch, a, x, jnp.zeros(4, int)
    ),
    "zoo.classifiers.score": lambda arch, a, b, x, key: classifiers.score(arch, a, x, jnp.zeros(4, int)),
}
BUILT_ALONE = ("network.init", "network.train_apply")  # an inferred network is made and trained by its own code
ON_INRS = {
    "network.render": lambda arch, a, b, x, key: network.render(arch, a, (3, 4)),
    "symmetry.wrap_phase": lambda arch, a, b, x, key: symmetry.wrap_phase(arch, a),
    "training.make_step": lambda arch, a, b, x, key: step(arch, a, x, key),
}
RELU = sg.mlp((2, 4, 2), "relu")
ON_ARRAYS = {
    "landscape.bootstrap": lambda x, key: landscape.bootstrap(x[0], key),
    "landscape.height": lambda x, key: landscape.height(x[0]),
    "landscape.interval": lambda x, key: landscape.interval(x, key),
    "matching.assignment.by_platform": lambda x, key: jax.vmap(assignment.by_platform)(jnp.stack([x, 2 * x])),
    "matching.assignment.hungarian": lambda x, key: assignment.hungarian(x),
    "matching.assignment.with_signs": lambda x, key: assignment.with_signs(x, x),
    "matching.cross_entropy": lambda x, key: matching.cross_entropy(x, x),
    "matching.fit_scales": lambda x, key: matching.fit_scales(
        RELU, *(network.init(RELU, one) for one in jax.random.split(key)), x[:, :2], num_steps=2
    ),
    "matching.squared_error": lambda x, key: matching.squared_error(x, x),
    "matching.relaxation.sinkhorn_solver": lambda x, key: relaxation.sinkhorn_solver(3)(x),
    "network.moments.over_examples": lambda x, key: jax.vmap(
        moments.over_examples, axis_name=moments.EXAMPLES, out_axes=None
    )(x),
    "network.sine": lambda x, key: jax.value_and_grad(lambda x: network.sine(x).sum())(x),
    "stacks.average": lambda x, key: stacks.average({"x": x}),
    "stacks.lerp": lambda x, key: stacks.lerp(x, x, 0.5),
}
# On the host (files, checks, words and values of a program being built), part of another one, or loops that compile.
NOT_ALONE = {
    "landscape": (),
    "matching": ("assignment.default", "assignment.scipy", "many"),
    "merge": ("reset_batch_norm", "uncorrected"),
    "models": (
        *("abstract_variables", "alignment_encoder", "as_json", "autoencoder", "baselines.standardization"),
        *("from_json", "graph.to_params", "init", "match_size", "num_parameters", "reference.encode"),
        *("published.autoencoder", "published.editor", "published.encoder"),
    ),
    "network": (
        *(
            "activate",
            "at_means",
            "at_places",
            "check_examples",
            "convolve",
            "convolve_by_patches",
            "coordinates",
            "forward",
        ),
        *("layer_output", "merge_variables", "moments.batches", "moments.pooled", "moments.varies", "near_zero"),
        *("preactivation", "replace_variables", "split_variables", "standard"),
    ),
    "symmetry": ("act_on_axis", "act_on_others", "check"),
    "training": (
        *("checkpoint.load", "fit", "init", "losses.alignment", "losses.classification", "losses.distillation"),
        *("losses.editing", "population"),
        *("losses.inr_reconstruction", "losses.regression", "losses.teacher_logits", "make_optimizer"),
    ),
}


def logits(arch, params):
    rng = np.random.default_rng(0)
    return {layer.name: jnp.asarray(rng.normal(size=(layer.width,) * 2), jnp.float32) for layer in arch.hidden}


def faults(fn, *args):
    """What is wrong with the exported program of each platform; and whether its program runs here, on CPU."""
    found = {}
    for platform in PLATFORMS:
        exported = jax.export.export(jax.jit(fn), platforms=[platform])(*args)
        text = exported.mlir_module()
        forbidden = ("callback", "f64", "tensor<?", "x?x")
        code = [line for line in text.splitlines() if not line.startswith("#loc")]  # those hold addresses, like 0x7f64
        wrong = [line for line in code if any(word in line for word in forbidden)]
        found[platform] = wrong + [str(aval) for aval in exported.out_avals if aval.dtype == np.float64]
        found[platform] += [name for name in re.findall(r"custom_call @(\w+)", text) if "python" in name]
    return {platform: wrong for platform, wrong in found.items() if wrong}


def cases(functions, architectures, quick):
    for name in functions:
        for kind, arch in architectures.items():
            marks = () if kind in QUICK and name in quick else pytest.mark.slow
            yield pytest.param(arch, functions[name], id=f"{name}-{kind}", marks=marks)


@pytest.mark.parametrize(
    ("arch", "fn"),
    [
        *cases(
            ON_WEIGHTS,
            ARCHITECTURES | {"resnet": RESNET} | OWN,
            ("matching.weight_matching", "symmetry.act"),
        ),
        *cases(
            ON_FUNCTIONS,
            {name: arch for name, arch in ARCHITECTURES.items() if arch.layers} | {"resnet": RESNET},
            ("matching.activation_matching", "network.apply"),
        ),
        *cases({name: ON_FUNCTIONS[name] for name in ON_FUNCTIONS if name not in BUILT_ALONE}, OWN, ()),
        *cases(ON_INRS, {"siren": ARCHITECTURES["siren"]}, ("network.render",)),
    ],
)
def test_functions_of_networks_export(arch, fn):
    a, b = support.random_params(arch, 0), support.random_params(arch, 1)
    x = support.example(MLP if arch is INFERRED else arch) if arch.layers or arch is INFERRED else jnp.ones(1)
    assert not faults(functools.partial(fn, arch), a, b, x, jax.random.key(0))


@pytest.mark.parametrize("name", ON_ARRAYS)
def test_functions_of_arrays_export(name):
    score = jnp.asarray(np.random.default_rng(0).normal(size=(12, 12)), jnp.float32)
    assert not faults(ON_ARRAYS[name], score, jax.random.key(0))


def test_a_program_for_three_platforms_computes_what_the_compiled_one_does():
    arch = ARCHITECTURES["tanh mlp"]
    a, b = support.random_params(arch, 0), support.random_params(arch, 1)
    match = jax.jit(functools.partial(matching.weight_matching, arch))
    exported = jax.export.export(jax.jit(lambda a, b: tuple(match(a, b).element)), platforms=PLATFORMS)(a, b)
    support.assert_identical(exported.call(a, b), tuple(match(a, b).element))


def test_callbacks_float64_and_scipy_on_a_tpu_are_found():
    """The negative control."""
    x = jnp.ones((9, 9))
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        faults(assignment.scipy, x)
    with jax.enable_x64(True):
        assert faults(lambda x: x.astype("float64"), x)
    with pytest.raises(ValueError, match=r"for a TPU; expected a solver on the device\. Leave out assign"):
        jax.jit(assignment.scipy).trace(x).lower(lowering_platforms=("tpu",))
    solve = jax.jit(functools.partial(matching.weight_matching, MLP, assign=assignment.scipy))
    params = support.random_params(MLP)
    with pytest.raises(ValueError, match=r"the program is for a TPU; expected a solver on the device"):
        jax.export.export(solve, platforms=["tpu"])(params, params)
    with pytest.raises(ValueError, match=r"the program is for all of cpu, tpu; expected a solver on the device"):
        jax.export.export(solve, platforms=["cpu", "tpu"])(params, params)
    assert "callback" in jax.jit(assignment.by_platform).lower(x).as_text()


def test_the_tables_have_every_public_function():
    def public(module, seen):
        for value in (getattr(module, name) for name in module.__all__):
            if inspect.ismodule(value) and value not in seen:
                seen.add(value)
                yield from public(value, seen)
            elif inspect.isfunction(value):
                yield value

    names = [*ON_WEIGHTS, *ON_FUNCTIONS, *ON_INRS, *ON_ARRAYS]
    names += [f"{package}.{name}" for package, others in NOT_ALONE.items() for name in others]
    known = {functools.reduce(getattr, name.split("."), sg) for name in names}
    seen = set()
    missing = {value for package in NOT_ALONE for value in public(getattr(sg, package), seen)} - known
    assert not {f"{value.__module__}.{value.__name__}" for value in missing}
