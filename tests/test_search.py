"""Search matching: never above its start, exact at both ends, better than weights on independently fitted networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, merge, network, stacks, symmetry
from jax_scalegmn.matching import _differentiable, _exchanges, _functions, _search, _thin

SIREN = sg.siren((2, 6, 6, 1), w0=10.0, offset=0.5)
RELU = sg.mlp((3, 4, 5, 2), "relu")
NONE = sg.mlp((3, 4, 2), "gelu")
X = jnp.asarray(network.coordinates(5, 5)).reshape(-1, 2)
DATA = jax.random.normal(jax.random.key(9), (16, 3))


def networks(arch, count, seed=0):
    return jax.vmap(functools.partial(network.init, arch))(jax.random.split(jax.random.key(seed), count))


def outputs(arch, params, x):
    return jax.vmap(functools.partial(network.apply, arch, params))(x)


@functools.cache
def fitted():
    """Two independent fits of each of three images."""
    yy, xx = np.mgrid[:5, :5] / 4
    images = np.stack([xx * yy, np.sin(3 * xx + yy) ** 2, (xx - yy) ** 2]).astype(np.float32)
    zoo = sg.zoo.fit_images(SIREN, images, np.arange(3), image_index=np.repeat(np.arange(3), 2), num_steps=200)
    return [jax.tree.map(lambda leaf, k=k: jnp.asarray(leaf)[k::2], zoo.params) for k in (0, 1)]


@functools.cache
def found():
    """The pairs, their weight matchings and the searches from there: vmapped, and one by one."""
    target, params = fitted()
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.jit(jax.vmap(functools.partial(matching.weight_matching, SIREN)))(params, target)
    search = jax.jit(lambda p, t, key, start: matching.search_matching(SIREN, p, t, X, key, start=start))
    return weights, jax.jit(jax.vmap(search))(params, target, keys, weights.element), search, keys


def middle_error(element):
    target, params = fitted()
    moved = jax.vmap(functools.partial(symmetry.act, SIREN))(element, params)
    middle = jax.vmap(functools.partial(outputs, SIREN, x=X))(merge.lerp(target, moved, 0.5))
    ends = [jax.vmap(functools.partial(outputs, SIREN, x=X))(stack) for stack in (target, params)]
    return jnp.square(middle - (ends[0] + ends[1]) / 2).mean()


def check_valid(arch, element):
    symmetry.check(arch, element)
    for neurons in arch.hidden:
        assert sorted(np.asarray(element.permutation[neurons.name]).tolist()) == list(range(neurons.width))
        scale = np.asarray(element.scale[neurons.name])
        allowed = {"sign": np.abs(scale) == 1, "positive": scale > 0, "permutation": scale == 1}
        assert allowed[neurons.scaling.value].all()


def test_search_is_never_above_its_start_and_says_what_it_took():
    weights, searched, _, _ = found()
    assert (searched.loss <= searched.start_loss).all()
    assert (searched.loss < 0.9 * searched.start_loss).any()
    # One for the start, then by neuron 4 partners with 4 signs each.
    assert (searched.evaluations == 1 + searched.sweeps * 12 * 4 * 4).all()
    assert weights.loss is None


def test_search_beats_weights_on_independent_fits_and_chance_does_not():
    weights, searched, _, keys = found()
    assert middle_error(searched.element) < 0.8 * middle_error(weights.element)
    # The negative control: elements that nothing was searched by.
    drawn = jax.vmap(functools.partial(symmetry.random, SIREN))(keys)
    assert middle_error(drawn) > middle_error(weights.element)


@pytest.mark.slow
def test_gradient_steps_before_the_search_reach_lower_and_keep_its_promises():
    """From the identity, which is far: never above the start, better than the same search alone."""
    target, params = fitted()
    keys, start = jax.random.split(jax.random.key(0), 3), symmetry.identity(SIREN)

    def mean_loss(steps):
        def search(params, target, key):
            return matching.search_matching(
                SIREN, params, target, X, key, start=start, gradient_steps=steps, max_sweeps=1
            )

        return jax.jit(jax.vmap(search))(params, target, keys)

    alone, after = mean_loss(0), mean_loss(40)
    np.testing.assert_allclose(after.start_loss, alone.start_loss, rtol=1e-5)
    assert (after.loss <= after.start_loss).all()
    assert after.loss.mean() < alone.loss.mean()
    assert (after.evaluations == alone.evaluations + 80).all()
    for index in range(3):
        check_valid(SIREN, stacks.member(after.element, index))


@pytest.mark.slow
def test_gradient_steps_never_leave_a_better_start():
    arch, params = RELU, speaking(RELU)
    planted = symmetry.random(arch, jax.random.key(5))
    target = support.act(arch, planted, params)
    search = functools.partial(matching.search_matching, arch, start=planted, max_sweeps=1, gradient_steps=2)
    kept = jax.jit(search)(params, target, DATA, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, kept.element.permutation, planted.permutation)


def test_end_points_are_exact():
    _, searched, _, _ = found()
    _, params = fitted()
    moved = jax.vmap(functools.partial(symmetry.act, SIREN))(searched.element, params)
    render = jax.vmap(functools.partial(outputs, SIREN, x=X))
    np.testing.assert_allclose(render(moved), render(params), atol=1e-5)
    for index in range(3):
        check_valid(SIREN, stacks.member(searched.element, index))


def test_vmapped_equals_one_by_one():
    weights, searched, search, keys = found()
    target, params = fitted()
    pairs = (stacks.member((params, target), 1), keys[1], stacks.member(weights.element, 1))
    single = search(*pairs[0], *pairs[1:])
    jax.tree.map(np.testing.assert_array_equal, single.element.permutation, stacks.member(searched, 1).element[0])
    np.testing.assert_allclose(single.loss, searched.loss[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [SIREN, RELU, NONE], ids=["sign", "positive", "permutation"])
def test_the_change_of_two_neurons_is_what_a_whole_pass_says(arch, monkeypatch):
    """Two routes to one number: all exchanges with a neuron at once, and each as a network of its own."""
    params, target = (stacks.member(networks(arch, 2), index) for index in (0, 1))
    x = X if arch is SIREN else DATA
    signs = np.asarray([[1, 1], [1, -1], [-1, 1], [-1, -1]] if arch is SIREN else [[1, 1]], np.float32)
    start = symmetry.random(arch, jax.random.key(3))
    partners = jnp.arange(4)
    losses = []
    for chain in (_exchanges._chain, lambda arch: []):
        monkeypatch.setattr(_exchanges, "_chain", chain)

        def of(params, target):
            pair, first = _differentiable._begin(arch, params, target, start)
            points = jnp.asarray([0.3, 0.5])
            objective = _exchanges.objective(pair, x, points, matching.squared_error, None, None)
            each = [objective.exchanged(first, n.name, jnp.asarray(1), partners, signs) for n in arch.hidden]
            return objective.loss(first), each

        losses.append(jax.jit(of)(params, target))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), *losses)
    if arch is not SIREN:  # a neuron exchanged with itself
        np.testing.assert_allclose(losses[0][1][0][1, 0], losses[0][0], rtol=1e-5)


CONVOLUTIONS = {
    "list of layers": sg.sequential(
        [
            *(sg.layers.Conv(4, 3, padding=1), sg.layers.BatchNorm(), "relu", sg.layers.MaxPool(2)),
            *(sg.layers.Conv(5, 3), "tanh", sg.layers.Flatten(), sg.layers.Dense(4), "abs", sg.layers.Dense(2)),
        ],
        (1, 8, 8),
    ),
    "cnn": sg.cnn((1, 4, 5), 2, flatten=(9, 9), padding="SAME"),
    "vgg": sg.vgg(((4, 5), (4,)), 2, norm="batch", input_channels=1),
    "layer norm": sg.vgg(((4,), (4,)), 2, norm="layer", input_channels=1),
    "resnet": sg.resnet(6, widths=(4, 4), input_channels=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_what_an_exchange_changes_is_what_a_whole_pass_says(name):
    """Two routes to one number in convolutional networks: what changes, and whole passes."""
    arch = CONVOLUTIONS[name]
    params, target = (positive_variances(support.random_params(arch, seed)) for seed in (0, 1))
    x = jax.random.normal(jax.random.key(0), (3, 1, 8, 8) if name == "list of layers" else (3, 9, 9, 1))
    start, points = symmetry.random(arch, jax.random.key(3)), jnp.asarray([0.3, 0.5])

    def of(params, target):
        pair, first = _differentiable._begin(arch, params, target, start)
        changes = _exchanges.objective(pair, x, points, matching.squared_error, None, None)
        at = _functions.segment_distance(pair, x, matching.squared_error)
        whole = _exchanges._one_by_one(pair, points, at)
        found = []
        for neurons in arch.hidden:
            signs = _search._layer(neurons, 64).signs
            arguments = (first, neurons.name, jnp.asarray(1), jnp.arange(3), signs)
            found.append((changes.exchanged(*arguments), whole[1](*arguments)))
        return changes.loss(first), found

    loss, found = jax.jit(of)(params, target)
    for changed, whole in found:
        np.testing.assert_allclose(changed, whole, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(changed[1, 0], loss, rtol=1e-4)  # a neuron exchanged with itself
        assert np.abs(whole - loss).max() > 1e-4 * loss


def positive_variances(params):
    def positive(path, leaf):
        return jnp.abs(leaf) + 0.3 if "var" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(positive, params)


# By name a function of two arrays, [2, 4, 3] and [4, 5], whose neurons are the axes of 4, and whether its result stays
# thin.
OPERATIONS = {
    "entry by entry": (lambda x, w: jax.nn.relu(2 * x + jnp.tanh(x)) * w[None, :, :3], True),
    "a product over the neurons": (lambda x, w: jnp.einsum("anb,nc->abc", x, w), False),
    "of one side": (lambda x, w: jnp.einsum("anb,nc->abc", x, jnp.ones((4, 5))), False),
    "a product over other axes": (lambda x, w: jnp.einsum("anb,bc->acn", x, jnp.ones((3, 6))), True),
    "neurons last": (lambda x, w: jnp.ones((7, 5)) @ w.T, True),
    "after a whole change": (lambda x, w: (x.sum((1, 2))[:, None] + jnp.ones(5)) @ w.T, False),
    "flattened": (lambda x, w: jnp.cumsum(x.reshape(2, 12).T.reshape(12, 2, 1), 1)[:, -1], False),
    "flattened and read": (lambda x, w: x.reshape(2, 12) @ jnp.repeat(w, 3, 0), False),
    "neurons fastest": (lambda x, w: x.transpose(0, 2, 1).reshape(2, 12)[:1] * 3, True),
    "several places": (lambda x, w: jnp.concatenate([x, 2 * x], 1).reshape(2, 2, 4, 3), True),
    "with others": (lambda x, w: jnp.concatenate([x, jnp.ones((2, 1, 3))], 1), False),
    "padded next to them": (lambda x, w: jnp.pad(x, ((0, 1), (0, 0), (2, 0)))[:, :, 1:], True),
    "padded among them": (lambda x, w: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), False),
    "windows next to them": (lambda x, w: pooled(x, (1, 1, 2)), True),
    "windows over them": (lambda x, w: pooled(x, (1, 2, 1)), False),
    "a maximum next to them": (lambda x, w: x.max(0), True),
    "a maximum over them": (lambda x, w: x.max(1), False),
    "sorted": (lambda x, w: jnp.sort(x, 1), False),
    "two axes of neurons": (lambda x, w: w @ w.T, False),
    "nothing": (lambda x, w: jnp.ones(3), True),
}


def pooled(x, window):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1, 1), "VALID")


@pytest.mark.slow
@pytest.mark.parametrize("places", [(1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_on_two_changed_neurons_is_that_on_the_whole(name, places):
    fn, stays_thin = OPERATIONS[name]
    rng = np.random.default_rng(0)
    old = [rng.normal(size=shape).astype("f") for shape in ((2, 4, 3), (4, 5))]
    new = [value.copy() for value in old]
    new[0][:, list(places)] += 1.0
    new[1][list(places)] -= 1.0
    at = _thin.Places(4, jnp.asarray(places), jnp.asarray([True, places[0] != places[1]]))
    inputs = []
    for before, after, axis in zip(old, new, (1, 0), strict=True):
        layout = _thin.Layout(axis, 1, 1)
        inputs.append(_thin.Value(jnp.asarray(before), _thin.Thin(at.entries(jnp.asarray(after), layout), layout)))
    program = jax.make_jaxpr(fn)(*old)
    (value,) = _thin.evaluate(program.jaxpr, program.consts, inputs, at)
    np.testing.assert_allclose(at.whole(value), fn(*map(jnp.asarray, new)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value.old, fn(*map(jnp.asarray, old)), rtol=1e-5, atol=1e-5)
    assert (value.change is None or isinstance(value.change, _thin.Thin)) is stays_thin


@pytest.mark.parametrize("arch", [pytest.param(RELU, marks=pytest.mark.slow), NONE], ids=["positive", "permutation"])
def test_a_planted_element_is_kept_at_loss_0_in_any_gauge(arch):
    """Where no neuron is silent: silent ones cannot be told apart by what they compute."""
    params = speaking(arch)
    target = support.act(arch, planted := symmetry.random(arch, jax.random.key(5)), params)
    search = functools.partial(matching.search_matching, arch, params, target, DATA, jax.random.key(0), max_sweeps=3)
    kept = search(start=planted)
    assert float(kept.loss) < 1e-9
    check_valid(arch, kept.element)
    jax.tree.map(np.testing.assert_array_equal, kept.element.permutation, planted.permutation)
    aligned = support.act(arch, kept.element, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), aligned, target)


def speaking(arch):
    """A network whose every neuron is above 0 on some data, and below on others."""
    params = stacks.member(networks(arch, 1, seed=1), 0)
    values = jax.vmap(functools.partial(network.activations, arch, params))(DATA)
    values = jnp.concatenate([value for found in values.values() for value in found], -1)
    assert ((values > 0).any(0) & ((values <= 0).any(0))).all()
    return params


def test_a_planted_exchange_is_found():
    params = stacks.member(networks(NONE, 1), 0)
    planted = symmetry.Element({"hidden_0": jnp.array([2, 1, 0, 3])}, {"hidden_0": jnp.ones(4)})
    target = support.act(NONE, planted, params)
    start = matching.unmatched(NONE, params, target)  # a matching, which holds the identity
    result = matching.search_matching(NONE, params, target, DATA, jax.random.key(0), start=start)
    assert float(result.start_loss) > 1e-4
    assert float(result.loss) < 1e-9
    assert bool(result.converged)
    assert result.element.permutation["hidden_0"].tolist() == [2, 1, 0, 3]


def test_kicks_never_lose_what_was_found_and_find_more():
    target, params = fitted()
    weights, plain, _, keys = found()
    kicked = jax.jit(
        jax.vmap(lambda p, t, key, start: matching.search_matching(SIREN, p, t, X, key, start=start, kicks=3))
    )(params, target, keys, weights.element)
    assert (kicked.loss <= plain.loss * 1.0001).all()
    assert (kicked.loss < 0.99 * plain.loss).any()
    assert (kicked.start_loss == plain.start_loss).all()
    # One for the start and for each kick, then by neuron 4 partners with 4 signs each.
    assert (kicked.evaluations == 1 + 3 + kicked.sweeps * 12 * 4 * 4).all()
    assert (kicked.sweeps > plain.sweeps).all()
    for index in range(3):
        check_valid(SIREN, stacks.member(kicked.element, index))
        middle = functools.partial(symmetry.act, SIREN, stacks.member(kicked.element, index))
        moved, own = middle(stacks.member(params, index)), stacks.member(params, index)
        np.testing.assert_allclose(outputs(SIREN, moved, X), outputs(SIREN, own, X), atol=1e-5)


def test_a_kick_moves_some_neurons_of_one_layer():
    layers = [_search._layer(neurons, 64) for neurons in sg.mlp((2, 4, 9, 1), "relu").hidden]
    start = symmetry.random(sg.mlp((2, 4, 9, 1), "relu"), jax.random.key(0))
    kicked = jax.jit(jax.vmap(lambda key: _search._kicked(start, layers, key)))(jax.random.split(jax.random.key(1), 64))
    moved = {name: np.asarray(order != start.permutation[name]).sum(1) for name, order in kicked.permutation.items()}
    assert ((moved["hidden_0"] == 0) != (moved["hidden_1"] == 0)).all()
    assert set(moved["hidden_0"]) == {0, 3, 4}
    assert set(moved["hidden_1"]) == {0, 3, 4, 5, 6}
    for name, order in kicked.permutation.items():
        place = np.asarray(order)[:, :, None] == np.asarray(start.permutation[name])
        assert (place.sum((1, 2)) == order.shape[1]).all()  # a permutation
        np.testing.assert_array_equal(np.asarray(start.scale[name])[place.argmax(2)], kicked.scale[name])  # goes along


@pytest.mark.slow
def test_own_losses_functions_annealing_and_wide_layers():
    params, target = (stacks.member(networks(NONE, 2), index) for index in (0, 1))
    start, key = symmetry.identity(NONE), jax.random.key(0)
    search = functools.partial(matching.search_matching, NONE, params, target, start=start, max_sweeps=3)
    labels = jnp.arange(16) % 2
    run = functools.partial(outputs, NONE)

    def loss_fn(params):
        return -jax.nn.log_softmax(run(params, DATA))[jnp.arange(16), labels].mean()

    by_loss = search(None, key, loss_fn=loss_fn)
    moved = support.act(NONE, by_loss.element, params)
    path = [float(loss_fn(merge.lerp(target, moved, t))) for t in (0.25, 0.5, 0.75)]
    np.testing.assert_allclose(by_loss.loss, np.mean(path), rtol=1e-4)
    assert by_loss.loss <= by_loss.start_loss
    by_function = search(DATA, key, apply_fn=run, distance=matching.cross_entropy)
    assert by_function.loss <= by_function.start_loss
    # A step of the 4 neurons of a wide layer tries 1 exchange; annealing uses all sweeps.
    annealed = search(DATA, key, temperature=0.5, candidates=1)
    assert annealed.loss <= annealed.start_loss
    assert int(annealed.evaluations) == 1 + 4 * 3 == 1 + 4 * int(annealed.sweeps)


def test_architectures_of_own_functions_are_searched():
    """What `infer` read is searched by its program: the numbers of the builder's chain of layers."""

    def apply(params, x):
        hidden = jax.nn.gelu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]

    params, target = (stacks.member(networks(NONE, 2), index) for index in (0, 1))
    inferred = sg.infer(apply, params, DATA).arch
    (name,) = (neurons.name for neurons in inferred.hidden)
    key, losses = jax.random.key(0), []
    for arch, layer in ((NONE, "hidden_0"), (inferred, name)):
        start = symmetry.identity(arch)
        found = matching.search_matching(arch, params, target, DATA, key, start=start, max_sweeps=2)
        losses.append((found.start_loss, found.loss, found.element.permutation[layer]))
    np.testing.assert_array_equal(losses[0][2], losses[1][2])
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-4)


