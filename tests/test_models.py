"""The models of a ScaleGMN: every parameter learns, degenerate networks are read, options and sizes are described."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, models, network, symmetry
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import (
    IO,
    Canonical,
    Decoder,
    Editor,
    Encoder,
    Readout,
    ScaleGMN,
    _layers,
    autoencoder,
    graph,
    reference,
)
from jax_scalegmn.models.graph import Bucket
from jax_scalegmn.training import losses

SIREN = support.ARCHITECTURES["siren"]
RELU = support.ARCHITECTURES["relu mlp"]

act_on_stack = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


MODEL = autoencoder(SIREN, 6, num_layers=2)
LOSS_FN = losses.inr_reconstruction(MODEL, size=(4, 4))


@functools.cache
def gradients(dtype="float32"):
    """params -> loss of the default autoencoder, its gradient in the variables, its gradient in the params."""
    variables = support.random_variables(MODEL, support.random_params(SIREN, dtype=dtype), dtype=dtype)

    def loss_fn(variables, params):
        return LOSS_FN(variables, params, jax.random.key(0))[0]

    compute = jax.jit(jax.vmap(jax.value_and_grad(loss_fn, argnums=(0, 1)), (None, 0)))
    return lambda params: compute(variables, params)


def degenerate(kind):
    """Params of the SIREN at a special point."""
    params = support.random_params(SIREN)
    first, second, last = (params[f"Dense_{index}"] for index in range(3))
    if kind == "zero weights":
        return jax.tree.map(jnp.zeros_like, params)
    if kind == "equal neurons":
        for layer, axis in ((first, -1), (second, 0), (second, -1), (last, 0)):
            layer["kernel"] = jnp.repeat(
                jnp.take(layer["kernel"], jnp.array([0]), axis), layer["kernel"].shape[axis], axis
            )
    if kind == "dead units":
        first["kernel"] = first["kernel"].at[:, :2].set(0)
        first["bias"] = first["bias"].at[:2].set(0)
        second["kernel"] = second["kernel"].at[2:].set(0)
    if kind == "tiny":
        return jax.tree.map(lambda leaf: 1e-20 * leaf, params)
    if kind == "huge":
        return jax.tree.map(lambda leaf: 1e6 * leaf, params)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero weights", "equal neurons", "dead units", "tiny", "huge"])
def test_degenerate_networks_have_finite_values_and_gradients(kind):
    result = gradients()(jax.tree.map(lambda leaf: leaf[None], degenerate(kind)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.slow
def test_every_parameter_of_the_autoencoder_learns():
    """Each entry of each array has a gradient."""
    _, (grad, _) = gradients()(support.random_params(SIREN, models=(1,)))
    still = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grad)
        if (leaf == 0).any()
    }
    assert not still


@pytest.mark.slow
def test_gradient_of_the_invariant_loss_is_equivariant():
    """The loss is a function of the orbit, so its gradient in the params moves with the network.

    In float64: the gradient in the output's bias is a small difference of large sums, of which float32 keeps 3 digits.
    """
    with support.precision("float64"):
        params = support.random_params(SIREN, models=(1,), dtype="float64")
        element = support.random_elements(SIREN, 1, dtype="float64")
        loss, (_, grad) = gradients("float64")(params)
        loss_moved, (_, grad_moved) = gradients("float64")(act_on_stack(SIREN, element, params))
        assert support.deviation(loss_moved, loss) < 1e-11
        assert support.deviation(grad_moved, act_on_stack(SIREN, element, grad)) < 1e-11


@pytest.mark.parametrize(
    "arch",
    [
        SIREN,
        pytest.param(sg.cnn((1, 3, 4), 2, kernel_size=(3, 2)), marks=pytest.mark.slow),
        pytest.param(sg.cnn((1, 3, 4), 2, activation="tanh", kernel_size=(3, 2)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_autoencoder_maps_an_orbit_to_one_network(arch):
    """decode(encode(params)), alike for every member: rescaled from 1e-6 to 1e6, dead neurons included."""
    model = autoencoder(arch, 4, num_layers=1, decoder_hidden=(3,))
    params = support.random_params(arch)
    first = next(iter(params))
    dead = {**params, first: jax.tree.map(lambda leaf: leaf.at[..., 0].set(0), params[first])}
    variables = support.random_variables(model, params)
    elements = support.random_elements(arch, 3)
    if any(neurons.scaling is Scaling.POSITIVE for neurons in arch.neuron_layers):
        rng = np.random.default_rng(0)
        wide = {name: 10 ** rng.uniform(-6, 6, scale.shape) for name, scale in elements.scale.items()}
        elements = elements._replace(scale=jax.tree.map(lambda scale: jnp.asarray(scale, jnp.float32), wide))
    decode = jax.jit(lambda z: model.apply(variables, z, method="decode"))
    whole = jax.jit(jax.vmap(lambda p: (model.apply(variables, p, method="encode"), model.apply(variables, p))))
    for given in (params, dead):
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), given)
        z, decoded = whole(
            jax.tree.map(lambda own, moved: moved.at[0].set(own), given, act_on_stack(arch, elements, stack))
        )
        for index in range(3):
            assert support.deviation(support.rows(decoded, index), decode(z[0])) < 1e-5
        assert support.deviation(decode(z[0] + 1), decode(z[0])) > 1e-3


def test_a_network_of_width_one_is_read():
    """Its embedding is that of the plain form, stays when signs flip, and differs from another network's."""
    arch = sg.siren((2, 1, 1, 1))
    model = Encoder(ScaleGMN(arch, 3, num_layers=1))
    params = support.random_params(arch)
    variables = support.random_variables(model, params)
    read = jax.jit(lambda p: model.apply(variables, p))
    z = read(params)
    plain = jax.jit(lambda p: reference.encode(model, variables, graph.from_params(arch, p)))(params)
    assert support.deviation(z, plain) < 1e-5
    flipped = symmetry.Element({n.name: np.arange(1) for n in arch.hidden}, {n.name: -np.ones(1) for n in arch.hidden})
    assert support.deviation(read(symmetry.act(arch, flipped, params)), z) < 1e-5
    assert support.deviation(read(support.random_params(arch, seed=1)), z) > 1e-3


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_dropout_follows_its_key_in_training_alone(rate):
    model = Encoder(ScaleGMN(SIREN, 4, num_layers=1, dropout=rate))
    params = support.random_params(SIREN)
    variables = support.random_variables(model, params)
    apply = jax.jit(lambda key: model.apply(variables, params, train=True, rngs={"dropout": key}))
    first, again, second = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    steady = jax.jit(lambda: model.apply(variables, params))()
    for z in (first, second):
        assert np.allclose(z, steady, rtol=1e-5) == (rate == 0)
    assert np.array_equal(first, second) == (rate == 0)


