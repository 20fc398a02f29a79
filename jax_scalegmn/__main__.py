"""`python -m jax_scalegmn`: the command line."""

import sys

from jax_scalegmn import cli

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(cli.main())
