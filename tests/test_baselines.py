"""The encoders by queries and by statistics, each with the symmetry that it has; and models of equal size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from jax_scalegmn import models, network, testing
from jax_scalegmn.architecture import Scaling, restrict
from jax_scalegmn.models import baselines
from jax_scalegmn.models.baselines import QueryEncoder, StatisticsEncoder

SIREN = support.ARCHITECTURES["siren"]


def encoder_of(arch, **options):
    shape = support.example(arch, 1).shape[1:]
    return QueryEncoder(arch, 6, shape, 8, 5, **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_embedding_is_invariant_under_the_full_group_of_every_architecture(arch, dtype):
    """And networks of different function have different embeddings."""
    with support.precision(dtype):
        params = support.random_params(arch, dtype=dtype)
        model = encoder_of(arch)
        variables = support.random_variables(model, params, dtype=dtype)
        read = jax.jit(lambda params: model.apply(variables, params))
        testing.assert_invariant(arch, read, params, tolerance=support.TOLERANCE[dtype], samples=4)
        other = read(support.random_params(arch, 1, dtype))
        assert other.shape == (5,)
        assert other.dtype == dtype
        assert np.abs(other - read(params)).max() > 1e-3 * np.abs(other).max()


def test_a_reader_of_weights_fails_the_same_check():
    params = support.random_params(SIREN)
    with pytest.raises(AssertionError, match="Not invariant"):
        testing.assert_invariant(SIREN, lambda params: params["Dense_1"]["kernel"].reshape(-1)[:5], params)


def test_embedding_is_that_of_the_outputs_at_the_queries():
    """Queries that a network answers alike, a period of its sines apart, lead to one embedding; others do not."""
    params = support.random_params(SIREN)
    params["Dense_0"]["kernel"] = jnp.asarray([[1.0, -1, 2, 0, 1], [0, 1, -1, 2, 1]])
    model = encoder_of(SIREN)
    variables = model.init(jax.random.key(0), params)
    queries = variables["params"]["queries"]
    assert queries.shape == (6, 2)
    assert 0.5 < np.abs(queries).max() <= 1

    def embedding(periods):
        shifted = queries + periods * 2 * np.pi / 30
        return model.apply({"params": variables["params"] | {"queries": shifted}}, params)

    np.testing.assert_allclose(embedding(1), embedding(0), rtol=1e-3, atol=1e-4)
    assert np.abs(embedding(0.3) - embedding(0)).max() > 1e-2


@pytest.mark.slow
def test_many_networks_by_vmap_and_every_parameter_learns():
    stack = support.random_params(SIREN, models=(4,))
    model = encoder_of(SIREN, num_layers=2)
    variables = support.random_variables(model, support.rows(stack, 0))

    def loss(variables, params):
        return jnp.square(model.apply(variables, params)).sum()

    together = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))
    values, gradients = together(variables, stack)
    for index in range(4):
        value, gradient = jax.value_and_grad(loss)(variables, support.rows(stack, index))
        np.testing.assert_allclose(values[index], value, rtol=1e-4)
        assert support.deviation(support.rows(gradients, index), gradient) < 1e-3
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_dropout_acts_in_training_alone():
    params = support.random_params(SIREN)
    model = encoder_of(SIREN, dropout=0.5)
    variables = model.init(jax.random.key(0), params)
    calm = model.apply(variables, params)
    np.testing.assert_array_equal(calm, encoder_of(SIREN).apply(variables, params))
    first, second = (model.apply(variables, params, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(first - second).max() > 0
    assert np.abs(first - calm).max() > 0


def test_a_description_without_a_function_is_refused():
    arch, _ = support.batch_norm_mlp()
    with pytest.raises(ValueError, match=r"'normalized mlp' does not say how to compute .*models\.Encoder"):
        QueryEncoder(arch, 4, (3,), 8, 5).init(jax.random.key(0), support.random_params(arch))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("siren", (3,)),
        ("siren", ()),
        ("siren", (4, 2)),
        ("relu cnn", (2,)),
        ("relu cnn", (7, 9, 2)),
        ("relu cnn", (2, 2, 1)),
        ("tanh cnn", (9, 9, 2)),
        ("siren", (0,)),
    ],
)
def test_an_input_shape_that_does_not_fit_is_refused(name, shape):
    arch = support.ARCHITECTURES[name]
    with pytest.raises(ValueError, match="input_shape is"):
        QueryEncoder(arch, 4, shape, 8, 5).init(jax.random.key(0), support.random_params(arch))


@pytest.mark.parametrize("field", ["num_queries", "hidden", "latent", "num_layers"])
def test_sizes_below_one_are_refused(field):
    model = encoder_of(SIREN).clone(**{field: 0})
    with pytest.raises(ValueError, match=f"'{field}': 0"):
        model.init(jax.random.key(0), support.random_params(SIREN))


def test_params_of_another_architecture_are_refused():
    model = encoder_of(SIREN)
    with pytest.raises(ValueError, match="expects"):
        model.init(jax.random.key(0), support.random_params(support.ARCHITECTURES["tanh mlp"]))


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy(arch, params):
    got = baselines.statistics(arch, params)
    expected = []
    for path in arch.array_shapes:
        value = params
        for key in path:
            value = value[key]
        value = np.asarray(value)
        expected += [value.mean(), value.var(), *np.percentile(value, [0, 25, 50, 75, 100])]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_embedding_by_statistics_is_invariant_under_permutations_and_not_under_scales(arch, params):
    """Neither under signs: statistics do not know which neuron an entry belongs to, but its size and sign they do."""
    model = StatisticsEncoder(arch, 8, 5, num_layers=2)
    variables = support.random_variables(model, params)
    read = jax.jit(lambda params: model.apply(variables, params))
    testing.assert_invariant(restrict(arch, Scaling.PERMUTATION), read, params, tolerance=1e-5, samples=4)
    with pytest.raises(AssertionError, match="Not invariant"):
        testing.assert_invariant(arch, read, params, tolerance=1e-2, samples=4)


def test_statistics_are_standardized_over_the_networks_given():
    stack = support.random_params(SIREN, models=(16,))
    stack["Dense_2"]["bias"] = jnp.zeros_like(stack["Dense_2"]["bias"])  # all of its statistics are constant
    raw = jax.vmap(lambda params: baselines.statistics(SIREN, params))(stack)
    standard = baselines.standardization(SIREN, stack)
    np.testing.assert_allclose([mean for mean, _ in standard], raw.mean(0), rtol=1e-5, atol=1e-7)
    deviation = np.asarray(raw.std(0))
    np.testing.assert_allclose([std for _, std in standard], np.where(deviation == 0, 1, deviation), rtol=1e-4)
    params = support.rows(stack, 0)
    plain, model = StatisticsEncoder(SIREN, 8, 5), StatisticsEncoder(SIREN, 8, 5, standard=standard)
    assert hash(model) != hash(plain)
    variables = support.random_variables(model, params)
    mean, std = np.asarray(standard, np.float32).T
    # What is standardized can be undone by the first layer's kernel and bias.
    first = variables["params"]["mlp_0"]
    kernel = first["kernel_in"] / std[:, None]
    undone = first | {"kernel_in": kernel, "bias_in": first["bias_in"] - mean @ kernel}
    other = {"params": {"mlp_0": undone}}
    np.testing.assert_allclose(model.apply(variables, params), plain.apply(other, params), rtol=1e-3, atol=1e-4)


def test_gradients_of_the_embedding_by_statistics_are_finite_with_constant_weights():
    params = support.random_params(SIREN)
    params["Dense_1"]["bias"] = jnp.zeros_like(params["Dense_1"]["bias"])
    model = StatisticsEncoder(SIREN, 8, 5)
    variables = support.random_variables(model, params)
    gradients = jax.jit(jax.grad(lambda *given: jnp.square(model.apply(*given)).sum(), argnums=(0, 1)))(
        variables, params
    )
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_dropout_of_the_embedding_by_statistics_acts_in_training_alone():
    params = support.random_params(SIREN)
    model = StatisticsEncoder(SIREN, 8, 5, dropout=0.5)
    variables = support.random_variables(model, params)
    calm, trained = (
        model.apply(variables, params, train=t, rngs={"dropout": jax.random.key(0)}) for t in (False, True)
    )
    np.testing.assert_array_equal(calm, StatisticsEncoder(SIREN, 8, 5).apply(variables, params))
    assert np.abs(trained - calm).max() > 0


def test_statistics_need_no_function():
    arch, _ = support.batch_norm_mlp()
    params = support.random_params(arch)
    assert baselines.statistics(arch, params).shape == (7 * len(arch.array_shapes),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "'hidden': 0"),
        ({"latent": 0}, "'latent': 0"),
        ({"num_layers": 0}, "'num_layers': 0"),
        ({"standard": ((0.0, 1.0),)}, r"expected 42 pairs .*baselines\.standardization"),
        ({"standard": ((0.0, 0.0),) * 42}, "standard is"),
        ({"standard": ((float("nan"), 1.0),) * 42}, "standard is"),
    ],
)
def test_bad_attributes_of_an_encoder_by_statistics_are_refused(options, message):
    model = StatisticsEncoder(SIREN, 8, 5).clone(**options)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), support.random_params(SIREN))
    with pytest.raises(ValueError, match="expects"):
        StatisticsEncoder(SIREN, 8, 5).init(jax.random.key(0), support.random_params(support.ARCHITECTURES["tanh mlp"]))


# --- size ---------------------------------------------------------------------------------------------------------


def test_number_of_parameters_is_that_of_the_variables():
    params = support.random_params(SIREN)
    model = encoder_of(SIREN, num_layers=2)
    variables = model.init(jax.random.key(0), params)
    assert models.num_parameters(model, params) == sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("target", [1, 100, 137, 1000, 54_321])
def test_match_size_finds_what_a_search_through_all_widths_finds(target):
    shapes = jax.eval_shape(lambda: network.init(SIREN, jax.random.key(0)))

    def make(width):
        return QueryEncoder(SIREN, 6, (2,), width, 5)

    def gap(width):  # queries, kernels and biases, layer normalization
        return abs(12 + (6 + 4 + 5 - 1) * width + 5 - target)

    assert models.num_parameters(make(3), shapes) == 12 + 14 * 3 + 5
    assert models.match_size(make, shapes, target) == min(range(1, 5000), key=gap)


@pytest.mark.slow
def test_match_size_brings_a_graph_network_to_the_size_of_another():
    shapes = jax.eval_shape(lambda: network.init(SIREN, jax.random.key(0)))
    plain = restrict(SIREN, Scaling.PERMUTATION)

    def make(arch, width, hidden=None):
        return models.Encoder(models.ScaleGMN(arch, width, 2, hidden=hidden), 5)

    target = models.num_parameters(make(SIREN, 12), shapes)
    width = models.match_size(lambda width: make(plain, width), shapes, target)
    hidden = models.match_size(lambda hidden: make(plain, width, hidden), shapes, target)
    assert width > 12
    assert models.num_parameters(make(plain, width, hidden), shapes) == pytest.approx(target, rel=0.03)


def test_match_size_refuses_what_it_cannot_reach():
    params = support.random_params(SIREN)
    with pytest.raises(ValueError, match="Let make"):
        models.match_size(lambda width: encoder_of(SIREN), params, 100_000)
    with pytest.raises(ValueError, match="target is 0"):
        models.match_size(lambda width: encoder_of(SIREN), params, 0)