@pytest.mark.slow
def test_scales_are_divided_out_and_multiplied_on():
    """The encoder reads params / scales and the decoder writes scales * params."""
    scales = (0.5, 2.0, 3.0, 0.1, 1.0, 7.0)
    params, z = support.random_params(SIREN), jnp.ones(4)
    divided = architecture.pack(SIREN, [v / s for v, s in zip(architecture.unpack(SIREN, params), scales, strict=True)])
    plain, scaled = (Encoder(ScaleGMN(SIREN, 4, num_layers=1), scales=s) for s in (None, scales))
    variables = support.random_variables(plain, params)
    assert support.deviation(jax.jit(scaled.apply)(variables, params), jax.jit(plain.apply)(variables, divided)) < 1e-6
    plain, scaled = (Decoder(SIREN, (5,), scales=s) for s in (None, scales))
    variables = support.random_variables(plain, z)
    written = architecture.unpack(SIREN, plain.apply(variables, z))
    expected = architecture.pack(SIREN, [v * s for v, s in zip(written, scales, strict=True)])
    assert support.deviation(scaled.apply(variables, z), expected) < 1e-6


@pytest.mark.slow
def test_an_editor_adds_a_learned_multiple_of_its_delta():
    """One factor a parameter, at first `out_scale`; scales are divided out before and multiplied on after."""
    scales = (0.5, 2.0, 3.0, 0.1, 1.0, 7.0)
    params, gmn = support.random_params(RELU), ScaleGMN(RELU, 4, num_layers=1)
    plain, scaled = Editor(gmn, out_scale=0.3), Editor(gmn, scales=scales)
    variables = support.random_variables(plain, params)
    variables["params"]["out_scales"] = jnp.arange(1.0, 7.0)
    delta = jax.jit(lambda v, p: plain.apply(v, p, method="delta"))
    once = architecture.unpack(RELU, delta(variables, params))
    edited = jax.jit(plain.apply)(variables, params)
    assert support.deviation(edited, jax.tree.map(jnp.add, params, architecture.pack(RELU, once))) < 1e-6
    doubled = {"params": variables["params"] | {"out_scales": 2 * variables["params"]["out_scales"]}}
    assert support.deviation(delta(doubled, params), architecture.pack(RELU, [2 * v for v in once])) < 1e-6
    divided = architecture.pack(RELU, [v / s for v, s in zip(architecture.unpack(RELU, params), scales, strict=True)])
    expected = [v * s for v, s in zip(architecture.unpack(RELU, delta(variables, divided)), scales, strict=True)]
    got = jax.jit(lambda v, p: scaled.apply(v, p, method="delta"))(variables, params)
    assert support.deviation(got, architecture.pack(RELU, expected)) < 1e-6
    first = jax.jit(lambda key: plain.init(key, params)["params"]["out_scales"])(jax.random.key(0))
    np.testing.assert_array_equal(first, np.full(6, 0.3, np.float32))


