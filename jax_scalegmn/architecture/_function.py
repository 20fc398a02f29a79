"""The user's own function as part of a description, with the places in its program where neurons have their values."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Operations that call a function, and the name of the parameter that holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


class Place(NamedTuple):
    """A value of a program that is a neuron layer's pre-activation, and the parameters that set its size.

    Attributes:
      neurons: The neuron layer's name.
      at: Which operation computes the value: its number in the program, and those inside the functions that are called.
      axis: The value's axis along which the neurons are.
      start: Where the layer begins along that axis.
      gains: The indices in `Architecture.parameters` of those that together multiply the value by a number, each with
        its power; empty if the value cannot be corrected.
      shift: The index of the bias that is added to the value; None without one.
      alone: Whether these parameters act nowhere else, so that REPAIR may change them.

    >>> from jax_scalegmn import architecture
    >>> architecture.Place("units", (0,), axis=1, start=0, gains=((0, 1),), shift=None).neurons
    'units'
    """

    neurons: str
    at: tuple[int, ...]
    axis: int
    start: int
    gains: tuple[tuple[int, int], ...]
    shift: int | None
    alone: bool = True

    @property
    def is_correctable(self) -> bool:
        """Whether there are parameters that multiply this value alone."""
        return bool(self.gains) and self.alone


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction:
    """A network's own function (params, inputs) -> outputs, as `infer` read it.

    Two are equal if they hold the same function object, read on inputs of the same shapes: such a value is static under
    `jax.jit`.

    Attributes:
      call: The function.
      inputs: The shape and type of every array of the inputs that it was traced with, as (shape, name of the type).
      operations: The names of the operations of its program, those of called functions included.
      places: Where its neurons have their pre-activations, for `network.activations` and REPAIR.
      centered: Where a vector of the params alone is subtracted, as a batch normalization does with its stored mean:
        `shift` is its index, and `gains` are empty.
      sums: Where a residual stream has its values after a sum; they cannot be corrected.
      replaced: The operations of the places whose values a sum replaces among the activations.

    >>> import jax.numpy as jnp
    >>> import jax_scalegmn as sg
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> arch = sg.infer(lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"], params, jnp.ones((5, 3))).arch
    >>> arch.function.inputs, [place.neurons for place in arch.function.places]
    ((((5, 3), 'float32'),), ['up'])
    """

    call: Callable[[Any, Any], Any]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    operations: tuple[str, ...]
    places: tuple[Place, ...] = ()
    sums: tuple[Place, ...] = ()
    replaced: frozenset[tuple[int, ...]] = frozenset()
    centered: tuple[Place, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedFunction) and self.call is other.call and self._rest() == other._rest()

    def __hash__(self) -> int:
        return hash((id(self.call), self._rest()))

    def _rest(self) -> tuple[Any, ...]:
        return self.inputs, self.operations, self.places, self.sums, self.replaced, self.centered


def called_program(eqn: Any) -> Any | None:
    """The program of the function that an operation of a jaxpr calls; None for all other operations.

    Args:
      eqn: The operation, an equation of a jaxpr.

    >>> import jax
    >>> from jax_scalegmn import architecture
    >>> program = jax.make_jaxpr(lambda x: jax.jit(jax.numpy.sin)(x) + 1)(1.0)
    >>> [architecture.called_program(eqn) is None for eqn in program.eqns]
    [False, True]
    """
    return eqn.params.get(_CALLS.get(eqn.primitive.name, ""))


def operations(program: Any) -> Iterator[str]:
    """Yields the names of a program's operations, each call followed by those of the function that it calls.

    Args:
      program: A jaxpr.

    >>> import jax
    >>> from jax_scalegmn import architecture
    >>> list(architecture.operations(jax.make_jaxpr(lambda x: jax.numpy.sin(x) + 1)(1.0)))
    ['sin', 'add']
    """
    for eqn in getattr(program, "jaxpr", program).eqns:
        yield eqn.primitive.name
        inner = called_program(eqn)
        if inner is not None:
            yield from operations(inner)
