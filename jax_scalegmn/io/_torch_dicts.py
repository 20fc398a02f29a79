"""Which dict of a checkpoint is the network: all dicts of tensors and pickled modules, by their paths in the file."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jax_scalegmn import _bounded
from jax_scalegmn.io import _torch_views
from jax_scalegmn.io._inert_pickle import Global, Object
from jax_scalegmn.io._torch_views import Unreadable, View

Entry: TypeAlias = View | Unreadable | int | float
_MAX_NAME = 500  # letters of a key, or of a module's name
_LISTED = 12  # dicts, in an error


class ChoiceError(ValueError):
    """A file without one dict of tensors to read: the message says how to choose."""


class TensorDict(NamedTuple):
    """A dict of tensors in a checkpoint.

    Attributes:
      path: The keys of the dicts, and places in the lists, that lead to it.
      tensors: Its tensors, and the numbers that are among nothing but tensors.
      in_optimizer: Whether it belongs to an optimizer.
      is_plain: Whether it held nothing else.
    """

    path: tuple[str | int, ...]
    tensors: dict[str, Entry]
    in_optimizer: bool
    is_plain: bool

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def choose(content: Any, key: str | None) -> TensorDict:
    """The dict of tensors that `key` names, or the only one.

    An optimizer's state is never the only one. Nor is a dict without a tensor of two axes, such as the statistics of
    the data or the state of a random generator, next to a dict with one; nor what is next to such a dict.

    Raises:
      ValueError: If there is none, or there are several and no key; the message lists them.
    """
    found = _found(content)
    if key is not None:
        named = [candidate for candidate in found if candidate.key == key]
        if len(named) != 1:
            raise ChoiceError(f"no dict of tensors has the key {key[:100]!r}; the file holds {_listed(found)}")
        return named[0]
    networks = [candidate for candidate in found if not candidate.in_optimizer]
    best = [c for c in networks if any(len(t.size) > 1 for t in c.tensors.values() if isinstance(t, View | Unreadable))]
    best = best or networks
    outer = {c.path[:length] for c in best for length in range(len(c.path))}
    inner = [c for c in best if c.is_plain or c.path not in outer]
    if len(inner) == 1:
        return inner[0]
    if not inner:
        raise ValueError(f"got {_described(content)}, which holds no dict of tensors: not a state_dict")
    raise ChoiceError(
        f"it holds several dicts of tensors: {_listed(inner)}. Choose one: key={inner[0].key[:100]!r} in Python, --key "
        "on the command line"
    )


# --- private: the dicts ---------------------------------------------------------------------------------------------


def _described(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with the keys {[str(key)[:60] for key in content if isinstance(key, str | int)][:10]}"
    if isinstance(content, Object):
        return f"an object of {content.call if isinstance(content.call, Global) else 'something without a name'}"
    return f"a {type(content).__name__}"


def _listed(found: list[TensorDict]) -> str:
    shown = []
    for candidate in found[:_LISTED]:
        names = ", ".join(name[:40] for name in list(candidate.tensors)[:3])
        where = repr(candidate.key[:100]) if candidate.path else "'' (the file itself)"
        shown.append(f"{where} with {len(candidate.tensors)} tensors ({names}, ...)")
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return "; ".join(shown) + more if shown else "none"


def _found(content: Any) -> list[TensorDict]:
    """Every dict of tensors and every module, once, in the order of the file."""
    found: list[TensorDict] = []
    seen: set[int] = set()
    budget, deepest = _Budget(), _bounded.use().nesting
    waiting: list[tuple[tuple[str | int, ...], Any, bool]] = [((), content, False)]
    while waiting:
        path, node, in_optimizer = waiting.pop()
        is_module = _module_parts(node) is not None
        if not (is_module or type(node) in (dict, list, tuple)) or id(node) in seen or len(path) > deepest:
            continue
        seen.add(id(node))
        if is_module:
            found.append(TensorDict(path, dict(_walk(node, budget)), in_optimizer, True))
            continue
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        if isinstance(node, dict):
            in_optimizer = in_optimizer or {"state", "param_groups"} <= node.keys()
            found += _as_tensors(path, node, in_optimizer)
        inner = [(key, value) for key, value in items if _is_short(key)]
        waiting += [((*path, key), value, in_optimizer) for key, value in reversed(inner)]
    return [candidate for candidate in found if candidate.tensors]


def _is_short(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and len(key) <= _MAX_NAME)


def _as_tensors(path: tuple[str | int, ...], node: Mapping[Any, Any], in_optimizer: bool) -> Iterator[TensorDict]:
    named = {name: _entry(value) for name, value in node.items() if isinstance(name, str)}
    tensors = {name: entry for name, entry in named.items() if isinstance(entry, View | Unreadable)}
    if not tensors:
        return
    is_plain = len(named) == len(node) and all(entry is not None for entry in named.values())
    kept = {name: entry for name, entry in named.items() if entry is not None and (is_plain or name in tensors)}
    yield TensorDict(path, kept, in_optimizer, is_plain)


def _entry(value: Any) -> Entry | None:
    """A tensor, or a plain number next to tensors, like the label in some published files."""
    return value if type(value) in (int, float) else _torch_views.tensor_of(value)


# --- private: the modules -------------------------------------------------------------------------------------------


def _module_parts(node: Any) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]] | None:
    """The parameters, persistent buffers and submodules of a pickled torch.nn.Module of any class; None for others."""
    state = node.state if isinstance(node, Object) else None
    if isinstance(state, tuple) and state:
        state = state[0]  # next to the state of __slots__
    if not isinstance(state, dict):
        return None
    parts = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    parameters, buffers, modules = parts
    left_out = state.get("_non_persistent_buffers_set")
    if isinstance(left_out, Object):  # a set as protocol 2 writes it: the call of set on a list
        left_out = left_out.args[0] if isinstance(left_out.args, tuple) and left_out.args else None
    names = {name for name in left_out if isinstance(name, str)} if isinstance(left_out, list | tuple) else set()
    return parameters, {name: value for name, value in buffers.items() if name not in names}, modules  # type: ignore


class _Budget:
    """What all modules of a file may take: one that is part of many is walked through many times."""

    def __init__(self) -> None:
        self.entries = self.letters = 0

    def take(self, entries: int, letters: int) -> None:
        self.entries += entries
        self.letters += letters
        _bounded.check("items", self.entries, "its module contains itself, or the number of its parts", is_all=False)
        _bounded.check("metadata_bytes", self.letters, "the size of its modules' names, in letters,", is_all=False)


def _walk(module: Any, budget: _Budget) -> Iterator[tuple[str, Entry]]:
    """The entries of a module's state_dict, in its order."""
    waiting: list[tuple[str, Any, int]] = [("", module, 0)]
    while waiting:
        prefix, node, depth = waiting.pop()
        budget.take(1, len(prefix))
        _bounded.check("nesting", depth, "its module contains itself, or the nesting of its modules", is_all=False)
        parts = _module_parts(node)
        if parts is None:
            continue
        inside = sum(map(len, parts))
        budget.take(inside, inside * len(prefix))
        for name, value in (*parts[0].items(), *parts[1].items()):
            tensor = _torch_views.tensor_of(value)
            if isinstance(name, str) and tensor is not None:
                yield f"{prefix}{name}", tensor
        inner = [(name, value) for name, value in parts[2].items() if _is_short(name)]
        waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in reversed(inner)]


def scalar(value: int | float) -> np.ndarray:
    """A plain number as an array without axes."""
    return np.array(value, np.int64 if isinstance(value, int) else np.float64)