@pytest.mark.slow
def test_bfloat16_changes_the_precision_and_not_the_function():
    """Features and products in bfloat16, canonical maps in float32: an embedding near that of float32."""
    params, model, half = (
        support.random_params(RELU),
        *(Encoder(ScaleGMN(RELU, 4, num_layers=1, dtype=dtype)) for dtype in (None, "bfloat16")),
    )
    variables = support.random_variables(model, params)
    z, z_half = (jax.jit(one.apply)(variables, params) for one in (model, half))
    assert (z.dtype, z_half.dtype) == (jnp.float32, jnp.bfloat16)
    assert 1e-5 < np.abs(z - z_half.astype("float32")).max() / np.abs(z).max() < 0.2
    plain = jax.jit(lambda: reference.encode(half, variables, graph.from_params(RELU, params)))()
    assert plain.dtype == jnp.bfloat16
    assert np.abs(z - plain.astype("float32")).max() / np.abs(z).max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", Canonical)
@pytest.mark.parametrize("scaling", [Scaling.SIGN, Scaling.POSITIVE])
def test_canonical_maps_of_bfloat16_are_those_of_float32_rounded_once(scaling, kind):
    x, kernel = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (7, 4)), (1, (4, 3))))
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    canonical, groups = _layers.CanonicalMap(4, 5, kind), _layers.Groups((scaling,))
    project = functools.partial(canonical.apply, groups=groups, method="project")
    variables = canonical.init(jax.random.key(2), x, kernel, groups, method="project")
    wide = project(variables, x.astype(jnp.float32), kernel.astype(jnp.float32))
    half = project(variables, x, kernel)
    assert (wide.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))


