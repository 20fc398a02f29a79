"""Which modules of a state_dict come before which, by the numbers in their names and by a list of names.

The first part of two names (between dots) in which they differ decides: its letters must be the same and its numbers
not, as in `fc1` and `fc2`, or `blocks.2.conv` and `blocks.10.norm`. Pairs are never compared one by one: names share
the nodes of a tree, and below a node the names of equal letters form levels in the order of their numbers. So time and
memory are linear in the length of the names.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any

_DIGITS = re.compile(r"(\d+)", re.ASCII)
_Number = tuple[int, str]  # the count of digits and the digits, which sort like the number, however long it is
_Level = tuple[_Number, ...]
Place = tuple[int, _Level]  # a group of names, which is a node and letters, and the numbers of the name there


def tokens(text: str) -> list[str]:
    """The text's letters and digits in turn: letters first and last, perhaps empty."""
    return _DIGITS.split(text)


def number(digits: str) -> _Number:
    """A key that sorts like the number."""
    digits = digits.lstrip("0")
    return len(digits), digits


def places(modules: Sequence[str]) -> dict[str, list[Place]]:
    """For every module the groups in which its name has a level, from the first part of the name to the last.

    Two names of one group are ordered if their levels differ. Names have at most one such group in common.
    """
    nodes: dict[tuple[int, str], int] = {}
    groups: dict[tuple[int, tuple[str, ...]], int] = {}
    found = {}
    for module in modules:
        node, here = 0, []
        for part in module.split("."):
            split = tokens(part)
            group = groups.setdefault((node, tuple(split[::2])), len(groups))
            here.append((group, tuple(map(number, split[1::2]))))
            node = nodes.setdefault((node, part), len(nodes) + 1)
        found[module] = here
    return found


def agrees(modules: Sequence[str], where: Mapping[str, list[Place]]) -> bool:
    """Whether no module has one before it that must come after it."""
    highest: dict[int, _Level] = {}
    for module in modules:
        for group, level in where[module]:
            if highest.setdefault(group, level) > level:
                return False
            highest[group] = level
    return True


def is_ordered(a: str, b: str, where: Mapping[str, list[Place]], order: Collection[str]) -> bool:
    """Whether numbers or `order` tell which of the two comes first."""
    if a in order and b in order:
        return True
    return any(
        group == other and level != other_level
        for (group, level), (other, other_level) in zip(where[a], where[b], strict=False)
    )


def loose(fits: Sequence[Set[str]], where: Mapping[str, list[Place]], order: Collection[str]) -> set[str]:
    """The modules that fit a layer like another one does, of which nothing tells whether it comes before or after."""
    classes = {id(fitting): fitting for fitting in fits}
    found = set()
    for fitting in classes.values():
        listed = {module for module in fitting if module in order}
        in_group = collections.Counter((group, m in listed) for m in fitting for group, _ in where[m])
        in_level = collections.Counter((place, m in listed) for m in fitting for place in where[m])
        for module in fitting:
            ordered = len(listed) - 1 if module in listed else 0
            for place in where[module]:
                for other in (False,) if module in listed else (False, True):
                    ordered += in_group[place[0], other] - in_level[place, other]
            if ordered < len(fitting) - 1:
                found.add(module)
    return found


@dataclasses.dataclass
class Graph:
    """Modules by number, and gates, each of which opens after some modules and lets others through.

    Attributes:
      modules: The names, sorted downwards.
      followers: For each module, then for each gate, those that wait for it.
      blockers: For each, how many it waits for.
    """

    modules: list[str]
    followers: list[list[int]]
    blockers: list[int]

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """The module's place in `modules`."""
        return {module: index for index, module in enumerate(self.modules)}

    @functools.cached_property
    def is_free(self) -> bool:
        """Whether every order is allowed."""
        return not any(self.blockers)

    def edge(self, before: int, after: int) -> None:
        """Lets one wait for another."""
        self.followers[before].append(after)
        self.blockers[after] += 1

    def gate(self, after: Sequence[int]) -> int:
        """A new gate that waits for all of these."""
        self.followers.append([])
        self.blockers.append(0)
        for node in after:
            self.edge(node, len(self.followers) - 1)
        return len(self.followers) - 1


def graph(
    modules: Sequence[str],
    where: Mapping[str, list[Place]],
    order: Sequence[str] = (),
    *,
    numbers: bool = True,
    key: Callable[[str], Any] | None = None,
) -> Graph:
    """What must come before what: by `order`, and by the numbers, except between two modules of `order`."""
    names = sorted(modules, key=key, reverse=True)
    result = Graph(names, [[] for _ in names], [0] * len(names))
    listed = {result.number[module] for module in order}
    if numbers:
        groups: dict[int, dict[_Level, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for index, module in enumerate(names):
            for group, level in where[module]:
                groups[group][level].append(index)
        for levels in groups.values():
            _add_levels(result, [levels[level] for level in sorted(levels)], listed)
    for a, b in itertools.pairwise(order):
        result.edge(result.number[a], result.number[b])
    return result


def _add_levels(graph: Graph, levels: Sequence[Sequence[int]], listed: Set[int]) -> None:
    """Lets each level wait for the levels before it, except the modules of `listed` for each other."""
    gates: dict[bool, int] = {}  # the last one of the modules that are listed, and of the others
    for members in levels:
        for module in members:
            for is_listed, gate in gates.items():
                if not (is_listed and module in listed):
                    graph.edge(gate, module)
        for is_listed in (False, True):
            here = [module for module in members if (module in listed) == is_listed]
            if here and len(levels) > 1:
                gates[is_listed] = graph.gate([*here, *([gates[is_listed]] if is_listed in gates else [])])
