"""The style, the scripts and the skeleton of the pages: files of this package."""

from importlib import resources


def read(name: str) -> str:
    """The text of a file of this package."""
    return (resources.files("jax_scalegmn.report") / name).read_text(encoding="utf-8")


def same_function_script() -> str:
    """The functions that draw the "Same function?" page."""
    return read("_chart.js") + read("_page.js")


def same_function_style() -> str:
    return read("_style.css") + read("_page.css")