def test_an_encoder_reads_params_or_their_graph():
    model = Encoder(ScaleGMN(RELU, 4, num_layers=1))
    params = support.random_params(RELU)
    variables = support.random_variables(model, params)
    built = graph.from_params(RELU, params)
    read, called = jax.jit(lambda: (model.apply(variables, built, method="read"), model.apply(variables, params)))()
    np.testing.assert_allclose(read, called, rtol=1e-6)
    scaled = Encoder(model.gmn, scales=(1.0,) * 6)
    with pytest.raises(ValueError, match="with scales reads params, not graphs"):
        scaled.apply(variables, built, method="read")
    with pytest.raises(ValueError, match="divide the scales out before the graph is built"):
        reference.encode(scaled, variables, built)
    with pytest.raises(ValueError, match=r"The graph has nodes \(13, 1\), .* expects nodes \(14, 1\)"):
        model.apply(variables, built._replace(nodes=built.nodes[1:]), method="read")


def parameters_of(model, *inputs, **options):
    shapes = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *inputs)["params"]
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}


def test_maps_that_are_never_called_have_no_parameters():
    """Of inputs that get no message, of groups that no layer has, of layers after which nothing reads the edges."""
    params = support.random_params(RELU)

    def names(model):
        return " ".join(parameters_of(model, params))

    relu = names(Encoder(ScaleGMN(RELU, 4, num_layers=2, io=IO.SEPARATE)))
    assert "rho" not in relu
    assert "['layer_0']['update']['maps_0']['end_input']" in relu
    assert "['layer_0']['message']['maps_0']['end_input']" not in relu
    assert "['layer_0']['edge_update']" in relu
    assert "['layer_1']['edge_update']" not in relu
    assert "backward" not in relu
    tanh = parameters_of(Encoder(ScaleGMN(SIREN, 4, num_layers=2, bidirectional=True)), support.random_params(SIREN))
    assert any("rho" in name for name in tanh)
    assert not any("backward_edge_update" in name for name in tanh)
    both = names(Encoder(ScaleGMN(RELU, 4, num_layers=2, bidirectional=True)))
    assert "['layer_0']['backward_edge_update']" in both
    assert "['layer_1']['backward_edge_update']" not in both
    ends = names(Encoder(ScaleGMN(RELU, 4, num_layers=1), readout=Readout.LAST_LAYER))
    assert "gate" not in ends


GELU = sg.mlp((3, 5, 4, 2), "gelu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Encoder(ScaleGMN(sg.siren((2, 1)), 4)), "has no hidden neuron layers"),
        (Encoder(ScaleGMN(SIREN, 4), scales=(1.0,) * 5), "expected 6 finite numbers > 0, .* Use zoo.scales"),
        (Encoder(ScaleGMN(SIREN, 4), scales=(1.0,) * 5 + (0.0,)), "expected 6 finite numbers > 0"),
        (Encoder(ScaleGMN(SIREN, 4), scales=(1.0,) * 5 + (np.nan,)), "expected 6 finite numbers > 0"),
        (autoencoder(SIREN, 4, scales=(-1.0,) * 6), "expected 6 finite numbers > 0"),
        (Editor(ScaleGMN(SIREN, 4), scales=(1.0,) * 7), "expected 6 finite numbers > 0"),
        (Encoder(ScaleGMN(SIREN, 4), readout=Readout.DEEP_SET), "permutations only; 'siren .*' has scale symmetries"),
        (Encoder(ScaleGMN(SIREN, 4, node_encoding=False, encoding_features=True)), "node_encoding is False"),
        (Encoder(ScaleGMN(SIREN, 4, num_layers=0)), "are 0, 1 and 1; expected numbers >= 1"),
        (Encoder(ScaleGMN(SIREN, 4, message_layers=0)), "are 4, 0 and 1; expected numbers >= 1"),
        (Encoder(ScaleGMN(SIREN, 4, update_layers=0)), "are 4, 1 and 0; expected numbers >= 1"),
        (Encoder(ScaleGMN(SIREN, 4, edges_at_once=0)), "edges_at_once is 0; expected a number >= 1, or None"),
        (Encoder(ScaleGMN(SIREN, 4, parity=True)), "parity=True is about positive scales"),
        (Encoder(ScaleGMN(GELU, 4, io=IO.SHARED)), r"permutations only, .*\['io'\] would be ignored"),
        (
            Encoder(ScaleGMN(GELU, 4, canonical=Canonical.ABSOLUTE, message_layers=2)),
            r"\['canonical', 'message_layers'\] would be ignored",
        ),
    ],
)
def test_options_and_scales_that_do_not_fit_are_refused(model, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, key, support.random_params(model.arch))


