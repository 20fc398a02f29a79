"""The sine of networks: as exact as promised on a CPU, odd to the last bit, and XLA's own everywhere else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_scalegmn as sg
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.network import sine


def arguments(lowest, highest, num=200_000):
    """Log-uniform numbers of both signs."""
    draw = np.random.default_rng(0)
    size = np.exp(draw.uniform(np.log(lowest), np.log(highest), num))
    return (size * draw.choice([-1, 1], num)).astype(np.float32)


def error(values, exact):
    """The largest error in units of what is promised: 2 units in the last place or 1e-7, whichever is more."""
    wrong = np.abs(np.asarray(values, np.float64) - exact)
    return (wrong / np.maximum(1e-7, 2 * np.spacing(np.abs(exact).astype(np.float32)))).max()


def derivative(x):
    return jax.jvp(sine, (x,), (jnp.ones_like(x),))[1]


def second_derivative(x):
    return jax.jvp(derivative, (x,), (jnp.ones_like(x),))[1]


@pytest.mark.parametrize(
    ("fn", "exact"),
    [(sine, np.sin), (derivative, np.cos), (second_derivative, lambda x: -np.sin(x))],
    ids=["value", "derivative", "second derivative"],
)
def test_values_and_derivatives_are_exact_to_two_units_in_the_last_place(fn, exact):
    # Multiples of pi/4 are where a reduction goes wrong first.
    edges = np.float32(np.pi / 4) * np.arange(-12_000, 12_000, dtype=np.float32)
    x = np.concatenate([arguments(1e-6, 1e4), edges, np.nextafter(edges, np.float32(0))])
    values = jax.jit(fn)(x)
    assert error(values, exact(x.astype(np.float64))) < 1
    # The measure sees a reduction with pi/2 in float32 alone.
    plain = np.sin(x - 2 * np.float32(np.pi) * np.round(x / np.float32(2 * np.pi)))
    assert error(plain, np.sin(x.astype(np.float64))) > 100


def test_it_is_odd_to_the_last_bit_and_keeps_zeros_nan_and_infinities():
    x = np.concatenate([arguments(1e-30, 3e38), np.float32([0, np.pi, 1e4])])
    fn = jax.jit(sine)
    positive, negative = np.asarray(fn(x)), np.asarray(fn(-x))
    np.testing.assert_array_equal(negative.view(np.uint32), (-positive).view(np.uint32))
    assert np.signbit(fn(np.float32([-0.0, 0.0]))).tolist() == [True, False]
    assert np.isnan(fn(np.float32([np.inf, -np.inf, np.nan]))).all()


def test_large_arguments_are_off_by_a_few_of_their_own_roundings_and_the_result_is_a_sine():
    x = arguments(1e4, 1e6)
    values = np.asarray(jax.jit(sine)(x), np.float64)
    assert (np.abs(values - np.sin(x.astype(np.float64))) <= 2.0**-22 * np.abs(x)).all()
    assert np.abs(jax.jit(sine)(arguments(1e4, 3e38))).max() <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_result_of_float32(dtype):
    x = jnp.asarray(np.linspace(-100, 100, 999), dtype)
    value, slope = jax.jvp(sine, (x,), (jnp.ones_like(x),))
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_array_equal(value, sine(x.astype(jnp.float32)).astype(dtype))


def test_gradients_of_gradients_under_vmap_and_scan():
    """sin(w x) applied twice, differentiated twice by x, against float64 of NumPy."""
    w, x = np.float32([0.5, 30.0]), np.linspace(-2, 2, 5, dtype=np.float32)

    def twice(w, x):
        return jax.lax.scan(lambda x, _: (sine(w * x), None), x, length=2)[0]

    curvature = jax.jit(jax.vmap(jax.vmap(jax.grad(jax.grad(twice, 1), 1), (None, 0)), (0, None)))(w, x)
    w, x = np.meshgrid(w.astype(float), x.astype(float), indexing="ij")
    inner, outer = np.sin(w * x), np.sin(w * np.sin(w * x))
    exact = -(w**4) * np.cos(w * x) ** 2 * outer - w**3 * np.sin(w * x) * np.cos(w * inner)
    np.testing.assert_allclose(curvature, exact, rtol=1e-3, atol=1e-5 * np.abs(exact).max())


def test_only_programs_for_a_cpu_in_float32_have_the_polynomial():
    def program(platform, fn, x):
        return jax.jit(fn).trace(x).lower(lowering_platforms=(platform,)).as_text()

    x = jax.ShapeDtypeStruct((3, 2), "float32")
    both = jax.vmap(jax.value_and_grad(lambda x: sine(x).sum()))
    for platform, has_sine in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = program(platform, both, x)
        assert ("stablehlo.sine" in text, "stablehlo.cosine" in text) == (has_sine, has_sine)
        assert ("bitcast_convert" in text) != has_sine
        assert not {"stablehlo.case", "stablehlo.if"} & set(text.replace('"', " ").split())  # chosen before it runs
    with jax.disable_jit():
        assert float(sine(jnp.float32(0.5))) == pytest.approx(math.sin(0.5), abs=1e-7)
    with jax.enable_x64(True):
        wide = np.linspace(-1e5, 1e5, 9)
        assert "stablehlo.sine" in program("cpu", sine, jax.ShapeDtypeStruct((3,), "float64"))
        np.testing.assert_allclose(sine(jnp.asarray(wide)), np.sin(wide), rtol=1e-12)


def test_a_traced_siren_has_sign_symmetry():
    siren = sg.siren((2, 4, 3, 1))
    params = sg.network.init(siren, jax.random.key(0), initialization=sg.network.near_zero)
    x = jnp.linspace(-1, 1, 6).reshape(3, 2)

    def apply(params, x):
        return jax.vmap(lambda x: sg.network.apply(siren, params, x))(x)

    arch, notes = sg.infer(apply, params, x)
    assert [(neurons.width, neurons.scaling) for neurons in arch.hidden] == [(4, Scaling.SIGN), (3, Scaling.SIGN)]
    assert notes == ()
    values = sg.network.activations(arch, params, x[0])
    np.testing.assert_allclose(
        values["Dense_0"][0], x[0] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], rtol=1e-5
    )
