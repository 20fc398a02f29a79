"""The description of a network, read off its function: `infer` traces it and finds its neuron layers and their groups.

An abstract interpretation of the jaxpr. Along every axis of every value stand neuron layers or none (`segments`); every
axis of a parameter begins as a layer of its own, operations make layers the same, cut them or fix them (`operations`,
`shapes`), and relate how values follow a rescaling (`elementwise`), which is solved layer by layer (`powers`). What
has no such rule is fixed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn.architecture import Architecture, describe
from jax_scalegmn.inference import _operations
from jax_scalegmn.inference._assembly import Array, assemble
from jax_scalegmn.inference._reading import Reading, Value, of_numbers
from jax_scalegmn.inference._segments import Segment
from jax_scalegmn.types import Params


class Inference(NamedTuple):
    """What `infer` found.

    Attributes:
      arch: the description. Its `layers` are empty: the function that was given computes the network.
      notes: for every axis of an array that was left fixed, or whose layer's group was made smaller, a sentence that
        says which and which operation forced it. Inputs and outputs, which are always fixed, have none.
    """

    arch: Architecture
    notes: tuple[str, ...]


def infer(apply_fn: Callable[[Any, Any], Any], params: Params, example_input: Any) -> Inference:
    """The architecture of the network that `apply_fn(params, example_input)` computes.

    Dense and convolutional layers, biases, normalizations, poolings, flattening, activations, gates, residual sums and
    concatenations are understood, in whatever way they are written; what cannot be proved stays fixed, so that the
    group is never wrong, at worst too small. Nothing is computed: shapes are enough.

        found = inference.infer(lambda params, x: model.apply({"params": params}, x), params, x)
        print(found.arch.hidden, *found.notes, sep="\\n")
        testing.assert_function_preserved(found.arch, apply_fn, params, x)

    Args:
      apply_fn: any traceable function, with parameters in evaluation mode: no dropout, stored batch statistics.
      params: nested mappings of arrays, or of `jax.ShapeDtypeStruct`. With Flax's batch_stats:
        `network.merge_variables(variables)` and a function that takes them apart by `network.split_variables`.
      example_input: what the function takes, an array or a pytree of them, with any batch axes.

    Raises:
      ValueError: if params hold something else than arrays in mappings, if the function fails, or if nothing that it
        returns depends on the params.
    """
    name = getattr(apply_fn, "__name__", type(apply_fn).__name__)
    paths = _paths(params)
    try:
        closed = jax.make_jaxpr(apply_fn)(params, example_input)
    except Exception as error:
        shapes = {describe(path): np.shape(leaf) for path, leaf in paths.items()}
        raise ValueError(
            f"{name}(params, example_input) failed with {error!r}; expected a function that JAX can trace, of params "
            f"with shapes {shapes} and inputs {jax.tree.map(np.shape, example_input)}. Call it once yourself; close it "
            "over what is neither."
        ) from error
    reading = Reading()
    arrays = [_array(reading, path, leaf) for path, leaf in paths.items()]
    inputs = [_input(reading, leaf) for leaf in jax.tree.leaves(example_input)]
    outputs = _run(reading, closed.jaxpr, closed.consts, [*(array.value for array in arrays), *inputs])
    if not any(output.depends for output in outputs):
        raise ValueError(
            f"No output of {name} depends on the params {[describe(path) for path in paths]}; expected a function "
            "(params, inputs) -> outputs. It may be closed over its params."
        )
    for output in outputs:
        for row in output.axes:
            reading.layers.fix_output(row)
    # The group is not tried out on numbers here: there may be none, and `testing.assert_function_preserved`, a floor
    # above, does so and names the axis.
    return Inference(*assemble(f"inferred from {name}", reading, arrays))


# --- private ------------------------------------------------------------------------------------------------------


def _paths(params: Params) -> dict[tuple[str, ...], Any]:
    """The arrays by path, in the order in which JAX flattens them."""
    found: dict[tuple[str, ...], Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda node: node is None):
        where = f"params{jax.tree_util.keystr(keys)}"
        if not all(isinstance(key, jax.tree_util.DictKey) for key in keys):
            raise ValueError(
                f"{where} stands in a sequence or an object; expected nested mappings of arrays. Turn lists into "
                "mappings, and an NNX state by nnx.to_pure_dict."
            )
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, np.number):
            raise ValueError(
                f"{where} is a {type(leaf).__name__}; expected an array of numbers. Close the function over it."
            )
        found[tuple(str(key.key) for key in keys)] = leaf
    if not found:
        raise ValueError("params holds no array; expected nested mappings of arrays, like Flax's variables['params'].")
    return found


def _array(reading: Reading, path: tuple[str, ...], leaf: Any) -> Array:
    """A parameter, with a new layer along each axis and a power on it that is unknown."""
    rows = tuple((Segment(reading.layers.new(size), 1, (reading.unknown(),)),) for size in leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        for row in rows:
            reading.layers.fix(row, "its entries are integers")
    return Array(path, Value(tuple(leaf.shape), rows, depends=True, path=path))


def _input(reading: Reading, leaf: Any) -> Value:
    shape = np.shape(leaf)
    return Value(shape, tuple(reading.input_row(size) for size in shape))


# Operations that call a function, and where it stands among their parameters.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def _run(reading: Reading, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """The values of a jaxpr's outputs."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(of_numbers, consts), strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def value(atom: Any) -> Value:
        return of_numbers(atom.val) if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        called = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if called is None:
            results = _operations.apply(reading, eqn, operands)
        else:  # with its constants, or as an open jaxpr without them
            results = _run(reading, getattr(called, "jaxpr", called), getattr(called, "consts", ()), operands)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]
