"""JSON of bounded size and nesting, checked before it is parsed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_scalegmn._bounded import _files, _limits

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # one that has no end, too: else this would take quadratic time
_BRACKET = re.compile(r"[\[\]{}]")


def read_json(source: Path | str | bytes, *, what: str = "") -> Any:
    """Reads JSON from a file, or from a text that was read already.

    Args:
      source: The path of a regular file; or the text, as str or bytes.
      what: Where a text is from, for errors; a file is named by its path.

    Raises:
      OSError: If the file cannot be opened.
      ValueError: If it is no JSON, larger than the limit of metadata_bytes, or nested deeper than that of nesting.
    """
    where = str(source) if isinstance(source, Path) else what
    try:
        text = _files.read_bytes(source, "metadata_bytes") if isinstance(source, Path) else source
        _limits.check("metadata_bytes", len(text), "its JSON, in bytes,")
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        _check_brackets(text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: expected JSON, got one that cannot be read ({_limits.one_line(error, 300)}). It is damaged or "
            "foreign: get it again."
        ) from error


def check_nesting(value: Any, what: str) -> None:
    """Checks that dicts, lists and tuples within each other have no more levels than the limit of nesting.

    Raises:
      ValueError: If they have.
    """
    level, nodes = 0, [value]
    while nodes:
        inside: dict[int, Any] = {}  # each once, where several lists hold it
        for node in nodes:
            if isinstance(node, Mapping | list | tuple):
                inside |= {id(part): part for part in (node.values() if isinstance(node, Mapping) else node)}
        nodes = list(inside.values())
        level += bool(nodes)
        _limits.check("nesting", level, f"the nesting of {what}")


# --- private ------------------------------------------------------------------------------------------------------


def _check_brackets(text: str) -> None:
    level = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        level += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, level)
    _limits.check("nesting", deepest, "the nesting of its JSON")