def test_bad_input_is_named():
    params, target = (stacks.member(networks(NONE, 2), index) for index in (0, 1))
    search = functools.partial(matching.search_matching, NONE, params, target)
    key, start = jax.random.key(0), symmetry.identity(NONE)
    with pytest.raises(ValueError, match=r"x is None and there is no loss_fn; expected inputs"):
        search(None, key)
    with pytest.raises(ValueError, match=r"x has shape \(16, 2\).*expects one example or more"):
        search(DATA[:, :2], key)
    with pytest.raises(ValueError, match=r"both loss_fn and apply_fn"):
        search(None, key, loss_fn=lambda p: 0.0, apply_fn=lambda p, x: x)
    with pytest.raises(ValueError, match=r"times are \(1.5,\)"):
        search(DATA, key, times=(1.5,))
    with pytest.raises(ValueError, match=r"candidates is 0"):
        search(DATA, key, candidates=0)
    with pytest.raises(ValueError, match=r"temperature is -1"):
        search(DATA, key, temperature=-1.0)
    with pytest.raises(ValueError, match=r"kicks is -1"):
        search(DATA, key, kicks=-1)
    with pytest.raises(ValueError, match=r"element.permutation has layers"):
        search(DATA, key, start=symmetry.identity(RELU))
    broken = jax.tree.map(lambda leaf: leaf * 1e30, params)
    with pytest.raises(ValueError, match=r"an output of params is .*; expected finite numbers at both ends"):
        matching.search_matching(NONE, broken, target, DATA * 1e30, key, start=start)