@pytest.mark.parametrize(
    "model",
    [
        ScaleGMN(SIREN, 4, num_layers=2, hidden=7, dropout=0.1, dtype="bfloat16"),
        ScaleGMN(support.ARCHITECTURES["mixed mlp"], 4, canonical=Canonical.ABSOLUTE, io=IO.SEPARATE, parity=True),
        Encoder(ScaleGMN(SIREN, 4), latent=5, scales=(0.5, 2.0, 3.0, 0.1, 1.0, 7.0)),
        Encoder(ScaleGMN(Bucket((SIREN, RELU), multiple=8), 4, bidirectional=True), readout=Readout.LAST_LAYER),
        Editor(ScaleGMN(support.HAND_WRITTEN["residual relu"][0], 4), out_scale=0.1),
        Editor(ScaleGMN(SIREN, 4), networks=3),
        Decoder(SIREN, (3, 4)),
        autoencoder(SIREN, 4, normalized=False, decoder_hidden=(5,)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_json_round_trip(model):
    assert models.from_json(json.loads(json.dumps(models.as_json(model)))) == model


def test_models_of_older_checkpoints_are_described_alike():
    """The description of a model tells whether a checkpoint fits it."""
    described = models.as_json(Encoder(ScaleGMN(SIREN, 4)))
    assert "edges_at_once" not in described["gmn"]
    assert models.from_json(described | {"gmn": described["gmn"] | {"edges_at_once": 7}}).gmn.edges_at_once == 7
    assert models.as_json(Encoder(ScaleGMN(SIREN, 4, edges_at_once=7)))["gmn"]["edges_at_once"] == 7


@pytest.mark.parametrize(
    "change", [{"type": "Transformer"}, {"size": 3}, {"gmn": {}}, {"gmn": {"type": "ScaleGMN", "arch": {}}}]
)
def test_foreign_json_is_refused(change):
    with pytest.raises(ValueError, match="no description of"):
        models.from_json(models.as_json(Encoder(ScaleGMN(SIREN, 4))) | change)


def within(levels):
    value = {}
    for _ in range(levels):
        value = {"type": "Encoder", "gmn": value}
    return value


def with_gmn(**change):
    described = models.as_json(Encoder(ScaleGMN(SIREN, 4)))
    return described | {"gmn": described["gmn"] | change}


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ([], r"type is None|is \[\]"),
        ({}, "type is None; expected one of Autoencoder"),
        ({"type": []}, r"type is \[\]"),
        (within(20), r"gmn\.type is 'Encoder'; expected ScaleGMN"),
        (within(2000), "nesting of the description"),
        ({"type": "Encoder", "gmn": 5}, "gmn is 5; expected a dict"),
        (with_gmn(features=4.5), r"gmn\.features is 4\.5; expected a whole number"),
        (with_gmn(features=0), r"gmn\.features is 0; expected whole numbers from 1"),
        (with_gmn(features=2**40), r"gmn\.features is 1099511627776; expected whole numbers from 1"),
        (with_gmn(num_layers=10_000), r"gmn\.num_layers is 10000; .*limits\(layers=10000\)"),
        (with_gmn(bidirectional=1), r"gmn\.bidirectional is 1; expected true or false"),
        (with_gmn(canonical="evil"), r"gmn\.canonical is 'evil'; expected one of"),
        (with_gmn(dropout=float("nan")), r"gmn\.dropout is nan"),
        (with_gmn(dropout=2.0), r"gmn\.dropout is 2\.0"),
        (with_gmn(dtype="object"), r"gmn\.dtype is 'object'"),
        (with_gmn(arch=5), r"gmn\.arch: This does not describe an architecture"),
        (with_gmn(arch=sg.mlp((2**16, 2**16)).as_json()), r"graph of gmn\.arch, in bytes, is \d+; .*tensor_bytes="),
        (with_gmn(arch={"members": 5}), r"gmn\.arch\.members is 5"),
        ({"type": "Decoder", "arch": SIREN.as_json(), "hidden": ["x"]}, r"hidden\[0\] is 'x'"),
    ],
)
def test_a_wrong_field_of_json_is_named(description, words):
    with pytest.raises(ValueError, match=rf"no description of a model \(.*{words}") as caught:
        models.from_json(description)
    assert len(str(caught.value)) < 2000


def test_a_decoder_alone_does_not_know_its_input():
    with pytest.raises(ValueError, match="describe the Autoencoder"):
        models.abstract_variables(Decoder(SIREN, (3,)))


PUBLISHED = autoencoder(sg.siren((2, 32, 32, 1)), 128)


@functools.cache
def published_shapes():
    params = jax.eval_shape(lambda k: network.init(PUBLISHED.arch, k), jax.random.key(0))
    return params, jax.eval_shape(PUBLISHED.init, jax.random.key(0), params)


def test_published_size_has_the_published_number_of_parameters():
    """Encoder 1,936,256 less the 33,280 that the published readout builds and never uses; decoder 772,513."""
    _, variables = published_shapes()
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in variables["params"].items()}
    assert count == {"encoder": 1_936_256 - 33_280, "decoder": 772_513}


