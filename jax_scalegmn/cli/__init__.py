"""The command line `jax-scalegmn`: align, merge and check networks in files."""

from jax_scalegmn.cli._main import main

__all__ = ["main"]