def test_best_of_keeps_the_lowest_loss_on_data():
    params = stacks.member(networks(NONE, 1), 0)
    target = support.act(NONE, symmetry.random(NONE, jax.random.key(1)), params)
    run = functools.partial(outputs, NONE, x=DATA)

    def loss_fn(merged):
        return jnp.square(run(merged) - run(target)).mean()

    methods = [functools.partial(method, NONE) for method in (matching.unmatched, matching.canonical_matching)]
    methods.append(lambda p, t: matching.unmatched(NONE, p, t)._replace(similarity=jnp.asarray(9.0)))
    choice = jax.jit(lambda p, t: matching.best_of(NONE, p, t, methods, loss_fn))(params, target)
    assert int(choice.best) == 1
    assert choice.losses.shape == (3,)
    assert float(choice.matching.loss) == float(choice.losses[1]) < 1e-9 < float(choice.losses[0])
    assert choice.matching.start_loss is choice.matching.evaluations is None
    with pytest.raises(ValueError, match=r"Got 0 methods"):
        matching.best_of(NONE, params, target, [], loss_fn)
    with pytest.raises(ValueError, match=r"losses are .*; expected a finite one"):
        matching.best_of(NONE, params, target, methods[:1], lambda p: jnp.nan * run(p).mean())


