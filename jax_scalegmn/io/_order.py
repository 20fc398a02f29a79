"""The order in which a network applies the modules of a state_dict: told by shapes, the names, or the caller.

PyTorch registers modules in an order that nearly always is the one in which they are applied. Whatever sorts names
(safetensors, pytrees, `dict(sorted(...))`) loses it, and modules of equal shape then fit each other's places. So an
order is only used if something tells it; otherwise it is asked for.
"""

import difflib
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

from jax_scalegmn import _bounded
from jax_scalegmn.io import _order_search, _precedence

_MAX_LOOSE = 80  # modules that an error compares with each other
_MAX_PAIRS = 40  # that an error looks at one by one
CURE = (
    "Name them in the order in which the network applies them: order=[...] in Python, --order first,second,... on the "
    "command line. Or save the state_dict with torch.save, which keeps the order, or give the modules numbers."
)


def find(
    fits: Sequence[Set[str]], modules: Sequence[str], *, told: bool, norms: Set[str], order: Sequence[str] | None
) -> list[str] | None:
    """The modules in the order of the layers, if that order is known.

    Used in turn: `order`; the order of `modules` if it is `told` and no numbers in the names contradict it; the shapes
    if they leave one order; and the shapes and the numbers in the names (`fc1` before `fc2`, `bn1` next to `conv1`) if
    these leave one. A name without a number tells nothing.

    Args:
      fits: For every layer, the modules whose tensors fit it.
      modules: All modules, in the order of the state_dict.
      told: Whether that order means anything, as `is_told` says.
      norms: The modules that are normalizations.
      order: Names of some or all modules, in their order.

    Returns:
      The names, one for every layer; None if no order fits the shapes.

    Raises:
      ValueError: If `order` names other modules or fits no order, or if several orders are possible.
    """
    if order is not None:
        _check_names(order, modules)
    where = _precedence.places(modules)
    in_file = all(module in fitting for module, fitting in zip(modules, fits, strict=True))
    if order is None and told and in_file and _precedence.agrees(modules, where):
        return list(modules)
    by_shape = _order_search.first_two(fits, _precedence.graph(modules, {}, numbers=False), {})
    if not by_shape:
        return None
    if len(by_shape) == 1 and order is None:
        return by_shape[0]
    neighbors = _neighbors(modules, norms)
    possible = _order_search.first_two(fits, _precedence.graph(modules, where, order or ()), neighbors)
    if order is not None and not possible:
        possible = _order_search.first_two(fits, _precedence.graph(modules, {}, order, numbers=False), {})
        if not possible:
            raise ValueError(f"order {list(order)} does not fit: the shapes of these modules allow other orders only.")
    contradiction = order is None and told and in_file
    if len(possible) == 1 and not contradiction:
        return possible[0]
    if len(possible) < 2:  # the numbers do not count
        where, order, neighbors = {module: [] for module in modules}, (), {}
    open_modules = _open(fits, modules, where, order or (), neighbors)
    alike = [module for module in modules if module in open_modules]
    reason = (
        "the order of the state_dict contradicts the numbers in their names or the shapes"
        if told
        else "the names are sorted, as by safetensors and pytrees, and have no numbers that tell their order"
    )
    raise ValueError(
        f"Modules {_bounded.short(alike, 500)} have equal shapes, and their order is unknown: {reason}. {CURE}"
    )


def is_told(state_dict: Mapping[str, Any]) -> bool:
    """Whether the names stand in an order that nothing has sorted, so that it is the one of the modules.

    PyTorch registers a weight before its bias. Names in alphabetical order, biases first, were sorted by a format or
    a pytree; so were names that are sorted within each dtype, as safetensors has them, or within weights and biases.
    """
    keys = list(state_dict)
    by_dtype: dict[str, list[str]] = {}
    for key, value in state_dict.items():
        by_dtype.setdefault(str(getattr(value, "dtype", "")), []).append(key)
    modules = [key.rpartition(".")[0] for key in keys]
    if len([name for name, _ in itertools.groupby(modules)]) > len(set(modules)):  # weights here, biases there
        by_kind: dict[str, list[str]] = {}
        for key in keys:
            by_kind.setdefault(key.rpartition(".")[-1], []).append(key)
        if all(map(_is_sorted, by_kind.values())):
            return False
    return not all(map(_is_sorted, by_dtype.values()))


