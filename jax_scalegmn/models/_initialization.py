"""The first variables of a model, without the compilation of all that it computes."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.extend import core
from jax.interpreters import partial_eval

from jax_scalegmn import stacks
from jax_scalegmn.types import Key


def init(model: nn.Module, key: Key, example: Any, *, method: str | None = None) -> Any:
    """The variables of a model before training: those of `model.init`, in a fraction of the time.

    `model.init` computes the model operation by operation. Under `jax.jit` nothing but the random draws is left, and
    on CPU each of the hundreds of draws in one program is compiled anew, for longer than the model itself. Here every
    shape that is drawn is compiled once, and what reads `example`, if anything does, is one program.

    Args:
      model: A linen module.
      key: What the variables are drawn from.
      example: What the model reads: one network, in any container, or one graph.
      method: The name of the method that reads it; None for `__call__`.

    Returns:
      The variables, equal to `model.init(key, example, method=method)`, bit for bit where they do not depend on
      `example` and to rounding where they do.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.Encoder(sg.ScaleGMN(arch, features=4, num_layers=1), latent=3)
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> variables = sg.models.init(model, jax.random.key(1), params)
    >>> model.apply(variables, params).shape
    (3,)
    """
    arrays = stacks.to_dict(example)
    closed, shapes = jax.make_jaxpr(
        lambda key, arrays: model.init(key, stacks.like(example, arrays), method=method), return_shape=True
    )(key, arrays)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
    values = (*closed.consts, key, *jax.tree.leaves(arrays))
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))
    # Two parts: what is random and needs no example, and all else, which is given what the first part drew.
    read = _reached(jaxpr.eqns, jaxpr.invars[1:])
    random = _reached(jaxpr.eqns, jaxpr.invars[:1]) - read
    program = functools.partial(_evaluate, jaxpr, known)
    draws = [eqn for eqn in jaxpr.eqns if not read.intersection(eqn.outvars)]
    others = [eqn for eqn in jaxpr.eqns if not random.intersection(eqn.outvars)]
    outputs = list(dict.fromkeys(_variables(jaxpr.outvars)))
    wanted = {*outputs, *(var for eqn in others for var in _variables(eqn.invars))}
    drawn = [var for eqn in draws for var in eqn.outvars if var in random & wanted]
    known |= zip(drawn, program(draws, drawn, compiled=False), strict=True)
    rest = [var for var in outputs if var not in known]
    known |= zip(rest, program(others, rest, compiled=True), strict=True)
    found = [known[atom] if isinstance(atom, core.Var) else atom.val for atom in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


# --- private ------------------------------------------------------------------------------------------------------


def _variables(atoms: Iterable[core.Var | core.Literal]) -> list[core.Var]:
    """All but the literals."""
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _reached(eqns: Sequence[core.JaxprEqn], sources: Iterable[core.Var]) -> set[core.Var]:
    """The sources, and all that is computed from them."""
    reached = set(sources)
    for eqn in eqns:
        if reached.intersection(_variables(eqn.invars)):
            reached.update(eqn.outvars)
    return reached


def _evaluate(
    whole: core.Jaxpr, known: Mapping[Any, Any], eqns: Sequence[core.JaxprEqn], wanted: Sequence[Any], *, compiled: bool
) -> list[Any]:
    """The values of variables by those of the equations that they need: in one program, or equation by equation."""
    given, unnamed = list(known), whole.debug_info.with_unknown_names()
    part = whole.replace(constvars=(), invars=given, outvars=wanted, eqns=eqns, debug_info=unnamed)
    jaxpr, used = partial_eval.dce_jaxpr(part, True)
    compute = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
    return (jax.jit(compute) if compiled else compute)(*(known[var] for var in itertools.compress(given, used)))
