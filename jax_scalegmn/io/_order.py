"""The order in which a network applies the modules of a state_dict: told by shapes, the names, or the caller.

PyTorch registers modules in an order that nearly always is the one in which they are applied. Whatever sorts names
(safetensors, pytrees, `dict(sorted(...))`) loses it, and modules of equal shape then fit each other's places. So an
order is only used if something tells it; otherwise it is asked for.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from jax_scalegmn import _bounded

_MAX_STEPS = 20_000  # of a search; after that the order counts as unknown
_MAX_LOOKED_AT = 20_000_000  # modules, in all steps
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
    _check_count(modules)
    by_number = _earlier(modules, order or ())
    in_file = all(module in fitting for module, fitting in zip(modules, fits, strict=True))
    agrees = not any(by_number[module] - set(modules[:index]) for index, module in enumerate(modules))
    if order is None and told and in_file and agrees:
        return list(modules)
    by_shape = _solutions(fits, {module: set() for module in modules}, {})
    if not by_shape:
        return None
    if len(by_shape) == 1 and order is None:
        return by_shape[0]
    neighbors = _neighbors(modules, norms)
    possible = _solutions(fits, by_number, neighbors)
    if order is not None and not possible:
        possible = _solutions(fits, _earlier(modules, order, numbers=False), {})
        if not possible:
            raise ValueError(f"order {list(order)} does not fit: the shapes of these modules allow other orders only.")
    contradiction = order is None and told and in_file
    if len(possible) == 1 and not contradiction:
        return possible[0]
    if len(possible) < 2:  # the numbers do not count
        by_number, neighbors = {module: set() for module in modules}, {}
    open_pairs = _open_pairs(fits, by_number, neighbors)
    alike = [module for module in modules if module in set(itertools.chain(*open_pairs))]
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
    _check_count(modules)
    if order is not None:
        _check_names(order, modules)
    elif told and _is_chain(shapes, modules):
        return modules
    nothing: dict[str, set[str]] = {module: set() for module in modules}
    ways = [lambda: nothing, lambda: _earlier(modules, ())]
    for before in ways if order is None else [lambda: _earlier(modules, order, numbers=False)]:
        chains = _solutions([set(modules)] * len(modules), before(), {}, shapes)
        if len(chains) == 1:
            return chains[0]
    if not chains:
        return None
    raise ValueError(
        f"{_bounded.short(modules)} form several chains of dense layers, and neither names nor format tell which. "
        f"{CURE}"
    )


# --- private ------------------------------------------------------------------------------------------------------


def _check_count(modules: Sequence[str]) -> None:
    """Refuses more modules than can be compared with each other in a few seconds."""
    what = "twice the number of modules, each of which is compared with all others,"
    _bounded.check("layers", 2 * len(modules), what)


def _check_names(order: Sequence[str], modules: Sequence[str]) -> None:
    if isinstance(order, str):
        raise ValueError(f"order is {order!r}; expected a list of the names of modules, like {list(modules)[:2]}.")
    for name in order:
        if name not in modules:
            near = difflib.get_close_matches(str(name), modules, 1, 0.4)
            meant = f"Did you mean {near[0]!r}?" if near else "Name modules, not tensors."
            names = _bounded.short(list(modules), 500)
            raise ValueError(f"order names {name!r}, which is no module; there are {names}. {meant}")
    if len(set(order)) != len(order):
        raise ValueError(f"order is {list(order)}, which names a module twice. Name each once.")


def _tokens(text: str) -> list[str]:
    return re.split(r"(\d+)", text)


def _is_sorted(keys: Sequence[str]) -> bool:
    """Whether the names are in an order that sorting gives."""
    natural = [[int(token) if token.isdigit() else token for token in _tokens(key)] for key in keys]
    ways = (list(keys), [key.split(".") for key in keys], [key.casefold() for key in keys], natural)
    return any(all(a <= b for a, b in itertools.pairwise(way)) for way in ways)  # type: ignore[operator]


def _number_order(a: str, b: str) -> int:
    """-1 if numbers in the names put a before b, 1 if after, 0 if they say nothing.

    The first part (between dots) in which they differ decides: its letters must be the same, its numbers not.
    """
    for (left, letters, numbers), (right, other_letters, other_numbers) in zip(_parts(a), _parts(b), strict=False):
        if left == right:
            continue
        return 0 if letters != other_letters else (numbers > other_numbers) - (numbers < other_numbers)
    return 0


@functools.lru_cache(maxsize=10_000)
def _parts(name: str) -> list[tuple[str, list[str], list[int]]]:
    """The parts of a name between dots, with the letters and the numbers of each."""
    tokens = [(part, _tokens(part)) for part in name.split(".")]
    return [(part, found[::2], [int(token) for token in found[1::2]]) for part, found in tokens]


def _earlier(modules: Sequence[str], order: Sequence[str], *, numbers: bool = True) -> dict[str, set[str]]:
    """For every module those that must come before it, by `order` and by the numbers in the names of the others."""
    before: dict[str, set[str]] = {module: set() for module in modules}
    for a, b in itertools.permutations(modules, 2) if numbers else ():
        if _number_order(a, b) < 0 and not (a in order and b in order):
            before[b].add(a)
    for a, b in itertools.combinations(order, 2):
        before[b].add(a)
    return before


def _neighbors(modules: Sequence[str], norms: Set[str]) -> dict[str, set[str]]:
    """For normalizations the modules with the same numbers, one of which is its neighbor, like conv1 of bn1."""
    numbered: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for module in modules:
        scope, _, last = module.rpartition(".")
        if numbers := tuple(_tokens(last)[1::2]):
            numbered.setdefault((scope, numbers), set()).add(module)
    return {
        module: alike - norms
        for alike in numbered.values()
        for module in alike & norms
        if alike - norms and len(alike & norms) == 1
    }


def _solutions(
    fits: Sequence[Set[str]],
    before: Mapping[str, Set[str]],
    neighbors: Mapping[str, Set[str]],
    links: Mapping[str, tuple[int, ...]] | None = None,
) -> list[list[str]]:
    """The first two orders that are possible; with `links`, shapes [in, out] of a chain, two of different shapes."""
    steps = itertools.count()
    found: list[list[str]] = []
    in_order = {id(fitting): sorted(fitting) for fitting in fits}
    is_free = not any(before.values())
    most = min(_MAX_STEPS, _MAX_LOOKED_AT // max(1, len(fits)))

    def candidates(placed: list[str], done: Set[str]) -> list[str]:
        last = placed[-1] if placed else ""
        fitting = [m for m in in_order[id(fits[len(placed)])] if m not in done and before[m] <= done]
        if last in neighbors and not neighbors[last] & set(placed[-2:]):  # its neighbor must come next
            fitting = [m for m in fitting if m in neighbors[last]]
        if links is None:
            return fitting
        linked = [m for m in fitting if not placed or links[last][1] == links[m][0]]
        return list({links[m]: m for m in linked}.values()) if is_free else linked

    def search() -> Iterator[list[str]]:
        """All orders, depth first; no recursion, since files have thousands of modules."""
        placed: list[str] = []
        done: set[str] = set()
        waiting = [iter(candidates(placed, done))] if fits else []
        if not fits:
            yield []
        while waiting:
            module = next(waiting[-1], None)
            if module is not None and next(steps) < most:
                placed.append(module)
                done.add(module)
                if len(placed) < len(fits):
                    waiting.append(iter(candidates(placed, done)))
                    continue
                if neighbors.get(module, {module}) & set(placed[-2:]):
                    yield list(placed)
            else:
                waiting.pop()
            if placed:
                done.discard(placed.pop())

    for order in search():
        shapes = [links[module] for module in order] if links else order
        if shapes not in ([links[module] for module in other] if links else other for other in found):
            found.append(order)
        if len(found) == 2:
            break
    if len(found) == 1 and next(steps) >= most:
        return [found[0], found[0]]  # perhaps not the only one
    return found


def _is_chain(shapes: Mapping[str, tuple[int, ...]], modules: Sequence[str]) -> bool:
    return all(shapes[a][1] == shapes[b][0] for a, b in itertools.pairwise(modules))


def _open_pairs(
    fits: Sequence[Set[str]], before: Mapping[str, Set[str]], neighbors: Mapping[str, Set[str]]
) -> list[tuple[str, str]]:
    """Pairs of modules of equal shape, either of which may come first."""
    pairs = {pair for fitting in fits for pair in itertools.combinations(sorted(fitting), 2)}
    loose = [(a, b) for a, b in sorted(pairs) if a not in before[b] and b not in before[a]]
    if len(loose) > _MAX_PAIRS:  # a search for each would take long
        return loose
    return [
        (a, b)
        for a, b in loose
        if all(_solutions(fits, {**before, y: {*before[y], x}}, neighbors) for x, y in ((a, b), (b, a)))
    ] or loose
