"""The ranges of numeric options, by their names, which are checked before anything is computed."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

# Numbers are finite and 0 or more, unless the option is here: by its whole name, or else by the last part of it.
_LEAST: dict[str, float] = {
    "alignment.epochs": 0,  # trains none
    "batch_size": 1,
    "best": 1,
    "channels": 1,
    "checkpoints": 1,
    "chunk": 1,
    "copies": 1,
    "cpu_devices": 1,
    "distillation_images": 1,
    "drawn_size": 1,
    "edges_at_once": 1,
    "enlarge": 1,
    "epochs": 1,
    "examples": 1,
    "features": 1,
    "few_images": 1,
    "frame_epochs": 1,
    "function_examples": 1,
    "function_values": 1,
    "hidden": 1,
    "image_examples": 1,
    "images_per_step": 1,
    "many": 2,
    "mesh": -1,
    "micro_batch": 1,
    "models": 2,
    "networks": 1,
    "num_iterations": 1,
    "num_layers": 1,
    "offset": -math.inf,
    "orbit_size": 2,
    "orbits": 2,
    "outputs": 1,
    "pairs": 1,
    "part": 1,
    "patience": 1,
    "pixels": -math.inf,
    "points": 2,
    "queries": 1,
    "scale_batch": 1,
    "scoring_images": 1,
    "search_candidates": 1,
    "search_neurons": 1,
    "search_pixels": 1,
    "search_sweeps": 1,
    "seeds": 0,
    "selection_images": 1,
    "selection_pairs": 1,
    "size": 1,
    "test_images": 1,
    "train_fits": 1,
    "train_images": 1,
    "wide": 1,
    "widths": 1,
}
_POSITIVE = frozenset({"clip_norm", "init_scale", "learning_rate", "learning_rates", "temperature", "w0"})
_MOST: dict[str, float] = {"seed": 2**32 - 1, "train.seed": 2**32 - 1}  # JAX takes the last 32 bits alone


def check(config: Any) -> None:
    """Checks that every number of an experiment's options is finite and in its range.

    Args:
      config: The options, a dataclass.

    Raises:
      ValueError: If one is not; the message names it.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Config:
    ...     points: int = 1
    >>> check(Config())
    Traceback (most recent call last):
    ...
    ValueError: points is 1; expected a number >= 2.
    """
    for name, value in _numbers(config, ""):
        least, most = _of(_LEAST, name, 0), _of(_MOST, name, math.inf)
        positive = name.split(".")[-1] in _POSITIVE
        values = value if isinstance(value, tuple) else (value,)
        if all(math.isfinite(one) and least <= one <= most and (one > 0 or not positive) for one in values):
            continue
        expected = "> 0" if positive else f">= {least:g}" if least > -math.inf else "that is finite"
        numbers = "numbers" if isinstance(value, tuple) else "a number"
        bound = "" if most == math.inf else f" and <= {most}"
        raise ValueError(f"{name} is {value}; expected {numbers} {expected}{bound}.")


# --- private ------------------------------------------------------------------------------------------------------


def _numbers(config: Any, before: str) -> Iterator[tuple[str, Any]]:
    """The names and values of options that are numbers, or tuples of numbers."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), before + field.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        elif _is_number(value) or (isinstance(value, tuple) and value and all(map(_is_number, value))):
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of(table: dict[str, float], name: str, usual: float) -> float:
    return table.get(name, table.get(name.split(".")[-1], usual))
