"""Search for the orders in which modules fit layers, and in which each comes after those that must come before it."""

import bisect
from collections.abc import Iterator, Mapping, Sequence, Set

from jax_scalegmn.io._precedence import Graph

_MAX_WORK = 1_000_000  # modules that are placed or let through, more than it takes to place all of them a few times
Shape = tuple[int, ...]


def first_two(
    fits: Sequence[Set[str]],
    graph: Graph,
    neighbors: Mapping[str, Set[str]],
    links: Mapping[str, Shape] | None = None,
) -> list[list[str]]:
    """The first two orders that are possible.

    Args:
      fits: For every layer the modules that fit it; layers that the same modules fit share the set.
      graph: What must come before what.
      neighbors: For some modules, those of which one must be next to it, before or after.
      links: Shapes [in, out] of a chain of dense layers, by which `graph` is sorted. The two orders then differ in
        their shapes.

    Returns:
      None, one or two lists of names. After too long a search, an order that may be one of many is there twice.
    """
    search = _Search(fits, graph, neighbors, links)
    found: list[list[str]] = []
    for order in search:
        if not links or not found or [links[m] for m in order] != [links[m] for m in found[0]]:
            found.append(order)
        if len(found) == 2:
            break
    return found * 2 if len(found) == 1 and search.work_left <= 0 else found


class _Search:
    """All orders, depth first, without recursion, since files have thousands of modules."""

    def __init__(
        self,
        fits: Sequence[Set[str]],
        graph: Graph,
        neighbors: Mapping[str, Set[str]],
        links: Mapping[str, Shape] | None,
    ):
        self._graph, self._blockers = graph, list(graph.blockers)
        self._layers = [id(fitting) for fitting in fits]
        self._placed: list[int] = []
        self._links = [links[module] for module in graph.modules] if links is not None else None
        self._neighbors = {
            graph.number[module]: {graph.number[other] for other in others} for module, others in neighbors.items()
        }
        self._set_keys(fits)
        self._last_alike = self._last_of_shape() if self._links is not None and graph.is_free else None
        self.work_left = _MAX_WORK + 20 * (len(graph.followers) + sum(map(len, graph.followers)))

    def __iter__(self) -> Iterator[list[str]]:
        """Every order, as names."""
        modules, count = self._graph.modules, len(self._layers)
        if not count:
            yield []
            return
        tried = [len(modules)]  # the module that was tried last, at each layer
        while tried and self.work_left > 0:
            module = self._next(tried[-1])
            if module is None:
                tried.pop()
                if self._placed:
                    self._take_back()
                continue
            tried[-1] = module
            self._place(module)
            if len(self._placed) < count:
                tried.append(len(modules))
                continue
            if self._has_neighbor(module):
                yield [modules[index] for index in self._placed]
            self._take_back()

    def _set_keys(self, fits: Sequence[Set[str]]) -> None:
        """Lists the modules that wait for nothing by what is asked of them: a layer, or a number of inputs."""
        names, number = self._graph.modules, self._graph.number
        self._keys: list[list[int]] = [[] for _ in names]
        if self._links is None:
            for key, fitting in {id(fitting): fitting for fitting in fits}.items():
                for module in fitting:
                    self._keys[number[module]].append(key)
        else:
            self._keys = [[shape[0]] for shape in self._links]
        self._ready: dict[int, list[int]] = {}
        self._first = [index for index, blockers in enumerate(self._blockers[: len(names)]) if not blockers]
        for index in self._first:
            for key in self._keys[index]:
                self._ready.setdefault(key, []).append(index)

    def _last_of_shape(self) -> list[int]:
        """For each module the lowest number of one of its shape, all of which make the same order of shapes."""
        assert self._links is not None
        lowest: dict[Shape, int] = {}
        for index, shape in enumerate(self._links):
            lowest.setdefault(shape, index)
        return [lowest[shape] for shape in self._links]

    def _candidates(self) -> list[int]:
        """The modules that may come next, in rising order."""
        if self._links is None:
            return self._ready.get(self._layers[len(self._placed)], [])
        return self._ready.get(self._links[self._placed[-1]][1], []) if self._placed else self._first

    def _next(self, tried: int) -> int | None:
        """The highest number below `tried` of those that may come next."""
        candidates = self._candidates()
        last = self._placed[-1] if self._placed else -1
        if not self._has_neighbor(last):  # one of them must come next
            here = (m for m in self._neighbors[last] if m < tried and self._is_ready(m, candidates))
            return max(here, default=None)
        if self._last_alike is not None and tried < len(self._last_alike):
            tried = self._last_alike[tried]
        index = bisect.bisect_left(candidates, tried)
        return candidates[index - 1] if index else None

    def _is_ready(self, module: int, candidates: Sequence[int]) -> bool:
        index = bisect.bisect_left(candidates, module)
        return index < len(candidates) and candidates[index] == module

    def _has_neighbor(self, module: int) -> bool:
        """Whether the module, which is one of the last two, needs no neighbor or has one."""
        near = self._neighbors.get(module)
        return near is None or not near.isdisjoint(self._placed[-2:])

    def _place(self, module: int) -> None:
        self._list(module, False)
        self._placed.append(module)
        waiting = [module]
        while waiting:
            for node in self._graph.followers[waiting.pop()]:
                self.work_left -= 1
                self._blockers[node] -= 1
                if not self._blockers[node]:
                    if node < len(self._keys):
                        self._list(node, True)
                    else:
                        waiting.append(node)
        self.work_left -= 1

    def _take_back(self) -> None:
        module = self._placed.pop()
        waiting = [module]
        while waiting:
            for node in self._graph.followers[waiting.pop()]:
                self.work_left -= 1
                if not self._blockers[node]:
                    if node < len(self._keys):
                        self._list(node, False)
                    else:
                        waiting.append(node)
                self._blockers[node] += 1
        self._list(module, True)

    def _list(self, module: int, is_ready: bool) -> None:
        for key in self._keys[module]:
            ready = self._ready.setdefault(key, [])
            index = bisect.bisect_left(ready, module)
            if is_ready:
                ready.insert(index, module)
            else:
                del ready[index]
