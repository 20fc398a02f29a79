"""Products of many rows with one kernel: values and derivatives of `@`, and what their program for a CPU looks like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_scalegmn.models._products import times

SLOW = pytest.mark.slow


def plain(x, kernel):
    return x @ kernel


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def loss(product, x, kernel):
    """Of two products, so that the gradient of the first meets the second."""
    return jnp.sum(jnp.sin(product(jnp.tanh(product(x, kernel)), kernel[: kernel.shape[1]])) ** 2)


TRANSFORMS = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(f, (0, 1)),
    "of the rows alone": lambda f: jax.grad(f, 0),
    "of the kernel alone": lambda f: jax.grad(f, 1),
    "forward mode": lambda f: jax.jacfwd(f, (0, 1)),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f, 1), (0, 1)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f, 1), (0, 1)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f, 1), 1),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize(
    "shape", [pytest.param((5,), marks=SLOW), pytest.param((3, 5), marks=SLOW), (2, 3, 5)], ids=str
)
def test_derivatives_are_those_of_the_matrix_product(transform, shape):
    x, kernel = draw(*shape), draw(5, 5, seed=1)
    ours, theirs = (transform(functools.partial(loss, product))(x, kernel) for product in (times, plain))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [(0, None), *(pytest.param(axes, marks=SLOW) for axes in [(1, None), (None, 0), (None, 2), (0, 0), (2, 1)])],
    ids=str,
)
@pytest.mark.parametrize("order", ["vmap of gradient", "gradient of vmap"])
def test_many_at_once(axes, order):
    x, kernel = draw(4, 3, 5), draw(5, 5, seed=1)
    x = x if axes[0] is None else jnp.stack([x, 2 * x], axes[0])
    kernel = kernel if axes[1] is None else jnp.stack([kernel, 2 * kernel], axes[1])

    def compute(product):
        each = functools.partial(loss, product)
        if order == "vmap of gradient":
            return jax.jit(jax.vmap(jax.grad(each, (0, 1)), axes))(x, kernel)
        return jax.jit(jax.grad(lambda x, k: jax.vmap(each, axes)(x, k).sum(), (0, 1)))(x, kernel)

    for one, other in zip(compute(times), compute(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")], ids=str
)
def test_dtypes_are_promoted_as_in_the_matrix_product(dtypes):
    x, kernel = draw(8, 5, dtype=dtypes[0]), draw(5, 5, seed=1, dtype=dtypes[1])
    for product in (times, plain):
        assert product(x, kernel).dtype == jnp.promote_types(*dtypes)
        dx, dkernel = jax.grad(lambda *a, product=product: product(*a).astype(jnp.float32).sum(), (0, 1))(x, kernel)
        assert (dx.dtype, dkernel.dtype) == (x.dtype, kernel.dtype)


def test_the_gradient_of_a_kernel_is_exact_in_float64():
    with jax.enable_x64(True):
        x, kernel = draw(64, 5, dtype=jnp.float64), draw(5, 7, seed=1, dtype=jnp.float64)
        gradient = jax.grad(lambda k: (times(x, k) ** 2).sum())(kernel)
    np.testing.assert_allclose(gradient, 2 * np.asarray(x).T @ (np.asarray(x) @ np.asarray(kernel)), rtol=1e-12)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the program for a CPU")
def test_a_cpu_gets_the_rows_of_a_kernels_gradient_as_a_transposed_array():
    """The reason for an operation of its own: `x.T @ y` in place of a product that XLA turns around by itself."""
    x, kernel = jnp.ones((2, 64, 5)), jnp.ones((5, 7))

    def text(product):
        return jax.jit(jax.grad(lambda k: jnp.sin(jax.vmap(product, (0, None))(x, k)).sum())).lower(kernel).as_text()

    assert "optimization_barrier" in text(times)
    assert "tensor<5x128xf32>" in text(times)
    assert "optimization_barrier" not in text(plain)


def test_what_needs_no_derivative_is_not_multiplied():
    """Of a kernel that is fixed, the tangent is one product."""
    x, kernel = draw(8, 5), draw(5, 5, seed=1)
    jaxpr = jax.make_jaxpr(lambda x, dx: jax.jvp(lambda x: times(x, kernel), (x,), (dx,)))(x, x)
    names = [equation.primitive.name for equation in jaxpr.jaxpr.eqns]
    assert "times" not in names


@pytest.mark.parametrize("kind", ["varying", "explicit"])
def test_types_that_speak_of_devices_are_kept(kind):
    """Inside of `jax.shard_map`, whose types say over which axes an array varies, and with explicit shardings."""
    axes = {"varying": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(axes,))
    x, kernel = draw(4, 3, 5), draw(5, 5, seed=1)
    expected = jax.grad(functools.partial(loss, plain), 1)(x, kernel)
    gradient = jax.grad(functools.partial(loss, times), 1)
    if kind == "explicit":
        with jax.set_mesh(mesh):
            placed = (
                jax.device_put(x, NamedSharding(mesh, P("data"))),
                jax.device_put(kernel, NamedSharding(mesh, P())),
            )
            found = jax.jit(gradient)(*placed)
    else:
        found = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())(x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
