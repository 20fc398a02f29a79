"""Params and graph are two forms of the same numbers."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn.models import graph

DESCRIPTIONS = {
    **support.ARCHITECTURES,
    "normalized": support.batch_norm_mlp()[0],
    "same": sg.cnn((2, 3, 2, 4), 2, kernel_size=(1, 4, 3), padding="SAME", flatten=(6, 5)),
}


# Compiled, since one program costs less than its operations one by one.
build = jax.jit(graph.from_params, static_argnums=0)


@pytest.mark.parametrize("arch", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_round_trip_is_lossless_bit_for_bit(arch):
    stack = support.random_params(arch, models=(2,))
    back = jax.jit(jax.vmap(lambda p: graph.to_params(arch, graph.from_params(arch, p))))(stack)
    support.assert_identical(back, stack)


@pytest.mark.parametrize(
    ("arch", "nodes", "edges", "node_types", "edge_types"),
    [
        (sg.siren((2, 32, 32, 1)), 67, 1120, 5, 4),
        (sg.cnn((1, 16, 16, 16), 10), 59, 688, 14, 13),
    ],
)
def test_counts_of_the_published_networks(arch, nodes, edges, node_types, edge_types):
    topo = graph.topology(arch)
    built = build(arch, support.random_params(arch))
    assert (topo.num_nodes, len(built.nodes), int(built.n_node[0])) == (nodes,) * 3
    assert (len(built.senders), len(built.edges), int(built.n_edge[0])) == (edges,) * 3
    assert (topo.num_node_types, topo.num_edge_types) == (node_types, edge_types)
    assert len(np.unique(np.concatenate([np.unique(block.types) for block in topo.blocks]))) == edge_types


def test_edges_are_ordered_by_layer_pair_sender_receiver(arch, params):
    """In the blocks' slices, each of which reshapes to [senders, receivers]."""
    built, topo = build(arch, params), graph.topology(arch)
    expected, start = [], 0
    for block, first, second in zip(topo.blocks, arch.neuron_layers[:-1], arch.neuron_layers[1:], strict=True):
        stop = start + first.width
        expected += [(start + i, stop + j) for i in range(first.width) for j in range(second.width)]
        assert (block.sender, block.receiver, block.shape) == (first.name, second.name, (first.width, second.width))
        assert block.edges == slice(len(expected) - first.width * second.width, len(expected))
        assert topo.nodes[second.name] == slice(stop, stop + second.width)
        start = stop
    np.testing.assert_array_equal(np.stack([built.senders, built.receivers], 1), expected)


@pytest.mark.parametrize("name", ["siren", "tanh mlp", "mixed mlp"])
def test_features_of_dense_networks_are_the_weights(name):
    arch = support.ARCHITECTURES[name]
    params = support.random_params(arch)
    built = build(arch, params)
    np.testing.assert_array_equal(
        built.edges[:, 0], jnp.concatenate([d["kernel"].reshape(-1) for d in params.values()])
    )
    biases = [jnp.ones(arch.neuron_layers[0].width), *(d["bias"] for d in params.values())]
    np.testing.assert_array_equal(built.nodes[:, 0], jnp.concatenate(biases))


def test_types_are_per_input_per_hidden_layer_and_per_output():
    """The last block's edge types are per receiver, the first block's per sender."""
    topo = graph.topology(sg.mlp((2, 3, 4, 2), "tanh"))
    assert topo.node_types.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5]
    types = [np.broadcast_to(block.types, block.shape).tolist() for block in topo.blocks]
    assert types == [[[0] * 3, [1] * 3], [[2] * 4] * 3, [[3, 4]] * 4]


def test_convolutions_have_input_features_0_and_centered_kernels():
    """A small kernel is zero-padded symmetrically (the odd zero at the end); a dense scalar is stored in slot 0."""
    arch = sg.cnn((1, 1, 1, 1), 1, kernel_size=(4, 3, 2))
    params = support.random_params(arch)
    built = build(arch, params)
    assert built.nodes[0, 0] == 0
    for row, (name, low) in enumerate((("Conv_0", 0), ("Conv_1", 0), ("Conv_2", 1))):
        kernel = params[name]["kernel"][..., 0, 0]
        high = 4 - low - len(kernel)
        np.testing.assert_array_equal(built.edges[row].reshape(4, 4), np.pad(kernel, [(low, high)] * 2))
    scalar = params["Dense_0"]["kernel"][0, 0]
    np.testing.assert_array_equal(built.edges[3], np.eye(16, dtype=np.float32)[0] * scalar)


def test_a_flattened_map_is_one_edge_a_channel():
    """Edge (channel, output) carries the head's weights at all positions, channels fastest in the kernel."""
    arch = support.ARCHITECTURES["tanh cnn"]
    params = support.random_params(arch)
    head, positions = graph.topology(arch).blocks[-1], 2 * 3
    edges = build(arch, params).edges[head.edges].reshape(*head.shape, -1)
    kernel = params["Dense_0"]["kernel"].reshape(positions, 4, 3)
    np.testing.assert_array_equal(edges[2, 1, :positions], kernel[:, 2, 1])
    np.testing.assert_array_equal(edges[2, 1, positions:], 0)


@pytest.mark.parametrize("name", ["siren", *(pytest.param(n, marks=pytest.mark.slow) for n in list(DESCRIPTIONS)[1:])])
def test_is_a_valid_jraph_graph(name):
    """jraph batches two of them and takes them apart again."""
    arch = DESCRIPTIONS[name]
    first = build(arch, support.random_params(arch))
    second = build(arch, support.random_params(arch, seed=1))
    both = jraph.batch([first, second])
    np.testing.assert_array_equal(both.senders[len(first.senders) :], second.senders + len(first.nodes))
    for got, expected in zip(jraph.unbatch(both), (first, second), strict=True):
        support.assert_identical(graph.to_params(arch, got), graph.to_params(arch, expected))


def test_a_foreign_graph_is_refused():
    arch = support.ARCHITECTURES["siren"]
    built = build(arch, support.random_params(arch))
    with pytest.raises(ValueError, match=r"graph.edges has shape \(33, 1\); 'siren .*' expects \(34, 1\)"):
        graph.to_params(arch, built._replace(edges=built.edges[1:]))
    with pytest.raises(ValueError, match=r"graph.nodes has shape \(24, 1\)"):
        graph.to_params(arch, jraph.batch([built, built]))
