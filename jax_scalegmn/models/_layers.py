"""Building blocks of a ScaleGMN for every group, in the exact form that costs least.

The published layers (arXiv 2406.10685, section 5) apply every map to every edge. Here the same functions are computed
with a third of the floating-point operations: products of a node stay on the node until an edge needs them, rho(x)
and rho(-x) share one product, rho's last kernel is multiplied into phi's first, and so on (`_features`).
"""

import enum
import functools
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models._features import Features, Joined, as_dtype, project, value, width
from jax_scalegmn.models._products import times

EPSILON = 1e-5  # of every layer normalization, as published
PUBLISHED_NORM_EPSILON = 1e-10  # added to every norm in the published code, which costs invariance


class Canonical(enum.Enum):
    """The canonical map c(x): how a feature x loses the group element that it carries.

    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 8, 8, 1))
    >>> sg.ScaleGMN(arch, features=16, canonical=sg.models.Canonical.ABSOLUTE).canonical.value
    'absolute'
    """

    SYMMETRIZED = "symmetrized"
    """Signs by rho(x) + rho(-x), positive scales by x / |x|, both by one after the other (arXiv 2406.10685, section 5
    and appendix)."""
    ABSOLUTE = "absolute"
    """Signs by the absolute value of every entry, positive scales by x / |x|."""
    ABLATED = "ablated"
    """Not at all, by rho(x): a baseline without the scale symmetry."""


class IO(enum.Enum):
    """The rule for input and output neurons, on which no group acts.

    >>> import jax_scalegmn as sg
    >>> sg.ScaleGMN(sg.cnn((1, 8, 8), 10), features=16, io=sg.models.IO.SHARED).io.value
    'shared'
    """

    GATE = "gate"
    """(x @ gamma) * mlp(x): a free gate (published for INRs)."""
    SHARED = "shared"
    """One mlp(x) for inputs and outputs (published for relu CNNs)."""
    SEPARATE = "separate"
    """One mlp(x) for inputs, another for outputs (published for tanh CNNs and editing)."""


class FixedLayer(enum.Enum):
    """A neuron layer on which no group acts: an input with maps of its own, or any other input or output."""

    INPUT = "input"
    OUTPUT = "output"


class Groups(NamedTuple):
    """Which group acts on a hidden neuron layer: the only one, or that of several whose `present` is true."""

    scalings: tuple[Scaling, ...]
    present: tuple[Bool[Array, ""], ...] = ()


Rule: TypeAlias = FixedLayer | Groups


def inverse_norm(x: Float[Array, "*batch features"], epsilon: float = 0.0) -> Float[Array, "*batch 1"]:
    """1 / |x| in float32 or better, exact for features of any size; 0 with gradient 0 where x is 0.

    Dead neurons are common: there x / |x| must be 0, and its gradient finite.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
    nonzero = largest > jnp.finfo(x.dtype).tiny
    largest = jnp.where(nonzero, largest, 1)
    square = jnp.square(x / largest).sum(-1, keepdims=True)
    # Twice divided by a size of order |x|, not once by its square, which a gradient near 0 would do and overflow.
    norm = jnp.sqrt(jnp.where(nonzero, square, 1)) + epsilon / largest
    return jnp.where(nonzero, 1 / norm / largest, 0)


# Computed again for the gradient: that takes less memory and less time than to keep the values in between.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _norm_silu(centered: Array, scale: Array, bias: Array) -> Array:
    """silu of the layer normalization of rows that have mean 0 already, in float32 or better."""
    u = centered.astype(jnp.promote_types(centered.dtype, jnp.float32))
    normed = u * jax.lax.rsqrt(jnp.square(u).mean(-1, keepdims=True) + EPSILON)
    return nn.silu(normed * scale + bias).astype(centered.dtype)


def cast(x: Array, dtype: str | None) -> Array:
    """x in that dtype, or as it is."""
    return x if dtype is None else x.astype(dtype)


class MLP(nn.Module):
    """Linear, layer normalization, silu, linear: the published mlp, with its steps callable one by one.

    The layer normalization subtracts a mean over the hidden units. That is linear, so it is taken out of the kernel
    and the bias once, instead of out of every row.

    Attributes:
      inputs: The number of features that it reads, those that `extra` adds included.
      dtype: The dtype of the products; None for that of the parameters.
    """

    inputs: int
    hidden: int
    outputs: int
    output_bias: float = 0.0
    dtype: str | None = None

    def setup(self) -> None:
        uniform, lecun = nn.initializers.uniform, nn.initializers.lecun_normal()
        bound = 1 / math.sqrt(self.inputs)
        kernel_in = self.param("kernel_in", lecun, (self.inputs, self.hidden))
        bias_in = self.param("bias_in", lambda *a: uniform(2 * bound)(*a) - bound, (self.hidden,))
        norm_scale = self.param("norm_scale", nn.initializers.ones, (self.hidden,))
        norm_bias = self.param("norm_bias", nn.initializers.zeros, (self.hidden,))
        kernel_out = self.param("kernel_out", lecun, (self.hidden, self.outputs))
        bias_out = self.param("bias_out", nn.initializers.constant(self.output_bias), (self.outputs,))
        self.centered_kernel = cast(kernel_in - kernel_in.mean(-1, keepdims=True), self.dtype)
        self.centered_bias = cast(bias_in - bias_in.mean(), self.dtype)
        self.norm = (norm_scale, norm_bias)
        self.kernel_out, self.bias_out = cast(kernel_out, self.dtype), cast(bias_out, self.dtype)

    def __call__(self, x: Features, extra: Joined | Array | None = None) -> Array:
        """The mlp of x, or of [x, extra]."""
        u = project(x, self.centered_kernel[: width(x)])
        if extra is not None:
            u += project(extra, self.centered_kernel[width(x) :])
        return self.lower(self.activate(u))

    def activate(self, u: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """silu(layernorm(u + bias)) for products u with the centered kernel."""
        return _norm_silu(u + self.centered_bias, *self.norm)

    def activate_even(self, u: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """activate(u) + activate(-u), which is even in u, from one product."""
        return self.activate(u) + self.activate(-u)

    def lower(self, a: Float[Array, "*batch hidden"]) -> Float[Array, "*batch outputs"]:
        return times(a, self.kernel_out) + self.bias_out


class Kernel(nn.Module):
    """The kernel of a linear map without bias; it becomes a parameter only where it is used."""

    shape: tuple[int, int]
    dtype: str | None = None

    @nn.compact
    def __call__(self) -> Float[Array, "features out"]:
        return cast(self.param("kernel", nn.initializers.lecun_normal(), self.shape), self.dtype)


class CanonicalMap(nn.Module):
    """c(x), which the group of x's neuron does not change: even under signs, of degree 0 under positive scales.

    Where no scale acts, c(x) = x. Computed in float32 or better, whatever the precision of x, and rounded back.
    (arXiv 2406.10685, section 5.)
    """

    inputs: int
    hidden: int
    kind: Canonical
    epsilon: float = 0.0

    def setup(self) -> None:
        self.rho = MLP(self.inputs, self.hidden, self.inputs)

    def project(self, x: Features, kernel: Float[Array, "features out"], groups: Groups) -> Float[Array, "*batch out"]:
        """c(x) @ kernel, with the two kernels multiplied first where rho's last meets this one."""
        first, *others = (self._under(scaling, x, kernel) for scaling in groups.scalings)
        for present, other in zip(groups.present[1:], others, strict=True):
            first = jnp.where(present, other, first)
        return first

    def _under(self, scaling: Scaling, x: Features, kernel: Array) -> Array:
        if not (scaling.has_signs or scaling.has_sizes) and self.kind is not Canonical.ABLATED:
            return project(x, kernel)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        return self._canonical(scaling, as_dtype(x, wide), kernel.astype(wide)).astype(kernel.dtype)

    def _canonical(self, scaling: Scaling, x: Features, kernel: Array) -> Array:
        if self.kind is Canonical.ABLATED:
            u = self.rho.activate(project(x, self.rho.centered_kernel))
            return times(u, self.rho.kernel_out @ kernel) + self.rho.bias_out @ kernel
        size = inverse_norm(value(x), self.epsilon) if scaling.has_sizes else 1
        if not scaling.has_signs:
            return project(x, kernel) * size
        if self.kind is Canonical.ABSOLUTE:
            return times(jnp.abs(value(x)), kernel) * size
        even = self.rho.activate_even(project(x, self.rho.centered_kernel) * size)
        return times(even, self.rho.kernel_out @ kernel) + 2 * self.rho.bias_out @ kernel


