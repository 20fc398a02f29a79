"""The command line `jax-scalegmn`: align, merge and check networks in files, and sweep over options of experiments.

    jax-scalegmn align a.pt b.pt --out c.pt --activation relu
    jax-scalegmn merge a.msgpack b.msgpack c.msgpack --out m.msgpack --arch resnet:20,16-32-64,norm=batch
    jax-scalegmn check a.safetensors --arch arch.json
    jax-scalegmn sweep make study.toml --storage sqlite:///s.db

It needs the extra `cli`: `pip install "jax-scalegmn[cli]"`. JAX is imported only once the options are parsed, so
`jax-scalegmn --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `jax-scalegmn` and returns its exit status.

    Args:
      argv: The words after `jax-scalegmn`; None for those of the process.

    Returns:
      0, or 2 after bad input, which prints one line on the standard error and writes no file. Of `sweep launch`, 1 if a
      worker failed.

    Raises:
      SystemExit: After --help (status 0), and on words that are no options of the command (status 2).

    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 4, 1))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.io.tensors.write(folder / "a.npz", sg.io.to_torch(arch, params))
    >>> sg.cli.main(["check", str(folder / "a.npz"), "--activation", "relu"])
    architecture  mlp 2-4-1 relu, 17 numbers
      input       2 neurons, fixed
      hidden_0    4 neurons, positive
      output      1 neurons, fixed
    .../a.npz  .npz, float32
      modules     Dense_0, Dense_1
      function    of the described network, preserved: changed by at most ... of its largest output; your own code ...
    0
    """
    try:
        import tyro
    except ImportError:
        print('The command line needs tyro: pip install "jax-scalegmn[cli]"', file=sys.stderr)
        return 2
    from jax_scalegmn.cli import _options, _sweep_options

    commands = _options.Command | _sweep_options.Sweep
    options: Any = tyro.cli(commands, args=argv, prog="jax-scalegmn", description=_options.DESCRIPTION)
    from jax_scalegmn import _bounded
    from jax_scalegmn.cli import _headers

    try:
        if isinstance(options, _sweep_options.Sweep):
            from jax_scalegmn.cli import _sweep

            return _sweep.run(options.command)
        _options.check(options)
        with _bounded.limits(**_options.limits(options)):
            _headers.check(_options.paths(options), by_name=options.module is not None)
            from jax_scalegmn.cli import _commands  # imports JAX, which takes longer than to print the help

            _commands.run(options)
    except (ImportError, ValueError, OSError) as error:
        message = _bounded.one_line(error, 2000).replace("Pass overwrite to", "Pass --overwrite to")
        print(f"jax-scalegmn: {message}", file=sys.stderr)
        return 2
    return 0
