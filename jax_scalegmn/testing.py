"""Checks for your own networks and models: is a model equivariant, is an architecture described correctly?

Each draws random group elements, compares, and raises an AssertionError that names what is wrong; each returns the
largest deviation that it saw, so that it can be reported too.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Axis, Scaling
from jax_scalegmn.types import Key, Params

__all__ = ["assert_equivariant", "assert_function_preserved", "assert_invariant"]


@stacks.any_container("params", calls=("fn",))
def assert_invariant(
    arch: Architecture,
    fn: Callable[[Params], Any],
    params: Params,
    key: Key | None = None,
    *,
    tolerance: float = 1e-5,
    **options: Any,
) -> float:
    """Raises unless fn(act(Q, params)) = fn(params) for random group elements Q.

    Args:
      arch: The architecture of the network that `fn` reads.
      fn: A function from one network's params to arrays, like an encoder.
      params: The network.
      key: A random key; it is consumed. None for jax.random.key(0).
      tolerance: The largest deviation that any output array may have, relative to its own largest entry.
      **options: permute, scale and log_scale_std of `symmetry.random`, and `samples`, the number of elements (8). A
        log_scale_std of 4.6 draws positive scales from 1e-6 to 1e6 (three standard deviations).

    Returns:
      The largest relative deviation.

    Raises:
      AssertionError: If a deviation exceeds the tolerance or an output is not finite.
      ValueError: If params do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> deviation = sg.testing.assert_invariant(arch, lambda p: abs(p["Dense_0"]["kernel"]).sum(), params)
    >>> sg.testing.assert_invariant(arch, lambda p: p["Dense_0"]["kernel"].sum(), params)
    Traceback (most recent call last):
    ...
    AssertionError: Not invariant under the group of 'mlp 2-3-1 tanh' ...
    """
    return _assert_commutes(arch, fn, lambda _, out: out, params, key, tolerance, "invariant", **options)


@stacks.any_container("params", calls=("fn",))
def assert_equivariant(
    arch: Architecture,
    fn: Callable[[Params], Params],
    params: Params,
    key: Key | None = None,
    *,
    tolerance: float = 1e-5,
    **options: Any,
) -> float:
    """Raises unless fn(act(Q, params)) = act(Q, fn(params)) for random group elements Q.

    Args:
      arch: The architecture of the networks that `fn` reads and returns.
      fn: A function from one network's params to params of the same architecture, like an editor.
      params: The network.
      key: A random key; it is consumed. None for jax.random.key(0).
      tolerance: As in `assert_invariant`.
      **options: As in `assert_invariant`.

    Returns:
      The largest relative deviation.

    Raises:
      AssertionError: If a deviation exceeds the tolerance or an output is not finite.
      ValueError: If params do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> deviation = sg.testing.assert_equivariant(arch, lambda p: jax.tree.map(jax.numpy.sin, p), params)
    >>> sg.testing.assert_equivariant(arch, lambda p: jax.tree.map(jax.numpy.exp, p), params)
    Traceback (most recent call last):
    ...
    AssertionError: Not equivariant under the group of 'mlp 2-3-1 tanh' ...
    """

    def moved(element: symmetry.Element, out: Any) -> Any:
        return symmetry.act(arch, element, out)

    return _assert_commutes(
        arch, lambda some: stacks.to_dict(fn(some)), moved, params, key, tolerance, "equivariant", **options
    )


@stacks.any_container("params", calls=("apply",))
def assert_function_preserved(
    arch: Architecture,
    apply: Callable[..., Any],
    params: Params,
    inputs: Any = None,
    key: Key | None = None,
    *,
    tolerance: float = 1e-5,
    samples: int = 8,
    log_scale_std: float = 1.0,
) -> float:
    """Raises unless the network computes the same function after random elements of its group act on it.

    This is the check of a hand-written `Architecture`. Where the function changes, the error names the neuron layers
    and parameters whose description is wrong: the group acts on one layer at a time, with one axis described
    differently.

    A description holds for all params, and the zeros and ones of a fresh network hide errors: arrays whose entries are
    all equal are replaced, for the check, by their value times random factors between 0.5 and 1.5 (0 by 0.1 to 0.3).

    Args:
      arch: The description to check.
      apply: The network's own function, (params, inputs) -> outputs. Without inputs: params -> outputs.
      params: The network.
      inputs: Several random examples, as `apply` takes them. None where `apply` holds them itself.
      key: A random key; it is consumed. None for jax.random.key(0).
      tolerance: The largest deviation that the outputs may have, relative to their largest entry.
      samples: How many group elements are tried.
      log_scale_std: As in `symmetry.random`; 4.6 draws positive scales from 1e-6 to 1e6 (three standard deviations).

    Returns:
      The largest relative deviation.

    Raises:
      AssertionError: If a deviation exceeds the tolerance or an output is not finite.
      ValueError: If params do not fit the architecture.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")  # but the network below computes a sigmoid, which is not odd
    >>> def apply(params, x):
    ...     hidden = jax.nn.sigmoid(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    ...     return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.testing.assert_function_preserved(arch, apply, params, jax.numpy.ones((5, 2)))
    Traceback (most recent call last):
    ...
    AssertionError: 'mlp 2-3-1 tanh' does not describe this function: ... ['hidden_0']...
    """
    architecture.check_params(arch, params)
    params = _without_constants(params)
    fn = apply if inputs is None else lambda moved: apply(moved, inputs)
    expected = fn(params)
    worst = 0.0
    for sample_key in _keys(key, samples):
        element = symmetry.random(arch, sample_key, log_scale_std=log_scale_std)
        deviation = _deviation(fn(symmetry.act(arch, element, params)), expected)
        if not deviation <= tolerance:
            layers = [n.name for n in arch.hidden if _breaks(arch, fn, params, element, n.name, tolerance)]
            suspects = [
                description for name in layers for description in _suspects(arch, fn, params, element, name, tolerance)
            ]
            raise AssertionError(
                f"{arch.name!r} does not describe this function: a group element changes the output by {deviation:.2e} "
                f"of its size (tolerance {tolerance:.0e}). Neuron layers whose group acts wrongly: {layers}. "
                f"{_advice(suspects)}"
            )
        worst = max(worst, deviation)
    return worst


# --- private ------------------------------------------------------------------------------------------------------


def _assert_commutes(
    arch: Architecture,
    fn: Callable[[Params], Any],
    moved: Callable[[symmetry.Element, Any], Any],
    params: Params,
    key: Key | None,
    tolerance: float,
    word: str,
    *,
    samples: int = 8,
    permute: bool = True,
    scale: bool = True,
    log_scale_std: float = 1.0,
) -> float:
    architecture.check_params(arch, params)
    out = fn(params)
    worst = 0.0
    for index, sample_key in enumerate(_keys(key, samples)):
        element = symmetry.random(arch, sample_key, permute=permute, scale=scale, log_scale_std=log_scale_std)
        deviation = _deviation(fn(symmetry.act(arch, element, params)), moved(element, out))
        if not deviation <= tolerance:
            raise AssertionError(
                f"Not {word} under the group of {arch.name!r} (permute={permute}, scale={scale}): element {index} "
                f"deviates by {deviation:.2e} of the largest entry, more than {tolerance:.0e}."
            )
        worst = max(worst, deviation)
    return worst


def _without_constants(params: Params) -> Any:
    """Params in which no array is constant: zeros and ones of a fresh network hide what the group does to them."""
    rng = np.random.default_rng(0)

    def spread(leaf: Any) -> Any:
        value = np.asarray(leaf)
        first = value.flat[0] if value.size else 0
        if not (value == first).all() or (value.size < 2 and first not in (0, 1)):
            return leaf
        factor = rng.uniform(0.5, 1.5, value.shape)  # positive, for variances
        return jnp.asarray((first if first != 0 else 0.2) * factor, value.dtype)

    return jax.tree.map(spread, params)


def _keys(key: Key | None, count: int) -> Key:
    return jax.random.split(jax.random.key(0) if key is None else key, count)


def _deviation(got: Any, expected: Any) -> float:
    """The largest deviation of any array relative to its largest entry; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        size = float(jnp.abs(b).max())
        gap = float(jnp.abs(a - b).max())
        worst = max(worst, gap / size if size > 0 else gap)
    return worst


def _only(arch: Architecture, element: symmetry.Element, name: str) -> symmetry.Element:
    """The element's action on one neuron layer alone."""
    rest = symmetry.identity(arch)
    return symmetry.Element(
        rest.permutation | {name: element.permutation[name]}, rest.scale | {name: element.scale[name]}
    )


def _breaks(
    arch: Architecture,
    fn: Callable[[Params], Any],
    params: Params,
    element: symmetry.Element,
    name: str,
    tolerance: float,
) -> bool:
    changed = fn(symmetry.act(arch, _only(arch, element, name), params))
    return not _deviation(changed, fn(params)) <= tolerance


def _suspects(
    arch: Architecture,
    fn: Callable[[Params], Any],
    params: Params,
    element: symmetry.Element,
    name: str,
    tolerance: float,
) -> list[str]:
    """The single corrections of an axis's power, on one layer, that make the description right."""
    corrections = []
    for index, parameter in enumerate(arch.parameters):
        for position, axis in enumerate(parameter.axes):
            if not (isinstance(axis, Axis) and axis.neurons == name):
                continue
            for power, unsigned in _powers(arch, parameter, axis) - {(axis.power, axis.unsigned)}:
                axes = list(parameter.axes)
                axes[position] = dataclasses.replace(axis, power=power, unsigned=unsigned)
                fixed = dataclasses.replace(parameter, axes=tuple(axes))
                parameters = (*arch.parameters[:index], fixed, *arch.parameters[index + 1 :])
                other = dataclasses.replace(arch, parameters=parameters)
                if not _breaks(other, fn, params, element, name, tolerance):
                    corrections.append(
                        f"params{parameter} axis {position} ({name!r}) should have power {_shown(power, unsigned)}, "
                        f"not {_shown(axis.power, axis.unsigned)}"
                    )
    return corrections


def _powers(arch: Architecture, parameter: architecture.Parameter, axis: Axis) -> set[tuple[int, bool]]:
    """What an axis can have, (power, unsigned): a kernel's first neuron axis is read, its second is fed."""
    powers = [-1, 1]
    if len(parameter.neuron_axes) == 2:
        powers = [-1] if axis is parameter.neuron_axes[0] else [1]
    # With signs alone |q| ** power is q ** 0, with positive scales alone q ** power.
    apart = arch.neuron_layer(axis.neurons).scaling is Scaling.NONZERO
    return {(0, False), *itertools.product(powers, (False, True) if apart else (False,))}


def _shown(power: int, unsigned: bool) -> str:
    return f"{power} (unsigned)" if unsigned else str(power)


def _advice(suspects: list[str]) -> str:
    if suspects:
        return f"One change each that would be right: {'; '.join(suspects)}."
    return "No single power explains it: a parameter of these layers may be missing, or their Scaling too large."
