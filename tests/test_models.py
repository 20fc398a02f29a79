"""The metanetworks: equivariant, invariant, equal to their plain form, alive in every parameter."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
import twin

from jax_scalegmn import architecture, graph, layers, losses, models, network, symmetry
from jax_scalegmn.models import Autoencoder, Decoder, Encoder, ScaleGMN

SIREN = support.ARCHITECTURES["siren"]
NUM_LAYERS = 3


def compiled_reader(name, dtype, normalized):
    """(read, params, variables): read maps a stack of networks to embeddings and to all features on the way."""
    arch = support.SIGN[name]
    model = Encoder(arch, 6, latent=5, num_layers=NUM_LAYERS, normalized=normalized)
    params = support.random_params(arch, dtype=dtype)
    variables = support.random_variables(model, params, dtype=dtype)

    def is_kept(module, method):
        return isinstance(module, layers.MessagePassing | ScaleGMN) and method == "__call__"

    def read(params):
        z, kept = model.apply(variables, params, capture_intermediates=is_kept, mutable=["intermediates"])
        kept = kept["intermediates"]["gmn"]
        whole = kept["__call__"][0]
        return z, [kept[f"layer_{index}"]["__call__"][0] for index in range(NUM_LAYERS)], (whole.nodes, whole.edges)

    return jax.jit(jax.vmap(read)), params, variables


reader = functools.cache(compiled_reader)


def moved_features(topo, element, features):
    """What node features by neuron layer, and edge features by block, become under an element."""
    nodes, edges = features
    order, scale = (dict(mapping) for mapping in element)
    for name, h in nodes.items():
        order.setdefault(name, np.arange(len(h)))
        scale.setdefault(name, np.ones(len(h)))
    new_nodes = {name: h[order[name]] * scale[name][:, None] for name, h in nodes.items()}
    new_edges = [
        e[order[b.sender]][:, order[b.receiver]] * scale[b.sender][:, None, None] * scale[b.receiver][:, None]
        for b, e in zip(topo.blocks, edges, strict=True)
    ]
    return new_nodes, new_edges


def assert_symmetric(arch, read, params, group, dtype):
    """Embeddings are invariant, and features behind every layer equivariant, for five elements of the group."""
    elements = support.random_elements(arch, 5, **group, dtype=dtype)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), params)
    expected = jax.device_get(read(stack))
    got = jax.device_get(read(act_on_stack(arch, elements, stack)))
    topo = graph.topology(arch)
    for index in range(5):
        (z, by_layer, whole), (z_moved, by_layer_moved, whole_moved) = support.rows((expected, got), index)
        element = support.rows(elements, index)
        assert support.deviation(z_moved, z) < support.TOLERANCE[dtype]
        by_layer, by_layer_moved = [*by_layer, in_blocks(topo, whole)], [*by_layer_moved, in_blocks(topo, whole_moved)]
        for features, features_moved in zip(by_layer, by_layer_moved, strict=True):
            features = moved_features(topo, element, features)
            assert support.deviation(features_moved, features) < support.TOLERANCE[dtype]


act_on_stack = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


def in_blocks(topo, features):
    """The flat node and edge features of a graph, layer by layer and block by block."""
    nodes, edges = features
    by_block = [edges[block.edges].reshape(*block.shape, -1) for block in topo.blocks]
    return {name: nodes[where] for name, where in topo.nodes.items()}, by_block


@pytest.mark.parametrize("group", support.GROUPS.values(), ids=support.GROUPS)
@pytest.mark.parametrize("dtype", support.TOLERANCE)
@pytest.mark.parametrize("name", support.SIGN)
def test_encoder_is_invariant_and_every_layer_equivariant(name, dtype, group):
    """To 1e-5 in float32 and 1e-12 in float64; networks of different function have different embeddings."""
    with support.precision(dtype):
        read, params, _ = reader(name, dtype, True)
        assert_symmetric(support.SIGN[name], read, params, group, dtype)
        others = read(support.random_params(support.SIGN[name], 1, dtype, models=(5,)))[0]
        assert np.abs(others[1:] - others[0]).max() > 1e-2 * np.abs(others).max()


def constant_in_message(monkeypatch):
    """Messages with a constant, which no sign flips."""
    right = layers.SignEquivariant.__call__
    monkeypatch.setattr(layers.SignEquivariant, "__call__", lambda self, x, *, io: right(self, x, io=io) + 0.1)


def uneven_map(monkeypatch):
    """rho(x) in the place of rho(x) + rho(-x)."""
    monkeypatch.setattr(layers.MLP, "activate_even", lambda self, u: 2 * self.activate(u))


def type_per_hidden_neuron(monkeypatch):
    right = graph.topology
    monkeypatch.setattr(graph, "topology", lambda a: right(a)._replace(node_types=np.arange(right(a).num_nodes)))


def last_types_in_wrong_order(monkeypatch):
    """Types of the last edges by the sender, not by the receiver."""
    right = graph.topology

    def wrong(arch):
        *first, last = right(arch).blocks
        types = last.types.min() + np.arange(np.prod(last.shape)).reshape(last.shape) // last.shape[0]
        return right(arch)._replace(blocks=(*first, last._replace(types=types)))

    monkeypatch.setattr(graph, "topology", wrong)


@pytest.mark.parametrize(
    ("damage", "broken", "whole"),
    [
        (constant_in_message, "D", "P"),
        (uneven_map, "D", "P"),
        (type_per_hidden_neuron, "P", "D"),
        (last_types_in_wrong_order, "P", "D"),
    ],
)
def test_a_wrong_model_fails_the_same_check(damage, broken, whole, monkeypatch):
    """And only for the group that it breaks."""
    damage(monkeypatch)
    read, params, _ = compiled_reader("tanh mlp", "float32", True)
    arch = support.SIGN["tanh mlp"]
    assert_symmetric(arch, read, params, support.GROUPS[whole], "float32")
    with pytest.raises(AssertionError):
        assert_symmetric(arch, read, params, support.GROUPS[broken], "float32")


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", support.TOLERANCE)
@pytest.mark.parametrize("name", ["siren", "tanh cnn"])
def test_encoder_equals_its_plain_twin(name, dtype, normalized):
    """The rewrites change nothing: edge by edge in NumPy float64, the same embedding."""
    arch = support.SIGN[name]
    with support.precision(dtype):
        read, params, variables = reader(name, dtype, normalized)
        z = read(jax.tree.map(lambda leaf: leaf[None], params))[0][0]
        plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        expected = twin.encode(plain, arch, graph.from_params(arch, params), normalized=normalized)
    assert support.deviation(z, expected) < support.TOLERANCE[dtype]


MODEL = Autoencoder(SIREN, 6)
LOSS_FN = losses.autoencoder_loss(MODEL, size=(4, 4))


@functools.cache
def gradients():
    """params -> loss of the default autoencoder, its gradient in the variables, its gradient in the params."""
    variables = support.random_variables(MODEL, support.random_params(SIREN))

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


@pytest.mark.parametrize("kind", ["zero weights", "equal neurons", "dead units", "tiny", "huge"])
def test_degenerate_networks_give_finite_values_and_gradients(kind):
    result = gradients()(jax.tree.map(lambda leaf: leaf[None], degenerate(kind)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_every_parameter_of_the_autoencoder_learns():
    """Each entry of each array has a gradient."""
    _, (grad, _) = gradients()(support.random_params(SIREN, models=(1,)))
    still = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grad)
        if (leaf == 0).any()
    }
    assert not still


def test_gradient_of_the_invariant_loss_is_equivariant():
    """The loss is a function of the orbit, so its gradient in the params moves with the network."""
    params = support.random_params(SIREN, models=(1,))
    element = support.random_elements(SIREN, 1)
    loss, (_, grad) = gradients()(params)
    loss_moved, (_, grad_moved) = gradients()(act_on_stack(SIREN, element, params))
    assert support.deviation(loss_moved, loss) < 1e-5
    assert support.deviation(grad_moved, act_on_stack(SIREN, element, grad)) < 1e-4


def test_autoencoder_maps_an_orbit_to_one_network():
    """decode(encode(params)), alike for every member, single or stacked, jitted or not."""
    model = Autoencoder(SIREN, 4, num_layers=1, decoder_hidden=(3,))
    params = support.random_params(SIREN)
    variables = support.random_variables(model, params)
    stack = act_on_stack(
        SIREN, support.random_elements(SIREN, 3), jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    )
    decoded = jax.jit(jax.vmap(lambda p: model.apply(variables, p)))(stack)
    z = jax.jit(lambda p: model.apply(variables, p, method="encode"))(params)
    decode = jax.jit(lambda z: model.apply(variables, z, method="decode"))
    once = decode(z)
    for index in range(3):
        assert support.deviation(support.rows(decoded, index), once) < 1e-5
    assert support.deviation(decode(z + 1), once) > 1e-3


def test_a_network_of_width_one_is_read():
    arch = architecture.siren((2, 1, 1, 1))
    model = Encoder(arch, 3, num_layers=1)
    params = support.random_params(arch)
    variables = support.random_variables(model, params)
    value, grad = jax.jit(jax.value_and_grad(lambda v: model.apply(v, params).sum()))(variables)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_follows_its_key_in_training_alone(rate):
    model = Encoder(SIREN, 4, num_layers=1, dropout=rate)
    params = support.random_params(SIREN)
    variables = support.random_variables(model, params)
    apply = jax.jit(lambda key: model.apply(variables, params, train=True, rngs={"dropout": key}))
    first, again, second = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    steady = jax.jit(lambda: model.apply(variables, params))()
    for z in (first, second):
        assert np.allclose(z, steady, rtol=1e-5) == (rate == 0)
    assert np.array_equal(first, second) == (rate == 0)


def test_scales_are_divided_out_and_multiplied_on():
    """The encoder reads params / scales and the decoder writes scales * params."""
    scales = (0.5, 2.0, 3.0, 0.1, 1.0, 7.0)
    params, z = support.random_params(SIREN), jnp.ones(4)
    divided = architecture.pack(SIREN, [v / s for v, s in zip(architecture.unpack(SIREN, params), scales, strict=True)])
    plain, scaled = (Encoder(SIREN, 4, num_layers=1, scales=s) for s in (None, scales))
    variables = support.random_variables(plain, params)
    assert support.deviation(jax.jit(scaled.apply)(variables, params), jax.jit(plain.apply)(variables, divided)) < 1e-6
    plain, scaled = (Decoder(SIREN, (5,), scales=s) for s in (None, scales))
    variables = support.random_variables(plain, z)
    written = architecture.unpack(SIREN, plain.apply(variables, z))
    expected = architecture.pack(SIREN, [v * s for v, s in zip(written, scales, strict=True)])
    assert support.deviation(scaled.apply(variables, z), expected) < 1e-6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Encoder(support.ARCHITECTURES["relu mlp"], 4),
            "sign symmetries .*'mlp 3-5-4-2 relu' has hidden layers .*positive",
        ),
        (Encoder(support.ARCHITECTURES["mixed mlp"], 4), "'hidden_1': 'positive', 'hidden_2': 'permutation'"),
        (Encoder(architecture.siren((2, 1)), 4), "has hidden layers none"),
        (Encoder(SIREN, 4, scales=(1.0,) * 5), "expected 6 finite numbers > 0, .* Use zoo.scales"),
        (Encoder(SIREN, 4, scales=(1.0,) * 5 + (0.0,)), "expected 6 finite numbers > 0"),
        (Encoder(SIREN, 4, scales=(1.0,) * 5 + (np.nan,)), "expected 6 finite numbers > 0"),
        (Autoencoder(SIREN, 4, scales=(-1.0,) * 6), "expected 6 finite numbers > 0"),
    ],
)
def test_networks_and_scales_that_do_not_fit_are_refused(model, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, key, support.random_params(model.arch))


@pytest.mark.parametrize(
    "model",
    [
        ScaleGMN(SIREN, 4, num_layers=2, hidden=7, dropout=0.1),
        Encoder(SIREN, 4, latent=5, scales=(0.5, 2.0, 3.0, 0.1, 1.0, 7.0)),
        Decoder(SIREN, (3, 4)),
        Autoencoder(SIREN, 4, normalized=False, decoder_hidden=(5,)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_json_round_trip(model):
    assert models.from_json(json.loads(json.dumps(models.as_json(model)))) == model


@pytest.mark.parametrize("change", [{"type": "Transformer"}, {"size": 3}, {"arch": {}}])
def test_foreign_json_is_refused(change):
    with pytest.raises(ValueError, match="no description of"):
        models.from_json(models.as_json(Encoder(SIREN, 4)) | change)


PUBLISHED = Autoencoder(architecture.siren((2, 32, 32, 1)), 128)


@functools.cache
def published_shapes():
    params = jax.eval_shape(lambda k: network.init(PUBLISHED.arch, k), jax.random.key(0))
    return params, jax.eval_shape(PUBLISHED.init, jax.random.key(0), params)


def test_published_size_has_the_published_number_of_parameters():
    """Encoder 1,936,256 less the 33,280 that the published readout builds and never uses; decoder 772,513."""
    _, variables = published_shapes()
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in variables["params"].items()}
    assert count == {"encoder": 1_936_256 - 33_280, "decoder": 772_513}


def flops(fn, *shapes) -> float:
    return jax.jit(fn).lower(*shapes).compile().cost_analysis()["flops"]


def test_published_size_reads_a_network_in_1_1_gflop():
    """By the compiler's own count; the published code takes 3.4."""
    params, variables = published_shapes()
    assert 0.9e9 < flops(lambda v, p: PUBLISHED.apply(v, p, method="encode"), variables, params) <= 1.1e9


def test_published_size_takes_3_3_gflop_a_training_step_and_network(key):
    params, variables = published_shapes()
    step_fn = jax.grad(losses.autoencoder_loss(PUBLISHED, size=(28, 28)), has_aux=True)
    assert 2.7e9 < flops(step_fn, variables, params, key) <= 3.3e9
