"""Never too large: the groups that are inferred for random programs keep their functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax import lax

from jax_scalegmn import inference, symmetry
from jax_scalegmn.architecture import Scaling

ACTIVATIONS = (
    *(jax.nn.relu, jnp.tanh, jnp.sin, jax.nn.gelu, jnp.abs, jax.nn.leaky_relu, jnp.square, jnp.cos, jnp.sign),
    *(jax.nn.sigmoid, jnp.cbrt, jax.nn.relu6, jnp.arcsinh, lambda h: h**3, lambda h: jnp.maximum(h, 0.3)),
    *(lambda h: jnp.minimum(h, 0), lambda h: jnp.sqrt(jnp.square(h)), lambda h: h / jnp.sqrt(1e-3 + h * h)),
)


def standardized(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)


def attended(h, _, query, key, value):
    return jax.nn.softmax(h @ query @ (h @ key).swapaxes(1, 2)) @ h @ value


def in_groups(h, _):
    runs = h.reshape(*h.shape[:2], 2, -1)
    return (runs - runs.mean((1, 3), keepdims=True)).reshape(h.shape)


def convolved(h, _, kernel):
    return lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def depthwise(h, _, kernel):
    numbers = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(h, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=h.shape[2])


# (the shapes of the parameters for values [batch, places, width], what is computed of a value and one of its width)
STEPS = (
    *[(lambda w: [(w, 4)], lambda h, _, kernel: h @ kernel)] * 4,
    *[(lambda w: [], lambda h, _, act=act: act(h)) for act in ACTIVATIONS],
    (lambda w: [(w,)], lambda h, _, bias: h + bias),
    (lambda w: [(w,)], lambda h, _, gain: h * gain),
    (lambda w: [(4, w)], lambda h, _, places: h + places),
    *[(lambda w: [], op) for op in (jnp.add, jnp.multiply, jnp.maximum, lambda h, g: jnp.where(h > g, h, h + g))],
    (lambda w: [], lambda h, g: jnp.concatenate([h, g], -1)),
    (lambda w: [], lambda h, g: jnp.concatenate([h, 2 * g], 1)[:, 2:6]),
    (lambda w: [], lambda h, _: standardized(h)),
    (lambda w: [], lambda h, _: h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-3)),
    (lambda w: [], lambda h, _: jax.nn.softmax(h)),
    (lambda w: [], lambda h, _: h - h.max(-1, keepdims=True)),
    (lambda w: [], lambda h, _: h + h.mean(1, keepdims=True)),
    (lambda w: [], lambda h, _: h.cumsum(1)),
    (lambda w: [], lambda h, _: h.cumsum(2)),
    (lambda w: [], lambda h, _: jnp.sort(h)),
    (lambda w: [], lambda h, _: jnp.roll(h, 1, -1)),
    (lambda w: [], lambda h, _: h + h[..., :1]),
    (lambda w: [], lambda h, _: h[..., w_half(h) :]),
    (lambda w: [], lambda h, _: jnp.pad(h, ((0, 0), (0, 0), (1, 2)))),
    (lambda w: [], lambda h, _: jnp.pad(h, ((0, 0), (0, 0), (1, 0)), constant_values=0.5)),
    (lambda w: [], lambda h, _: jnp.tile(h, (1, 1, 2))),
    (lambda w: [], lambda h, _: jnp.repeat(h, 2, -1)),
    (lambda w: [(4 * w, 3)], lambda h, _, kernel: h + (h.reshape(len(h), -1) @ kernel).sum(-1)[:, None, None]),
    (lambda w: [(w, 5), (w, 5)], lambda h, _, value, gate: (h @ value) * jax.nn.relu(h @ gate)),
    (lambda w: [(w, 4), (w, 4), (w, 3)], attended),
    (lambda w: [(w, 5), (5,)], lambda h, _, k, gain: h @ (k * gain / jnp.linalg.norm(k, axis=0))),
    (lambda w: [(w, 5)], lambda h, _, kernel: jnp.tanh(h @ kernel) @ kernel.T),
    (lambda w: [(3, w, 4)], convolved),
    (lambda w: [(3, 1, w)], depthwise),
)
HALVING = (
    (lambda w: [], lambda h, _: jax.nn.glu(h)),
    (lambda w: [], lambda h, _: h[..., ::2] + h[..., 1::2]),
    (lambda w: [], lambda h, _: jnp.add(*jnp.split(h, 2, -1))),
    (lambda w: [], lambda h, _: h.reshape(*h.shape[:2], 2, -1).sum(2)),
    (lambda w: [], lambda h, _: h.reshape(*h.shape[:2], -1, 2).max(3)),
    (lambda w: [], in_groups),
)


def w_half(h):
    return h.shape[-1] // 2


def program(seed: int):
    """A random function of params and [batch, places, 3], its params and an input."""
    rng = np.random.default_rng(seed)
    params, steps = {}, []

    def draw(*shape):
        params[f"p{len(params)}"] = jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))
        return f"p{len(params) - 1}"

    def apply(params, x):
        values = [x]
        for function, i, j, names in steps:
            values.append(function(values[i], values[j], *(params[name] for name in names)))
        return values[-1]

    x = jnp.asarray(rng.normal(size=(2, 4, 3)))
    shapes = [x.shape]
    for last in [False] * int(rng.integers(3, 11)) + [True]:
        i = len(shapes) - 1 if last else int(rng.integers(max(0, len(shapes) - 3), len(shapes)))
        width = shapes[i][-1]
        j = int(rng.choice([j for j, shape in enumerate(shapes) if shape[-1] == width]))
        known = STEPS if width % 2 else STEPS + HALVING
        needs, function = STEPS[0] if last else known[rng.integers(len(known))]
        steps.append((function, i, j, [draw(*shape) for shape in needs(width)]))
        # A function of its own each time: JAX remembers the shapes of one that it has traced.
        shapes.append(jax.eval_shape(lambda p, x: apply(p, x), params, x).shape)
    return apply, params, x


@functools.partial(jax.jit, static_argnums=1)
def moved_outputs(arch, apply, params, x, elements):
    """The outputs of the network moved by each of a stack of elements, in one program."""
    return jax.lax.map(lambda element: apply(symmetry.act(arch, element, params), x), elements)


def change(arch, apply, params, x) -> float:
    """The largest relative change of the outputs under two random elements of the described group."""
    if not arch.hidden:
        return 0.0
    elements = support.random_elements(arch, 2, dtype="float64")
    elements = jax.tree.map(lambda one, more: np.concatenate([one[None], more]), symmetry.identity(arch), elements)
    outputs = np.asarray(moved_outputs(arch, apply, params, x, elements))
    assert np.isfinite(outputs).all()
    size = np.abs(outputs[0]).max() or 1.0
    return np.abs(outputs[1:] - outputs[0]).max() / size


def assert_groups_keep_functions(seeds):
    """Returns how many layers of each group there were."""
    counts = dict.fromkeys(Scaling, 0)
    for seed in seeds:
        with support.precision("float64"):
            apply, params, x = program(seed)
            arch = inference.infer(apply, params, x).arch
            assert change(arch, apply, params, x) < 1e-7, seed
        for neurons in arch.hidden:
            counts[neurons.scaling] += 1
    return counts


def test_groups_of_random_programs_keep_their_functions():
    counts = assert_groups_keep_functions(range(12))
    signs, sizes = (sum(counts[s] for s in Scaling if getattr(s, has)) for has in ("has_signs", "has_sizes"))
    assert min(counts[Scaling.PERMUTATION], counts[Scaling.NONZERO], signs, sizes) > 0, counts


@pytest.mark.slow
def test_groups_of_many_random_programs_keep_their_functions():
    assert_groups_keep_functions(range(12, 90))


def test_groups_that_are_too_large_are_noticed():
    """The control: with positive scales in place of what was inferred, most programs change."""
    changed = tried = 0
    for seed in range(8):
        with support.precision("float64"):
            apply, params, x = program(seed)
            arch = inference.infer(apply, params, x).arch
            if all(neurons.scaling is Scaling.POSITIVE for neurons in arch.hidden):
                continue
            neurons = tuple(
                dataclasses.replace(n, scaling=Scaling.POSITIVE) if n in arch.hidden else n for n in arch.neuron_layers
            )
            tried += 1
            changed += change(dataclasses.replace(arch, neuron_layers=neurons), apply, params, x) > 1e-7
    assert changed > tried / 2, (changed, tried)