def chain(shapes: Mapping[str, tuple[int, ...]], *, told: bool, order: Sequence[str] | None) -> list[str] | None:
    """The modules of a chain of dense layers, each of which has the inputs that the one before it has outputs.

    Modules of one shape are interchangeable here: only the chain's widths are found.

    Args:
      shapes: The shape [in, out] of every module's kernel.
      told: As in `find`.
      order: As in `find`.

    Returns:
      The names; None if they form no chain.

    Raises:
      ValueError: If `order` names other modules or is no chain, or if chains of different widths are possible.
    """
    modules = list(shapes)
    if order is not None:
        _check_names(order, modules)
    elif told and _is_chain(shapes, modules):
        return modules
    where, fits = _precedence.places(modules), [set(modules)] * len(modules)
    for numbers in (False, True) if order is None else (False,):
        graph = _precedence.graph(
            modules, where, order or (), numbers=numbers, key=lambda module: (shapes[module], module)
        )
        chains = _order_search.first_two(fits, graph, {}, shapes)
        if len(chains) == 1:
            return chains[0]
    if not chains:
        return None
    raise ValueError(
        f"{_bounded.short(modules)} form several chains of dense layers, and neither names nor format tell which. "
        f"{CURE}"
    )


# --- private ------------------------------------------------------------------------------------------------------


def _check_names(order: Sequence[str], modules: Sequence[str]) -> None:
    if isinstance(order, str):
        raise ValueError(f"order is {order!r}; expected a list of the names of modules, like {list(modules)[:2]}.")
    known = set(modules)
    for name in order:
        if name not in known:
            near = difflib.get_close_matches(str(name), modules, 1, 0.4)
            meant = f"Did you mean {near[0]!r}?" if near else "Name modules, not tensors."
            names = _bounded.short(list(modules), 500)
            raise ValueError(f"order names {name!r}, which is no module; there are {names}. {meant}")
    if len(set(order)) != len(order):
        raise ValueError(f"order is {list(order)}, which names a module twice. Name each once.")


def _is_sorted(keys: Sequence[str]) -> bool:
    """Whether the names are in an order that sorting gives."""
    split = [_precedence.tokens(key) for key in keys]  # letters, digits, letters, ...
    natural = [[_precedence.number(part) if i % 2 else part for i, part in enumerate(parts)] for parts in split]
    ways = (list(keys), [key.split(".") for key in keys], [key.casefold() for key in keys], natural)
    return any(all(a <= b for a, b in itertools.pairwise(way)) for way in ways)  # type: ignore[operator]


def _neighbors(modules: Sequence[str], norms: Set[str]) -> dict[str, set[str]]:
    """For normalizations the modules with the same numbers, one of which is its neighbor, like conv1 of bn1."""
    numbered: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for module in modules:
        scope, _, last = module.rpartition(".")
        if numbers := tuple(_precedence.tokens(last)[1::2]):
            numbered.setdefault((scope, numbers), set()).add(module)
    return {
        module: alike - norms
        for alike in numbered.values()
        for module in alike & norms
        if alike - norms and len(alike & norms) == 1
    }


def _is_chain(shapes: Mapping[str, tuple[int, ...]], modules: Sequence[str]) -> bool:
    return all(shapes[a][1] == shapes[b][0] for a, b in itertools.pairwise(modules))


def _open(
    fits: Sequence[Set[str]],
    modules: Sequence[str],
    where: Mapping[str, list[_precedence.Place]],
    order: Sequence[str],
    neighbors: Mapping[str, Set[str]],
) -> set[str]:
    """The modules of equal shape, either of which may come first."""
    loose = _precedence.loose(fits, where, order)
    if len(loose) > _MAX_LOOSE:  # a search for each pair would take long
        return loose
    alike = {
        pair for fitting in set(map(frozenset, fits)) for pair in itertools.combinations(sorted(loose & fitting), 2)
    }
    pairs = [(a, b) for a, b in sorted(alike) if not _precedence.is_ordered(a, b, where, order)]
    if len(pairs) > _MAX_PAIRS:
        return loose

    def may_come_first(a: str, b: str) -> bool:
        graph = _precedence.graph(modules, where, order)
        graph.edge(graph.number[a], graph.number[b])
        return bool(_order_search.first_two(fits, graph, neighbors))

    is_open = [(a, b) for a, b in pairs if may_come_first(a, b) and may_come_first(b, a)]
    return set(itertools.chain(*(is_open or pairs)))
