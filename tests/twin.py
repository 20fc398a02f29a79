"""A second implementation of the encoder: plain NumPy on flat edges, straight from the equations, with no rewrites.

It reads the variables of `models.Encoder` and shares nothing else with it but the graph. Equations: arXiv 2406.10685,
section 5, with the "gate" rule for inputs and outputs, types and positional encodings as in arXiv 2403.12143.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(p, x):
    """Linear, layer normalisation, silu, linear."""
    u = x @ p["kernel_in"] + p["bias_in"]
    u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)
    return silu(u * p["norm_scale"] + p["norm_bias"]) @ p["kernel_out"] + p["bias_out"]


def canonical(p, x):
    return mlp(p, x) + mlp(p, -x)


def scale_inv(p, x):
    return mlp(p["phi"], canonical(p["rho"], x))


def scale_eq(p, x, io):
    """Hidden receivers are gated by an even function, inputs and outputs by any."""
    return (x @ p["gamma"]) * np.where(io[:, None], mlp(p["io_gate"], x), scale_inv(p["gate"], x))


def types(widths, senders, receivers):
    """Node and edge types of a chain of neuron layers of these widths."""
    layer = np.repeat(np.arange(len(widths)), widths)
    last = len(widths) - 1
    node, edge = {}, {}
    nodes = [node.setdefault((at, i if at in (0, last) else None), len(node)) for i, at in enumerate(layer)]
    edges = [
        edge.setdefault((layer[s], s if layer[s] == 0 else None, r if layer[r] == last else None), len(edge))
        for s, r in zip(senders, receivers, strict=True)
    ]
    return nodes, edges, (layer == 0) | (layer == last)


def encode(variables, arch, graph, *, normalized):
    """The embedding of one jraph graph of a network of that architecture."""
    widths = [neurons.width for neurons in arch.neurons]
    p = variables["params"]
    gmn, senders, receivers = p["gmn"], np.asarray(graph.senders), np.asarray(graph.receivers)
    node_types, edge_types, io = types(widths, senders, receivers)
    h, p_node = np.float64(graph.nodes) @ gmn["node_kernel"], gmn["node_encoding"][node_types]
    h = np.where(io[:, None], h + p_node, h * p_node)
    e = (np.float64(graph.edges) @ gmn["edge_kernel"]) * gmn["edge_encoding"][edge_types]
    degree = np.maximum(np.bincount(receivers, minlength=len(h)), 1)[:, None]
    for index in range(sum(name.startswith("layer_") for name in gmn)):
        layer = gmn[f"layer_{index}"]
        m = (h[senders] @ layer["sender_kernel"]) * (e @ layer["edge_kernel"])
        m = scale_eq(layer["message"], m, io[receivers])
        total = np.zeros_like(h)
        np.add.at(total, receivers, m)
        if normalized:
            total /= np.sqrt(degree)
        new = scale_eq(layer["update"], np.concatenate([h, total], -1), io) + h @ layer["skip_kernel"]
        if "edge_update" in layer:
            update = layer["edge_update"]
            c = canonical(update["rho"], h)
            e = (e @ update["kernel"]) * mlp(update["phi"], np.concatenate([c[senders], c[receivers]], -1))
        h = new
    inner = scale_inv(p["invariant"], h[~io]).sum(0)
    if normalized:
        inner /= np.sqrt((~io).sum())
    return mlp(p["readout"], np.concatenate([inner, h[io].reshape(-1)]))
