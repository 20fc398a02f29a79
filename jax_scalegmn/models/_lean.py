"""A graph metanetwork without mlps on edges: neurons alone have features, and messages are linear in the weights.

For tasks on neurons, like telling which neurons of two networks correspond.
"""

import jax
import jax.numpy as jnp
import jraph
from flax import linen as nn
from jaxtyping import Array

from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.models import graph
from jax_scalegmn.models._message_passing import Nodes
from jax_scalegmn.models._scalegmn import check_graph, node_vectors
from jax_scalegmn.models.graph import Topology

_EPSILON = 1e-6  # of the mean square that features are divided by


class LeanGMN(nn.Module):
    """Neuron features of a network's graph that follow its permutations and signs, at the lowest cost.

    Where a ScaleGMN applies mlps to every edge, here messages are linear in the weights, and mlps act on neurons. With
    h' = h / rms(h), one layer is

        z_i = h_i' @ W + sum_j w_ji h_j' @ W_along / sqrt(senders) + sum_k w_ik h_k' @ W_back / sqrt(receivers)
        h_i <- h_i + [tanh(z_i @ W_u + b_u) * sigmoid(|z_i @ W_a| @ W_g + b_g)] @ W_o

    with kernels of their own for every neuron layer and every block of edges. In SIGN layers b_u is 0, so that h is
    odd: it follows its neuron's sign. Where w does not, as after abs, |h'| is read, and what arrives is multiplied by
    h' @ W_sign. Positive scales are not followed: read networks in the balanced gauge, with the
    architecture restricted to SIGN, as `Matcher` does.

    Attributes:
      arch: The architecture of the networks that it reads, without positive scales.
      features: The number of entries of a neuron's feature.
      num_layers: The number of message passing layers.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> built = sg.models.graph.from_params(arch, sg.network.init(arch, jax.random.key(0)))
    >>> model = sg.models.LeanGMN(arch, features=8, num_layers=1)
    >>> features, variables = jax.eval_shape(model.init_with_output, jax.random.key(1), built)
    >>> features.nodes.shape
    (7, 8)
    """

    arch: Architecture
    features: int
    num_layers: int = 3

    @nn.compact
    def __call__(self, graph_in: jraph.GraphsTuple) -> jraph.GraphsTuple:
        """Reads one graph, as `graph.from_params` returns it.

        Returns:
          The graph with node features [nodes, features] and the edges as they were.

        Raises:
          ValueError: If the graph is of another architecture, or the architecture has positive scales.
        """
        topo = graph.topology(self.arch)
        if topo.has_sizes or not topo.scalings or self.num_layers < 1:
            groups = sorted({scaling.value for several in topo.scalings.values() for scaling in several})
            raise ValueError(
                f"{self.arch.name!r} has hidden layers with the groups {groups}, and num_layers is {self.num_layers}; "
                "expected hidden layers without positive scales, and num_layers >= 1. Balance the networks and "
                "restrict the architecture to Scaling.SIGN."
            )
        check_graph(self.arch, graph_in)
        x = node_vectors(topo, graph_in.nodes)
        nodes = self._encode(topo, x, graph_in.nodes[:, x.shape[-1] :])
        lifted = dict.fromkeys(block.receiver for block in topo.blocks if block.lifted)
        lifts = {name: self._dense(f"lift_{name}")(x[topo.nodes[name]]) for name in lifted}
        for index in range(self.num_layers):
            nodes = self._layer(index, topo, graph_in, nodes, lifts)
        return graph_in._replace(nodes=jnp.concatenate(list(nodes.values())))

    def _encode(self, topo: Topology, x: Array, free: Array) -> Nodes:
        """The first features: those of SIGN layers are linear in the neuron's own vectors, such as its bias."""
        encoding = self.param("encoding", nn.initializers.normal(1.0), (topo.num_node_types, self.features))
        invariant = encoding[topo.node_types]
        if free.shape[-1]:
            invariant += self._dense("free")(free)
        h = self._dense("vectors")(x)
        return {
            name: h[where] * invariant[where] if _signed(topo, name) else h[where] + invariant[where]
            for name, where in topo.nodes.items()
        }

    def _layer(self, index: int, topo: Topology, graph_in: jraph.GraphsTuple, nodes: Nodes, lifts: Nodes) -> Nodes:
        """One round of messages in both directions, and an update of every neuron."""
        normed = {name: rms_normalized(h) for name, h in nodes.items()}
        sums = {name: self._dense(f"own_{index}_{name}")(h) for name, h in normed.items()}
        for number, block in enumerate(topo.blocks):
            weights = graph_in.edges[block.edges].reshape(*block.shape, -1)
            senders, receivers = normed[block.sender], normed[block.receiver]
            lift = lifts[block.receiver] if block.lifted else 1
            read = [jnp.abs(h) if hides else h for h, hides in zip((senders, receivers), block.unsigned, strict=True)]
            along = self._messages(f"along_{index}_{number}", weights, read[0])
            back = self._messages(f"back_{index}_{number}", weights.swapaxes(0, 1), read[1] * lift)
            if block.unsigned[0]:
                back *= self._dense(f"sign_back_{index}_{number}")(senders)
            if block.unsigned[1]:
                along *= self._dense(f"sign_along_{index}_{number}")(receivers)
            sums[block.receiver] += along * lift
            sums[block.sender] += back
        return {
            name: h + self._update(f"{index}_{name}", sums[name], odd=_signed(topo, name)) for name, h in nodes.items()
        }

    def _messages(self, name: str, weights: Array, h: Array) -> Array:
        """sum over s and k of weights[s, r, k] * (h @ W_k)[s], over the root of the number of terms."""
        count = weights.shape[0] * weights.shape[-1]
        shape = weights.shape[-1], self.features, self.features
        kernel = self.param(name, nn.initializers.normal(self.features**-0.5), shape)
        return jnp.einsum("srk,ksd->rd", weights, h @ kernel) / count**0.5

    def _update(self, name: str, z: Array, *, odd: bool) -> Array:
        """[tanh(z @ W_u + b_u) * sigmoid(|z @ W_a| @ W_g + b_g)] @ W_o, odd in z without b_u."""
        inner = jnp.tanh(nn.Dense(self.features, use_bias=not odd, name=f"inner_{name}")(z))
        gate = nn.sigmoid(nn.Dense(self.features, name=f"gate_{name}")(jnp.abs(self._dense(f"even_{name}")(z))))
        return self._dense(f"outer_{name}")(inner * gate)

    def _dense(self, name: str) -> nn.Dense:
        return nn.Dense(self.features, use_bias=False, name=name)


def rms_normalized(h: Array) -> Array:
    """The rows of h over their root mean square; rows of 0 stay 0."""
    return h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + _EPSILON)


# --- private ------------------------------------------------------------------------------------------------------


def _signed(topo: Topology, name: str) -> bool:
    return Scaling.SIGN in topo.scalings.get(name, ())
