"""Sign-equivariant building blocks of a ScaleGMN, in the exact form that costs least.

The published layers (arXiv 2406.10685, section 5) apply every map to every edge. Here the same functions are computed
with a third of the floating-point operations: products of a node stay on the node until an edge needs them, rho(x)
and rho(-x) share one product, rho's last kernel is multiplied into phi's first, and an edge feature that still is
"weight times a vector" is never multiplied edge by edge.
"""

import functools
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn.graph import Block, Topology

EPSILON = 1e-5  # of every layer normalisation, as published

# An axis word that begins with "_" may differ from one array to the next: layers have different widths.
Nodes: TypeAlias = dict[str, Float[Array, "_n features"]]


class Factored(NamedTuple):
    """Edge features that are linear in the edge's weights: sum over k of weights[..., k] * basis[..., k, :].

    `basis` has size 1 along senders or receivers where it does not depend on them.
    """

    weights: Float[Array, "senders receivers k"]
    basis: Float[Array, "#senders #receivers k features"]

    def value(self) -> Float[Array, "senders receivers features"]:
        """The features as one array."""
        senders, receivers, k, _ = self.basis.shape
        if k == 1:
            return self.weights * self.basis[..., 0, :]
        if (senders, receivers) == (1, 1):
            return self.weights @ self.basis[0, 0]
        if receivers == 1:
            return jnp.einsum("srk,skd->srd", self.weights, self.basis[:, 0])
        if senders == 1:
            return jnp.einsum("srk,rkd->srd", self.weights, self.basis[0])
        return jnp.einsum("srk,srkd->srd", self.weights, self.basis)


Edges: TypeAlias = Factored | Float[Array, "_senders _receivers features"]
Features: TypeAlias = Factored | Float[Array, "*batch features"]


def project(x: Features, kernel: Float[Array, "features out"]) -> Float[Array, "*batch out"]:
    """x @ kernel, on the basis alone where x is factored."""
    if isinstance(x, Factored):
        return Factored(x.weights, x.basis @ kernel).value()
    return x @ kernel


def scale_by_sender(edges: Edges, kernel: Float[Array, "features out"], senders: Float[Array, "n out"]) -> Edges:
    """(edges @ kernel) * senders, the senders broadcast over their edges; factored edges stay factored."""
    if not isinstance(edges, Factored):
        return (edges @ kernel) * senders[:, None, :]
    basis = (edges.basis @ kernel) * senders[:, None, None, :]
    scaled = Factored(edges.weights, basis)
    products, direct = math.prod(basis.shape[:3]), math.prod(edges.weights.shape[:2])
    return scaled if products < direct else scaled.value()


# Computed again for the gradient: that is cheaper than to keep what lies between, in memory and in time.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _norm_silu(centered: Array, scale: Array, bias: Array) -> Array:
    """silu of the layer normalisation of rows that have mean 0 already."""
    normed = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + EPSILON)
    return nn.silu(normed * scale + bias)