def products(fn, *shapes) -> float:
    """The floating-point operations of all matrix products in the program of a function, before any compiler."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "times":
                total += 2 * equation.invars[0].aval.shape[-1] * equation.outvars[0].aval.size
            if equation.primitive.name == "over_rows":
                total += 2 * equation.invars[0].aval.size * equation.invars[1].aval.shape[-1]
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        total += equation.params.get("length", 1) * count(inner)
        return total

    return count(jax.make_jaxpr(fn)(*shapes).jaxpr)


def test_matrix_products_are_counted():
    def fn(a, b):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, length=3)[0]

    assert products(fn, jnp.ones((2, 5)), jnp.ones((5, 5))) == 3 * 2 * 2 * 5 * 5


def encoder_products():
    params, variables = published_shapes()
    return products(lambda v, p: PUBLISHED.apply(v, p, method="encode"), variables, params)


def test_published_size_reads_a_network_in_1_gflop_of_matrix_products():
    assert encoder_products() == pytest.approx(0.984e9, rel=0.01)


@pytest.mark.slow
def test_published_size_takes_less_than_half_of_the_plain_forms_products():
    """Which applies every map to every edge: 2.56 GFLOP a network."""
    params, variables = published_shapes()
    encoder = PUBLISHED.encoder

    def plain(variables, params):
        inner = {"params": variables["params"]["encoder"]}
        return reference.encode(encoder, inner, graph.from_params(PUBLISHED.arch, params))

    assert 2.3 * encoder_products() < products(plain, variables, params)


@pytest.mark.slow
def test_a_training_step_of_published_size_takes_three_times_the_products_of_its_loss(key):
    """One product forward and two backward for each: nothing is computed twice for the gradient."""
    params, variables = published_shapes()
    loss_fn = losses.inr_reconstruction(PUBLISHED, size=(28, 28))
    step = products(jax.grad(loss_fn, has_aux=True), variables, params, key)
    assert step == pytest.approx(3 * products(loss_fn, variables, params, key), rel=0.01)