class ScaleInvariant(nn.Module):
    """ScaleInv(x) = phi([c(x), extra]) with further invariant features `extra` (arXiv 2406.10685, equation 8)."""

    inputs: int
    hidden: int
    outputs: int
    kind: Canonical
    epsilon: float = 0.0
    extra: int = 0
    output_bias: float = 0.0
    dtype: str | None = None

    def setup(self) -> None:
        self.canonical = CanonicalMap(self.inputs, self.hidden, self.kind, self.epsilon)
        self.phi = MLP(self.inputs + self.extra, self.hidden, self.outputs, self.output_bias, self.dtype)

    def __call__(self, x: Features, groups: Groups, extra: Joined | Array | None = None) -> Array:
        kernel = self.phi.centered_kernel
        u = self.canonical.project(x, kernel[: self.inputs], groups)
        if extra is not None:
            u += project(extra, kernel[self.inputs :])
        return self.phi.lower(self.phi.activate(u))


class ScaleEquivariant(nn.Module):
    """ScaleEq(x) = (x @ gamma) * ScaleInv(x): follows signs and positive scales (arXiv 2406.10685, equation 7).

    Inputs and outputs carry no group element, so that any map may act there: the `io` rule.
    """

    inputs: int
    hidden: int
    outputs: int
    kind: Canonical
    io: IO
    epsilon: float = 0.0
    extra: int = 0
    dtype: str | None = None

    def setup(self) -> None:
        self.gamma = Kernel((self.inputs, self.outputs), self.dtype)
        sizes = self.inputs, self.hidden, self.outputs
        self.gate = ScaleInvariant(*sizes, self.kind, self.epsilon, extra=self.extra, output_bias=1.0, dtype=self.dtype)
        bias = 1.0 if self.io is IO.GATE else 0.0
        free = functools.partial(MLP, self.inputs + self.extra, self.hidden, self.outputs, bias, self.dtype)
        self.end_input = free()
        self.end_output = free()

    def __call__(self, x: Features, rule: Rule, extra: Joined | Array | None = None) -> Array:
        if isinstance(rule, Groups):
            return project(x, self.gamma()) * self.gate(x, rule, extra)
        free = (self.end_input if rule is FixedLayer.INPUT else self.end_output)(x, extra)
        return project(x, self.gamma()) * free if self.io is IO.GATE else free


class ScaleEquivariantNet(nn.Module):
    """Several ScaleEq maps in sequence."""

    maps: tuple[ScaleEquivariant, ...]

    def __call__(self, x: Features, rule: Rule, extra: Joined | Array | None = None) -> Array:
        first, *others = self.maps
        y: Array = first(x, rule, extra)
        for layer in others:
            y = layer(y, rule, extra)
        return y