class MLP(nn.Module):
    """Linear, layer normalisation, silu, linear: the published mlp, with its steps callable one by one.

    The layer normalisation subtracts a mean over the hidden units. That is linear, so it is taken out of the kernel
    and the bias once, instead of out of every row.
    """

    inputs: int
    hidden: int
    outputs: int
    output_bias: float = 0.0

    def setup(self) -> None:
        uniform = nn.initializers.uniform
        self.kernel_in = self.param("kernel_in", nn.initializers.lecun_normal(), (self.inputs, self.hidden))
        bound = 1 / math.sqrt(self.inputs)
        self.bias_in = self.param("bias_in", lambda *a: uniform(2 * bound)(*a) - bound, (self.hidden,))
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (self.hidden,))
        self.norm_bias = self.param("norm_bias", nn.initializers.zeros, (self.hidden,))
        self.kernel_out = self.param("kernel_out", nn.initializers.lecun_normal(), (self.hidden, self.outputs))
        self.bias_out = self.param("bias_out", nn.initializers.constant(self.output_bias), (self.outputs,))

    def __call__(self, x: Features) -> Array:
        return self.lower(self.activate(project(x, self.centered_kernel())))

    def centered_kernel(self) -> Float[Array, "inputs hidden"]:
        """The first kernel less the mean that the layer normalisation would subtract behind it."""
        return self.kernel_in - self.kernel_in.mean(-1, keepdims=True)

    def activate(self, u: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """silu(layernorm(u + bias)) for products u with the centered kernel."""
        return _norm_silu(u + (self.bias_in - self.bias_in.mean()), self.norm_scale, self.norm_bias)

    def activate_even(self, u: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """What u and -u give together: the even part, with one product."""
        return self.activate(u) + self.activate(-u)

    def lower(self, a: Float[Array, "*batch hidden"]) -> Float[Array, "*batch outputs"]:
        return a @ self.kernel_out + self.bias_out


class SignInvariant(nn.Module):
    """ScaleInv for signs: phi(rho(x) + rho(-x)) (arXiv 2406.10685, equation 8). Even in x."""

    inputs: int
    hidden: int
    outputs: int
    output_bias: float = 0.0

    def setup(self) -> None:
        self.rho = MLP(self.inputs, self.hidden, self.inputs)
        self.phi = MLP(self.inputs, self.hidden, self.outputs, self.output_bias)

    def __call__(self, x: Features) -> Array:
        even = self.rho.activate_even(project(x, self.rho.centered_kernel()))
        kernel = self.phi.centered_kernel()
        u = even @ (self.rho.kernel_out @ kernel) + 2 * self.rho.bias_out @ kernel
        return self.phi.lower(self.phi.activate(u))


class SignEquivariant(nn.Module):
    """ScaleEq for signs: (x @ gamma) * ScaleInv(x) (arXiv 2406.10685, equation 7). Odd in x.

    Inputs and outputs carry no group element: there the gate is any mlp of x ("gate" rule of the published INRs).
    """

    inputs: int
    hidden: int
    outputs: int

    def setup(self) -> None:
        self.gamma = self.param("gamma", nn.initializers.lecun_normal(), (self.inputs, self.outputs))
        self.gate = SignInvariant(self.inputs, self.hidden, self.outputs, output_bias=1.0)
        self.io_gate = MLP(self.inputs, self.hidden, self.outputs, output_bias=1.0)

    def __call__(self, x: Features, *, io: bool) -> Array:
        return project(x, self.gamma) * (self.io_gate(x) if io else self.gate(x))


class EdgeUpdate(nn.Module):
    """e' = (e @ W) * phi([c(h_sender), c(h_receiver)]) with c(h) = rho(h) + rho(-h) (arXiv 2406.10685, equation 15)."""

    features: int
    hidden: int

    def setup(self) -> None:
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.features, self.features))
        self.rho = MLP(self.features, self.hidden, self.features)
        self.phi = MLP(2 * self.features, self.hidden, self.features, output_bias=1.0)

    def __call__(self, blocks: tuple[Block, ...], nodes: Nodes, edges: list[Edges]) -> list[Edges]:
        first, second = jnp.split(self.phi.centered_kernel(), 2)
        even = {name: self.rho.activate_even(h @ self.rho.centered_kernel()) for name, h in nodes.items()}
        sending = self.rho.kernel_out @ first
        receiving = self.rho.kernel_out @ second
        shift = 2 * self.rho.bias_out @ (first + second)
        updated: list[Edges] = []
        for block, e in zip(blocks, edges, strict=True):
            u = (even[block.sender] @ sending)[:, None, :] + (even[block.receiver] @ receiving + shift)
            updated.append(project(e, self.kernel) * self.phi.lower(self.phi.activate(u)))
        return updated


class MessagePassing(nn.Module):
    """One forward layer (arXiv 2406.10685, equations 12 to 15): messages, their sums, node update, edge update.

    The sums are divided by the square root of the number of senders where `normalized`, which keeps their variance;
    the published layers sum plainly.
    """

    topology: Topology
    features: int
    hidden: int
    normalized: bool
    update_edges: bool

    @nn.compact
    def __call__(self, nodes: Nodes, edges: list[Edges]) -> tuple[Nodes, list[Edges]]:
        d, topo = self.features, self.topology
        lecun = nn.initializers.lecun_normal()
        sender_kernel = self.param("sender_kernel", lecun, (d, d))
        edge_kernel = self.param("edge_kernel", lecun, (d, d))
        skip_kernel = self.param("skip_kernel", lecun, (d, d))
        message = SignEquivariant(d, self.hidden, d, name="message")
        update = SignEquivariant(2 * d, self.hidden, d, name="update")

        sums = {name: jnp.zeros_like(h) for name, h in nodes.items()}
        for block, e in zip(topo.blocks, edges, strict=True):
            m = scale_by_sender(e, edge_kernel, nodes[block.sender] @ sender_kernel)
            total = message(m, io=block.receiver in topo.io).sum(0)
            sums[block.receiver] += total / math.sqrt(block.shape[0]) if self.normalized else total
        # One call for all hidden layers and one for inputs and outputs: few large products.
        updated: Nodes = {}
        for io in (False, True):
            names = [name for name in nodes if (name in topo.io) == io]
            h = jnp.concatenate([nodes[name] for name in names])
            new = update(jnp.concatenate([h, jnp.concatenate([sums[name] for name in names])], -1), io=io)
            new += h @ skip_kernel
            ends = np.cumsum([nodes[name].shape[0] for name in names])[:-1]
            updated |= zip(names, jnp.split(new, ends), strict=True)
        if self.update_edges:
            edges = EdgeUpdate(d, self.hidden, name="edge_update")(topo.blocks, nodes, edges)
        return {name: updated[name] for name in nodes}, edges
