"""An editor writes one network or several whose outputs are averaged; every one of them follows the group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, network
from jax_scalegmn.models import Editor, Output, ScaleGMN, graph
from jax_scalegmn.training import losses

ARCHITECTURES = {
    **{name: support.ARCHITECTURES[name] for name in ("siren", "mixed mlp", "relu cnn")},
    "batch norm": support.HAND_WRITTEN["batch norm"][0],
    "permutations": architecture.restrict(support.ARCHITECTURES["siren"], sg.Scaling.PERMUTATION),
}
SIREN = ARCHITECTURES["siren"]


def editor(arch, networks, **options):
    return Editor(ScaleGMN(arch, 4, num_layers=2, hidden=3, **options), out_scale=0.5, networks=networks)


@pytest.mark.parametrize(
    "name", [name if name == "siren" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_one_of_the_edited_networks_follows_the_group(name):
    """And they are different networks: what is moved is not the same edit three times."""
    arch = ARCHITECTURES[name]
    model, params = editor(arch, 3, bidirectional=name != "siren"), support.random_params(arch)
    variables = support.random_variables(model, params)
    edit = jax.jit(model.apply)
    edited = edit(variables, params)
    assert [leaf.shape[0] for leaf in jax.tree.leaves(edited)] == [3] * len(jax.tree.leaves(params))
    for seed in range(3):
        element = support.rows(support.random_elements(arch, 1, seed=seed), 0)
        moved = edit(variables, sg.symmetry.act(arch, element, params))
        expected = jax.vmap(lambda one, element=element: sg.symmetry.act(arch, element, one))(edited)
        assert support.deviation(moved, expected) < 1e-4
        assert support.deviation(moved, edited) > 1e-2
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert support.deviation(support.rows(edited, first), support.rows(edited, second)) > 1e-2


@pytest.mark.slow
def test_one_network_in_a_stack_is_the_one_without():
    params = support.random_params(SIREN)
    plain, stacked = editor(SIREN, None), editor(SIREN, 1)
    variables = support.random_variables(plain, params)
    own = {"params": variables["params"] | {"out_scales": variables["params"]["out_scales"][None]}}
    expected, got = jax.jit(plain.apply)(variables, params), jax.jit(stacked.apply)(own, params)
    assert support.deviation(support.rows(got, 0), expected) < 1e-6


@pytest.mark.slow
def test_the_average_of_what_edited_networks_draw_is_invariant_and_what_the_loss_compares():
    model, params = editor(SIREN, 3), support.random_params(SIREN)
    variables, size = support.random_variables(model, params), (4, 5)
    edited = jax.jit(model.apply)(variables, params)
    drawn = jnp.stack([network.render(SIREN, support.rows(edited, row), size) for row in range(3)])
    assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 1e-2
    image = np.random.default_rng(0).uniform(size=size).astype("float32")
    loss_fn = jax.jit(losses.editing(model, train=False))
    loss, metrics = loss_fn(variables, (params, image), jax.random.key(0))
    assert float(loss) == pytest.approx(float(jnp.square(drawn.mean(0) - image).mean()), rel=1e-4)
    before = jnp.square(network.render(SIREN, params, size) - image).mean()
    assert float(metrics["unedited"]) == pytest.approx(float(before), rel=1e-4)
    moved = sg.symmetry.act(SIREN, sg.symmetry.random(SIREN, jax.random.key(1)), params)
    assert float(loss_fn(variables, (moved, image), jax.random.key(0))[0]) == pytest.approx(float(loss), rel=1e-3)


def test_numbers_of_networks_that_make_no_sense_are_refused():
    params = support.random_params(SIREN)
    built = graph.from_params(SIREN, params)
    gmn = ScaleGMN(SIREN, 4, num_layers=1)
    with pytest.raises(ValueError, match=r"networks is 0 .*expected a number >= 1 with Output\.PARAMETERS"):
        jax.eval_shape(editor(SIREN, 0).init, jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"networks is 2 with Output\.FEATURES"):
        jax.eval_shape(lambda key: gmn.init(key, built, output=Output.FEATURES, networks=2), jax.random.key(0))
