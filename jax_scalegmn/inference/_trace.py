"""Infers a network's description from its function: `infer` traces it and finds its neuron layers and their groups.

This is an abstract interpretation of the jaxpr. Every axis of a parameter starts as a neuron layer of its own
(`_segments`). Operations unify layers, cut them or fix them (`_operations`, `_shapes`), and relate how values follow a
rescaling (`_elementwise`). These equations are solved layer by layer (`_powers`), and the result is written as an
`Architecture` (`_assembly`). What has no rule is fixed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import stacks
from jax_scalegmn.architecture import Architecture, TracedFunction, called_program, describe, operations
from jax_scalegmn.inference import _operations, _places
from jax_scalegmn.inference._assembly import Leaf, assemble
from jax_scalegmn.inference._reading import Flow, Reading, Value, of_numbers
from jax_scalegmn.inference._segments import Segment
from jax_scalegmn.types import Params


class Inference(NamedTuple):
    """An inferred architecture, with notes on what was left out.

    Attributes:
      arch: The description. Its `layers` are empty; its `function` computes the network.
      notes: For every axis of an array that was left fixed, or whose layer's group was made smaller, a sentence with
        the reason and the operation. Inputs and outputs, which are always fixed, have none, unless another kernel
        reads the output.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> inference = sg.infer(lambda params, x: jnp.sort(x @ params["up"]) @ params["down"], params, jnp.ones((5, 3)))
    >>> inference.notes[0]
    "params['up'] axis 1 ('up'): fixed: `sort` reads it, an operation whose symmetry is not known."
    """

    arch: Architecture
    notes: tuple[str, ...]


def infer(apply_fn: Callable[[Any, Any], Any], params: Params, example_input: Any) -> Inference:
    """Infers the architecture of the network that `apply_fn(params, example_input)` computes.

    Dense and convolutional layers, biases, normalizations, poolings, flattening, activations, gates, residual sums and
    concatenations are understood, in whatever way they are written. What cannot be proved stays fixed, so the group is
    never wrong, at worst too small. Nothing is computed: the function is traced, and shapes are enough.
    `testing.assert_function_preserved` checks the result on numbers.

    Args:
      apply_fn: Any function (params, inputs) -> outputs that JAX can trace, in evaluation mode: no dropout, stored
        batch statistics.
      params: The network, of arrays or of `jax.ShapeDtypeStruct`, in any container that `stacks.to_dict` reads. For
        a module of Flax with batch_stats: `network.merge_variables(variables)`, and a function that separates them by
        `network.split_variables`.
      example_input: What the function takes, an array or a pytree of arrays, with any batch axes.

    Returns:
      The architecture, and notes on what was left fixed.

    Raises:
      ValueError: If params hold tuples or anything but arrays, if the function fails, or if nothing that it returns
        depends on the params.

    >>> import jax
    >>> from flax import linen as nn
    >>> import jax_scalegmn as sg
    >>> class Network(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         x = nn.relu(nn.Dense(4)(x))
    ...         return nn.Dense(2)(x)
    >>> x = jax.numpy.ones((5, 3))
    >>> params = jax.eval_shape(Network().init, jax.random.key(0), x)["params"]
    >>> inference = sg.infer(lambda params, x: Network().apply({"params": params}, x), params, x)
    >>> inference.arch.hidden
    (NeuronLayer(name='Dense_0', width=4, scaling=<Scaling.POSITIVE: 'positive'>),)
    >>> inference.notes
    ()
    """
    name = getattr(apply_fn, "__name__", type(apply_fn).__name__)
    container, params = params, stacks.to_dict(params)
    if params is not container:
        apply_fn = stacks.reader(apply_fn, container)
    paths = _paths(params)
    closed = _traced(name, apply_fn, params, example_input)
    reading = Reading()
    leaves = [_leaf(reading, path, array) for path, array in paths.items()]
    inputs = [_input(reading, array) for array in jax.tree.leaves(example_input)]
    outputs = _run(reading, closed.jaxpr, closed.consts, [*(leaf.value for leaf in leaves), *inputs])
    if not any(output.depends for output in outputs):
        raise ValueError(
            f"No output of {name} depends on the params {[describe(path) for path in paths]}; expected a function "
            "(params, inputs) -> outputs. It may be closed over its params."
        )
    _places.settle(reading, outputs)
    for output in outputs:
        for row in output.axes:
            reading.layers.fix_output(row)
    arrays = jax.tree.leaves(example_input)
    shapes = tuple((tuple(np.shape(array)), str(jnp.result_type(array))) for array in arrays)
    function = TracedFunction(apply_fn, shapes, tuple(operations(closed)))
    return Inference(*assemble(f"inferred from {name}", reading, leaves, function))


# --- private ------------------------------------------------------------------------------------------------------


def _traced(name: str, apply_fn: Callable[[Any, Any], Any], params: Params, example_input: Any) -> Any:
    """The function's jaxpr."""
    try:
        return jax.make_jaxpr(apply_fn)(*stacks.abstract((params, example_input)))
    except Exception as error:
        shapes = {describe(path): np.shape(leaf) for path, leaf in _paths(params).items()}
        raise ValueError(
            f"{name}(params, example_input) failed with {error!r}; expected a function that JAX can trace, of params "
            f"with shapes {shapes} and inputs {jax.tree.map(np.shape, example_input)}. Call it once yourself, and let "
            "it close over everything else that it needs."
        ) from error


def _paths(params: Params) -> dict[tuple[str, ...], Any]:
    """The arrays by path, in the order in which JAX flattens them."""
    arrays: dict[tuple[str, ...], Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda node: node is None):
        where = f"params{jax.tree_util.keystr(keys)}"
        if not all(isinstance(key, jax.tree_util.DictKey) for key in keys):
            raise ValueError(
                f"{where} is in a tuple; expected a module, or mappings and lists of arrays. Turn it into a list."
            )
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, np.number):
            raise ValueError(
                f"{where} is a {type(leaf).__name__}; expected an array of numbers. Close the function over it."
            )
        arrays[tuple(str(key.key) for key in keys)] = leaf
    if not arrays:
        raise ValueError("params holds no array; expected nested mappings of arrays, like Flax's variables['params'].")
    return arrays