@pytest.mark.slow
@pytest.mark.parametrize("last_round", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_many_networks_become_their_mean(last_round):
    stack = networks(NONE, 3)
    merge_many = functools.partial(merge.merge_many, NONE, stack, DATA, jax.random.key(0))
    many = merge_many(order=(2, 0, 1), last_round=last_round, max_sweeps=2)
    moved = jax.vmap(functools.partial(symmetry.act, NONE))(many.elements, stack)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), merge.average(moved), many.params)
    run = jax.vmap(functools.partial(outputs, NONE, x=DATA))
    np.testing.assert_allclose(run(moved), run(stack), atol=1e-5)
    searched = ~np.isnan(many.losses)
    assert searched.tolist() == [True, True, last_round]
    assert (many.losses <= many.start_losses)[searched].all()
    assert (many.evaluations > many.sweeps)[searched].all()
    if not last_round:  # the first of the order is where the others go
        assert many.elements.permutation["hidden_0"][2].tolist() == [0, 1, 2, 3]
        assert np.isnan(many.losses[2])
        assert many.evaluations[2] == many.sweeps[2] == 0
        assert bool(many.converged[2])


def test_bad_input_of_many_is_named():
    stack = networks(NONE, 3)
    merge_many = functools.partial(merge.merge_many, NONE, stack, DATA, jax.random.key(0))
    with pytest.raises(ValueError, match=r"order is \(0, 0, 1\); expected every number from 0 to 2 once"):
        merge_many(order=(0, 0, 1))
    with pytest.raises(ValueError, match=r"neither times nor start"):
        merge_many(times=(0.5,))
