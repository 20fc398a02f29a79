"""Tables of results: rows of text that become a table in a terminal or in an HTML page."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import rich.box
import rich.table


class Table(NamedTuple):
    """A table of text.

    Attributes:
      title: What it shows.
      head: The names of the columns.
      rows: The cells; the first of every row names it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def terminal(table: Table) -> rich.table.Table:
    """The table for a terminal: numbers to the right, intervals left out."""
    shown = rich.table.Table(title=table.title, box=rich.box.SIMPLE)
    for index, name in enumerate(table.head):
        shown.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in table.rows:
        shown.add_row(*[cell.split(" [")[0] for cell in row])
    return shown


def page(table: Table) -> str:
    """The table as HTML, without its title."""
    head, *body = [[html.escape(cell) for cell in row] for row in (table.head, *table.rows)]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "\n".join(lines) + "</table>"


def with_interval(value: Mapping[str, float], digits: int, factor: float = 1.0) -> str:
    """A mean with the ends of its interval in brackets."""
    mean, low, high = (f"{factor * value[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