def _leaf(reading: Reading, path: tuple[str, ...], array: Any) -> Leaf:
    """A parameter, with a new layer along each axis and an unknown degree on it."""
    rows = tuple((Segment(reading.layers.new(size), 1, (reading.unknown(),)),) for size in array.shape)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        for row in rows:
            reading.layers.fix(row, "its entries are integers")
    flow = Flow(unit=path, origins=frozenset({path}), whole=path)
    return Leaf(path, Value(tuple(array.shape), rows, depends=True, path=path, flow=flow))


def _input(reading: Reading, array: Any) -> Value:
    shape = np.shape(array)
    return Value(shape, tuple(reading.input_row(size) for size in shape), flow=Flow(data=True))


def _run(
    reading: Reading, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value], at: tuple[int, ...] = ()
) -> list[Value]:
    """Reads a jaxpr, and returns the values of its outputs; `at` is the operation that calls it."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(of_numbers, consts), strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def value(atom: Any) -> Value:
        return of_numbers(atom.val) if hasattr(atom, "val") else known[atom]

    live, clips = _live(jaxpr), set[int]()
    for index, eqn in enumerate(jaxpr.eqns):
        if not live[index]:  # nothing that it says of its neurons matters
            continue
        operands = [value(atom) for atom in eqn.invars]
        called, where = called_program(eqn), (*at, index)
        known_call = None if called is None else _operations.known_call(reading, eqn, operands)
        if known_call is not None:
            results = _places.follow(reading, eqn.primitive.name, where, operands, known_call)
        elif called is None:
            clips |= _odd_clip(jaxpr, index, operands, known)
            results = _operations.apply(reading, eqn, operands, clips=index in clips)
            results = _places.follow(reading, eqn.primitive.name, where, operands, results)
        else:  # a closed jaxpr with its constants, or an open one without
            inner = getattr(called, "jaxpr", called)
            results = _run(reading, inner, getattr(called, "consts", ()), operands, where)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _live(jaxpr: Any) -> list[bool]:
    """For every operation of a jaxpr whether an output depends on it."""
    needed = {id(var) for var in jaxpr.outvars}
    live = [False] * len(jaxpr.eqns)
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        live[index] = bool(eqn.effects) or any(id(var) in needed for var in eqn.outvars)
        if live[index]:
            needed |= {id(atom) for atom in eqn.invars}
    return live


# The two halves of a clip, in either order.
_OTHER_HALF = {"max": "min", "min": "max"}


def _odd_clip(jaxpr: Any, index: int, operands: Sequence[Value], known: dict[Any, Value]) -> set[int]:
    """The two operations of min(max(x, -c), c) if this is the first of them: together they are odd, alone they are not.

    Args:
      jaxpr: The program.
      index: The operation's number in it.
      operands: The operation's operands.
      known: The values of the program so far.
    """
    eqn = jaxpr.eqns[index]
    bounds = [operand.constant for operand in operands if operand.constant]
    if eqn.primitive.name not in _OTHER_HALF or len(bounds) != 1:
        return set()
    uses = [(i, e) for i, e in enumerate(jaxpr.eqns) if any(atom is eqn.outvars[0] for atom in e.invars)]
    if len(uses) != 1:
        return set()
    number, other = uses[0]
    if any(var is eqn.outvars[0] for var in jaxpr.outvars) or other.primitive.name != _OTHER_HALF[eqn.primitive.name]:
        return set()
    bound = next((atom for atom in other.invars if atom is not eqn.outvars[0]), None)
    symmetric = _constant(jaxpr, bound, known) == -bounds[0] and math.isfinite(bounds[0])
    return {index, number} if symmetric else set()


def _constant(jaxpr: Any, atom: Any, known: dict[Any, Value]) -> float | None:
    """The number that a value is, also if the program has yet to convert it."""
    if hasattr(atom, "val"):
        return of_numbers(atom.val).constant
    if atom in known:
        return known[atom].constant
    origin = next((eqn for eqn in jaxpr.eqns if any(var is atom for var in eqn.outvars)), None)
    if origin is None or origin.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
        return None
    return _constant(jaxpr, origin.invars[0], known)
