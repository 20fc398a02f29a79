"""What eight devices compute is what one computes: the same rows, none dropped, each on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support
from jax.experimental.compilation_cache import compilation_cache

import jax_scalegmn as sg
from jax_scalegmn import distributed, matching, network, symmetry, training, zoo
from jax_scalegmn.matching import _frames
from jax_scalegmn.training import _loop
from jax_scalegmn.zoo import _populations, classifier_zoo, classifiers

COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
ARCH = sg.siren((2, 9, 1), w0=10.0)


@pytest.fixture(scope="module")
def mesh():
    return distributed.mesh({"data": 8})


def rows_of_a_device(tree):
    """The most rows that one device holds of any array."""
    return max(len(shard.data) for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


def collectives(program, *args):
    return re.findall(COLLECTIVES, program.lower(*args).compile().as_text())


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17])
def test_rows_are_shared_out_and_none_is_dropped(mesh, count):
    """NumPy arrays, arrays committed to a device, and keys; the padding repeats rows: it can be computed with."""
    values = np.arange(count * 3.0).reshape(count, 3)
    tree = {
        "numpy": values,
        "committed": jax.device_put(jnp.asarray(values), jax.devices()[5]),
        "keys": jax.random.split(jax.random.key(0), count),
    }
    rows = distributed.shard_rows(tree, mesh)
    share = -(-count // 8)
    assert rows.mask.tolist() == [True] * count + [False] * (8 * share - count)
    assert rows_of_a_device(rows) == share
    support.assert_identical(
        support.rows(distributed.gather(rows.tree), np.asarray(rows.mask)),
        distributed.gather(tree | {"numpy": values.astype(np.float32)}),
    )
    padding = support.rows(distributed.gather(rows.tree), ~np.asarray(rows.mask))
    np.testing.assert_array_equal(padding["numpy"], np.resize(values, (8 * share, 3))[count:])


def test_a_mesh_of_trials_and_rows_divides_rows_over_the_data_axis_alone():
    both = distributed.mesh({"trial": 2, "data": -1})
    assert dict(both.shape) == {"trial": 2, "data": 4}
    rows = distributed.shard_rows(np.arange(8), both)
    assert rows_of_a_device(rows) == 2
    assert rows.tree.tolist() == list(range(8))


def test_a_state_is_replicated_whatever_holds_it(mesh):
    tree = {"key": jax.random.key(3), "w": np.arange(3.0), "committed": jax.device_put(jnp.ones(2), jax.devices()[2])}
    whole = distributed.replicate(tree, mesh)
    again = distributed.replicate(whole, distributed.mesh({"data": 4}))
    for leaf, devices in [(leaf, 8) for leaf in jax.tree.leaves(whole)] + [
        (leaf, 4) for leaf in jax.tree.leaves(again)
    ]:
        assert leaf.is_fully_replicated
        assert len(leaf.sharding.device_set) == devices
    support.assert_identical(
        distributed.gather(again), distributed.gather(tree | {"w": np.arange(3, dtype=np.float32)})
    )


def test_rows_are_placed_where_devices_divide_them(mesh):
    assert rows_of_a_device(distributed.place_rows(np.arange(16.0), mesh)) == 2
    assert isinstance(distributed.place_rows(np.arange(17.0), mesh), np.ndarray)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 9}, r"The mesh {'data': 9} has 9 devices, and there are 8; expected 8 at most\. Lower its"),
        ({"trial": 9, "data": -1}, r"has 9 devices or more, and there are 8; expected 8 at most"),
        ({"data": 0}, r"expected 1 device or more"),
        ({"trial": -1, "data": -1}, r"expected 1 device or more"),
        ({"model": 8}, r"axes \['model'\]; expected 'data', 'trial', or both"),
        ({}, r"axes \[\]; expected"),
    ],
)
def test_meshes_that_cannot_be_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        distributed.mesh(axes)


def test_rows_and_meshes_that_do_not_fit_are_refused(mesh):
    with pytest.raises(ValueError, match=r"have \[\(2,\), \(3,\)\] rows; expected the same number of rows"):
        distributed.shard_rows((np.ones(2), np.ones(3)), mesh)
    with pytest.raises(ValueError, match="1 or more"):
        distributed.shard_rows(np.ones(0), mesh)
    with pytest.raises(ValueError, match=r"axes \['trial'\]; expected 'data'"):
        distributed.shard_rows(np.ones(3), distributed.mesh({"trial": 8}))
    with pytest.raises(ValueError, match="rows_at_once is 0; expected a number >= 1"):
        distributed.make_map(lambda row: row, mesh, rows_at_once=0)


def test_a_process_is_told_all_or_nothing():
    with pytest.raises(ValueError, match=r"coordinator and process are not given, but 1 of coordinator, processes"):
        distributed.initialize(processes=2)
    with pytest.raises(ValueError, match=r"process is 2 of 2; expected a number from 0 to 1"):
        distributed.initialize("localhost:1234", 2, 2)


# --- maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "at_once"), [(5, 4), (16, 1), (19, 2), (40, 3)])
def test_a_map_over_devices_is_the_map(mesh, count, at_once):
    rows = (np.arange(count, dtype=np.float32), jax.random.split(jax.random.key(0), count))

    def fn(row, key, factor):
        return {"product": factor * row, "noise": jax.random.normal(key, (2,))}

    done = []
    whole = distributed.make_map(fn, mesh, rows_at_once=at_once)(rows, 3.0, progress=done.append)
    np.testing.assert_array_equal(whole["product"], 3 * rows[0])
    support.assert_identical(whole, distributed.make_map(fn, rows_at_once=at_once)(rows, 3.0))
    assert sum(done) == count


# --- zoos ---------------------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).uniform(size=(3, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("count", [16, 19])
def test_inrs_fitted_on_eight_devices_are_those_of_one_bit_for_bit(mesh, count):
    """And stay on the devices where these divide their number."""
    index = np.arange(count) % 3
    fit = functools.partial(zoo.fit_images, ARCH, IMAGES, np.arange(3), image_index=index, num_steps=5)
    alone, shared = fit(networks_at_once=2), fit(networks_at_once=2, mesh=mesh)
    support.assert_identical(distributed.gather(shared.params), distributed.gather(alone.params))
    for name, values in alone.records.items():
        np.testing.assert_array_equal(shared.records[name], values)
    if count == 16:
        assert rows_of_a_device(shared.params) == 2
    else:
        assert isinstance(jax.tree.leaves(shared.params)[0], np.ndarray)


def test_fitting_communicates_nothing(mesh):
    """The program of a device trains its own networks; the negative control averages over all."""

    def fit_one(image, key):
        params = network.init(ARCH, key)
        loss = lambda params: jnp.square(network.render(ARCH, params, (4, 4)) - image).mean()  # noqa: E731
        tx = optax.adam(1e-3)
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params))
        return optax.apply_updates(params, updates)

    rows = distributed.shard_rows((np.repeat(IMAGES, 3, 0)[:8], jax.random.split(jax.random.key(0), 8)), mesh).tree
    assert collectives(distributed._make_program(fit_one, mesh), rows, ()) == []
    assert collectives(jax.jit(lambda rows: jnp.mean(rows[0])), rows) == ["all-reduce"]


def public_programs():
    """name -> a public function over a mesh, on 16 rows."""
    classifier = sg.mlp((3, 4, 2), "tanh")
    x = support.example(sg.mlp((3, 2)), 16)
    y = (x.sum(1) > 0).astype(int)
    index, rows = np.arange(16) % 3, np.arange(3)
    many = {"networks_at_once": 2}
    return {
        "zoo.fit_images": lambda mesh: zoo.fit_images(
            ARCH, IMAGES, rows, image_index=index, num_steps=2, mesh=mesh, **many
        ),
        "zoo.classifiers.fit": lambda mesh: list(
            classifiers.fit(
                *(classifier, x, y, jax.random.split(jax.random.key(0), 16)),
                **many,
                tx=optax.adam(0.01),
                num_epochs=1,
                batch_size=8,
                mesh=mesh,
            )
        ),
        "zoo.classifier_zoo.fit": lambda mesh: classifier_zoo.fit(
            classifier, (x, y), classifier_zoo.sample(16, seed=0), checkpoints=(0, 2), batch_size=4, mesh=mesh, **many
        ),
        "matching.many": lambda mesh: matching.many(MIXED, *pairs(16), mesh=mesh, max_sweeps=7, pairs_at_once=2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo.fit_images", "zoo.classifiers.fit", "zoo.classifier_zoo.fit", "matching.many"])
def test_what_public_functions_compile_for_a_mesh_has_no_collective(mesh, monkeypatch, tmp_path, name):
    """Read from the programs that XLA made; the negative control is a mean over the rows."""
    fn = public_programs()[name]
    compiled, compile_and_load = [], jax._src.compiler.backend_compile_and_load
    monkeypatch.setattr(
        jax._src.compiler,
        "backend_compile_and_load",
        lambda *args, **options: compiled.append(compile_and_load(*args, **options)) or compiled[-1],
    )

    def over_devices():
        texts = ["\n".join(module.to_string() for module in program.hlo_modules()) for program in compiled]
        return [text for text in texts if "num_partitions=8" in text]

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it remembers that it is on
    try:
        fn(mesh)
        texts = over_devices()
        rows = distributed.shard_rows(np.arange(16.0), mesh).tree
        jax.jit(lambda rows: rows.mean())(rows)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    assert texts
    assert not [re.search(COLLECTIVES, text) for text in texts if re.search(COLLECTIVES, text)]
    assert re.search(COLLECTIVES, over_devices()[-1])


@pytest.mark.slow
def test_classifiers_trained_on_eight_devices_are_those_of_one(mesh):
    """Bit for bit one by one; vmapped, XLA simplifies the quotients of Adam in another order, by a last bit."""
    arch = sg.mlp((3, 8, 2), "tanh")
    x = support.example(sg.mlp((3, 2)), 24)
    y = (x.sum(1) > 0).astype(int)
    fit = functools.partial(classifiers.fit, arch, x, y, tx=optax.adam(0.01), num_epochs=2, batch_size=8)
    for count, at_once in ((19, 1), (16, 2)):
        keys = jax.random.split(jax.random.key(0), count)
        alone = list(fit(keys, networks_at_once=at_once))
        shared = list(fit(keys, networks_at_once=at_once, mesh=mesh))
        if at_once == 1:
            support.assert_identical(distributed.gather(shared), distributed.gather(alone))
        assert support.deviation(distributed.gather(shared), distributed.gather(alone)) < 1e-6
    assert rows_of_a_device(shared[-1]) == 2


@pytest.mark.slow
def test_a_zoo_of_classifiers_on_eight_devices_is_that_of_one_bit_for_bit(mesh):
    arch, hyperparameters = sg.mlp((2, 4, 2)), classifier_zoo.sample(11, seed=0)
    x = support.example(arch, 30)
    examples = x, (x.sum(1) > 0).astype(int)
    fit = functools.partial(classifier_zoo.fit, arch, examples, hyperparameters, checkpoints=(0, 5), batch_size=4)
    alone, shared = fit(networks_at_once=2), fit(networks_at_once=2, mesh=mesh)
    support.assert_identical(distributed.gather(shared.params), distributed.gather(alone.params))
    for name, values in alone.records.items():
        np.testing.assert_array_equal(shared.records[name], values)


# --- training and evaluation --------------------------------------------------------------------------------------

TX = optax.adam(0.1)


def loss_fn(variables, row, key):
    gap = row["x"] @ variables["kernel"] - row["y"]
    return jnp.square(gap).mean(), {"gap": gap.mean()}


def data(count):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(count, size)).astype(np.float32) for name, size in (("x", 3), ("y", 2))}


def start():
    variables = {"kernel": jnp.ones((3, 2))}
    return training.State(variables, TX.init(variables), jax.random.key(5), jnp.asarray(0))


@pytest.mark.parametrize("count", [3, 16, 37])
def test_an_evaluation_over_devices_has_the_means_of_one(mesh, count):
    expected = training.make_evaluation(loss_fn, batch_size=4)(start().variables, data(count))
    evaluate = training.make_evaluation(loss_fn, batch_size=4, mesh=mesh)
    for rows in (data(count), distributed.shard_rows(data(count), mesh)):
        assert support.deviation(evaluate(start().variables, rows), expected) < 1e-5


def fit(mesh=None, count=37, **options):
    step = training.make_step(loss_fn, TX, mesh=mesh)
    return list(training.fit(step, start(), data(count), batch_size=8, num_epochs=3, mesh=mesh, **options))


def test_training_on_replicated_rows_is_that_of_one_device(mesh):
    alone, shared = fit(), fit(mesh)
    assert support.deviation([metrics for _, metrics in shared], [metrics for _, metrics in alone]) < 1e-5
    assert support.deviation(shared[-1][0].variables, alone[-1][0].variables) < 1e-5


@pytest.mark.parametrize("count", [16, 37, 47])
def test_an_epoch_on_sharded_rows_sees_every_network_at_most_once_and_no_padding(mesh, count):
    def step(state, batch):
        seen = jax.shard_map(
            lambda rows: jax.lax.psum(jnp.zeros(count + 1).at[rows].add(1), "data"),
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P(),
        )(batch)
        return state._replace(step=state.step + 1), {"seen": seen}

    orders, steps = [], count // 8
    for _, metrics in training.fit(
        step, start(), np.arange(count), batch_size=8, num_epochs=3, mesh=mesh, rows="sharded"
    ):
        seen = np.asarray(metrics["seen"]) * steps
        np.testing.assert_allclose(seen[:count].sum(), 8 * steps, rtol=1e-5)
        assert seen[:count].max() < 1.01
        orders.append(seen)
    assert count == 16 or not np.allclose(orders[0], orders[1])  # networks that fill no batch differ


def test_training_on_sharded_rows_learns_what_replicated_rows_teach(mesh):
    """Its batches are others: after some epochs both are at the same loss."""
    step = training.make_step(loss_fn, TX, mesh=mesh)
    losses = {}
    for rows in ("replicated", "sharded"):
        (*_, (_, last)) = training.fit(
            step, start(), data(40), batch_size=40, num_epochs=30, mesh=mesh, rows=rows
        )  # one batch an epoch: the order does not matter
        losses[rows] = float(last["loss"])
    assert losses["sharded"] == pytest.approx(losses["replicated"], rel=1e-5)
    with pytest.raises(ValueError, match=r"rows is 'sharded' and mesh is None; expected 'replicated', or 'sharded'"):
        next(training.fit(step, start(), data(8), batch_size=8, num_epochs=1, rows="sharded"))
    with pytest.raises(ValueError, match=r"batch_size is 12 and the mesh has 8 devices on 'data'; .* like 16"):
        next(training.fit(step, start(), data(30), batch_size=12, num_epochs=1, mesh=mesh))


@pytest.mark.parametrize("rows", ["replicated", "sharded"])
def test_an_epoch_communicates_the_gradient_alone(mesh, rows):
    step = training.make_step(loss_fn, TX, mesh=mesh)
    stored = _loop._interleaved(data(37), 37, mesh) if rows == "sharded" else distributed.replicate(data(37), mesh)
    epoch = _loop._compiled_epoch(step, 37, 8, mesh if rows == "sharded" else None)
    assert rows_of_a_device(stored) == (5 if rows == "sharded" else 37)
    assert collectives(epoch, distributed.replicate(start(), mesh), stored) == ["all-reduce"]


def test_an_evaluation_communicates_its_sums_alone(mesh):
    def each(variables, rows):
        return {"loss": jax.vmap(lambda row: loss_fn(variables, row, None)[0])(rows)}

    state = distributed.replicate(start(), mesh)
    assert collectives(
        _loop._sums_over_devices(each, mesh), state.variables, *distributed.shard_rows(data(37), mesh)
    ) == ["all-reduce"]


# --- matching -----------------------------------------------------------------------------------------------------

MIXED = sg.mlp((3, 9, 4, 2), ("tanh", "relu"))


def pairs(count):
    return [support.random_params(MIXED, seed, models=(count,)) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [16, 11])
def test_pairs_matched_on_eight_devices_are_those_of_one_bit_for_bit(mesh, count):
    params, target = pairs(count)
    expected = jax.vmap(functools.partial(matching.weight_matching, MIXED))(params, target)
    alone = matching.many(MIXED, params, target)
    shared = matching.many(MIXED, params, target, mesh=mesh, pairs_at_once=2)
    for found in (alone, shared):
        support.assert_identical(distributed.gather(found.element), distributed.gather(expected.element))
        np.testing.assert_array_equal(found.sweeps, expected.sweeps)
        np.testing.assert_allclose(found.similarity, expected.similarity, rtol=1e-5)
    if count == 16:
        assert rows_of_a_device(shared) == 2


@pytest.mark.slow
def test_many_takes_any_matcher_with_options_and_refuses_other_numbers(mesh):
    params, target = pairs(9)
    identity = matching.many(MIXED, params, target, match=matching.unmatched, mesh=mesh)
    np.testing.assert_array_equal(identity.element.permutation["hidden_0"], np.tile(np.arange(9), (9, 1)))
    still = matching.many(MIXED, params, target, mesh=mesh, permute=False, max_sweeps=2)
    np.testing.assert_array_equal(still.element.permutation["hidden_1"], np.tile(np.arange(4), (9, 1)))
    again = matching.many(MIXED, params, target, mesh=mesh, key=jax.random.key(0), restarts=1)
    assert (again.similarity >= 0.999 * matching.many(MIXED, params, target).similarity).all()
    with pytest.raises(ValueError, match="target holds 3 networks; expected 9"):
        matching.many(MIXED, params, support.rows(target, slice(3)), mesh=mesh)


def test_matching_communicates_nothing(mesh):
    rows = distributed.shard_rows(tuple(pairs(16)), mesh).tree

    def one(params, target, arch):
        return matching.weight_matching(arch, params, target)

    assert collectives(distributed._make_program(one, mesh), rows, (MIXED,)) == []


def assert_one_frame(shared, alone, count):
    support.assert_identical(
        distributed.gather(shared.elements.permutation), distributed.gather(alone.elements.permutation)
    )
    assert support.deviation(shared.elements.scale, alone.elements.scale) < 1e-6
    assert support.deviation(shared.mean, alone.mean) < 1e-5
    np.testing.assert_allclose(shared.similarity, alone.similarity, rtol=1e-5)
    assert (int(shared.rounds), bool(shared.converged)) == (int(alone.rounds), bool(alone.converged))
    if count % 8 == 0:
        assert rows_of_a_device((shared.elements, shared.aligned)) == count // 8


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 11])
@pytest.mark.parametrize("scale", [True, False])
def test_frames_over_eight_devices_are_those_of_one(mesh, count, scale):
    stack, targets = pairs(count)
    align_to = functools.partial(matching.align_to, MIXED, stack, targets, scale=scale)
    assert_one_frame(align_to(mesh=mesh), align_to(), count)
    for reference in matching.Reference:
        align_all = functools.partial(matching.align_all, MIXED, stack, frame=reference, scale=scale)
        assert_one_frame(align_all(mesh=mesh), align_all(), count)
    table = matching.pairwise(MIXED, stack, scale=scale, mesh=mesh)
    support.assert_identical(
        distributed.gather(table.element.permutation),
        distributed.gather(matching.pairwise(MIXED, stack, scale=scale).element.permutation),
    )


def test_consistency_of_a_thousand_networks_takes_less_than_200_megabytes():
    """Of all cycles; a table of their triples would take 24 GB."""
    arch = sg.mlp((2, 4, 4, 1))
    table = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1000, 1000, *leaf.shape), leaf.dtype), symmetry.identity(arch)
    )
    memory = _frames._consistency.lower(arch, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 200e6


# --- cost ---------------------------------------------------------------------------------------------------------


def drawing_error(params, image):
    return jnp.square(network.render(ARCH, params, (4, 4)) - image).mean()


def evaluation(mesh):
    """Of what INRs draw."""

    def each(target, rows):
        return {"loss": jax.vmap(lambda params: drawing_error(params, target))(rows)}

    program = _loop._sums_over_devices(each, mesh)

    def lower(count):
        rows = distributed.shard_rows(support.random_params(ARCH, models=(count,)), mesh)
        return program.lower(np.ones((4, 4), np.float32), *rows)

    return lower


def fitting(mesh):
    fit_one = _populations._fitter(ARCH, drawing_error, optax.adam(1e-3), 2, network.standard)
    program = distributed._make_program(fit_one, mesh)
    images = np.ones((256, 4, 4), np.float32)

    def lower(count):
        keys = jax.random.split(jax.random.key(0), count)
        return program.lower(distributed.shard_rows((images[:count], keys), mesh).tree, ())

    return lower


def matching_of_pairs(mesh):
    program = distributed._make_program(lambda a, b, arch: matching.weight_matching(arch, a, b), mesh)
    return lambda count: program.lower(distributed.shard_rows(tuple(pairs(count)), mesh).tree, (MIXED,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lower", "counts"),
    [(evaluation, (64, 128, 256)), (fitting, (64, 128, 256)), (matching_of_pairs, (16, 32, 64))],
)
def test_the_cost_of_a_device_is_linear_in_its_share_of_the_rows(lower, counts):
    """FLOPs and bytes at N, 2N and 4N over 1, 2, 4 and 8 devices: a N / devices + b, with R^2 above 0.999.

    Of pairs at most 64 on a device, since a CPU matches no more at once: others wait inside of the program's loop.
    """
    shares, costs = [], []
    for devices in (1, 2, 4, 8):
        compiled = lower(distributed.mesh({"data": devices}))
        for count in counts:
            analysis = compiled(count).compile().cost_analysis()
            shares.append(count / devices)
            costs.append([analysis["flops"], analysis["bytes accessed"]])
    design = np.stack([shares, np.ones(len(shares))], 1)
    for cost in np.array(costs).T:
        (slope, _), residual, *_ = np.linalg.lstsq(design, cost, rcond=None)
        assert slope > 0
        assert 1 - residual[0] / np.square(cost - cost.mean()).sum() > 0.999
