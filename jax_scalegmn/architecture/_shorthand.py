"""Reads architectures in the short form of command lines: "mlp:784-64-10,relu" or "resnet:20,16-32-64,norm=batch"."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from jax_scalegmn import _bounded
from jax_scalegmn.architecture._builders import cnn, mlp, siren
from jax_scalegmn.architecture._description import Architecture
from jax_scalegmn.architecture._vgg_resnet import resnet, vgg

EXAMPLES = {
    "mlp": "mlp:784-64-64-10,relu",
    "siren": "siren:2-32-32-1,w0=30",
    "cnn": "cnn:1-16-16,10,relu,strides=2",
    "vgg": "vgg:64+64-128+128,10,norm=batch",
    "resnet": "resnet:20,16-32-64,norm=batch",
}


def parse(text: str, *, activation: str | None = None) -> Architecture:
    """Reads an architecture from a builder's name and its options in short form.

    The form is `NAME:OPTION,OPTION,...`. The name is that of a builder: mlp, siren, cnn, vgg or resnet. The first
    options need no name, in the order of `EXAMPLES`; others are written as `name=value`, with the names of the
    builder's arguments. The numbers of a list have dashes between them, the widths of one VGG stage plus signs, and
    None is "none". A vgg or resnet without an activation has relu; mlp and cnn need one.

    Args:
      text: A short form, like the values of `EXAMPLES`.
      activation: The activation, if `text` does not contain one.

    Returns:
      The architecture that the builder returns.

    Raises:
      ValueError: On another builder or option, a value that cannot be read, or options that fit no network.

    >>> import jax_scalegmn as sg
    >>> sg.architecture.parse("mlp:784-64-10,relu") == sg.mlp((784, 64, 10), "relu")
    True
    >>> sg.architecture.parse("vgg:64+64-128,10,norm=batch") == sg.vgg(((64, 64), (128,)), 10, norm="batch")
    True
    """
    kind, colon, rest = text.partition(":")
    if kind not in _BUILDERS or not colon:
        raise ValueError(
            f"The architecture is {_shown(text)}; expected one of {', '.join(_BUILDERS)}, a colon and its options, "
            f"like {', '.join(EXAMPLES.values())}."
        )
    build = _BUILDERS[kind]
    signature = inspect.signature(build)
    given = _given(text, kind, rest, list(signature.parameters))
    options = {name: _READ.get(name, _words)(text, name, value) for name, value in given.items()}
    if activation is not None:
        if "activation" not in signature.parameters or options.get("activation", activation) != activation:
            own = options.get("activation", "sine")
            raise ValueError(
                f"The architecture {_shown(text)} has activation {own!r}, not {activation!r}. Name it once."
            )
        options["activation"] = activation
    if kind in ("mlp", "cnn") and "activation" not in options:
        raise ValueError(f"The architecture {_shown(text)} names no activation; expected one, like {EXAMPLES[kind]}.")
    numbers = [options.get("depth", 0), *(len(_flat(value)) for value in options.values() if isinstance(value, tuple))]
    _bounded.check("layers", max(numbers), f"The architecture {_shown(text)}: its number of layers")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(
            f"The architecture {_shown(text)} is incomplete ({error}); expected {EXAMPLES[kind]!r}."
        ) from error
    try:
        return build(**options)
    except ValueError as error:
        raise ValueError(
            f"The architecture {_shown(text)} does not fit a network: {_bounded.one_line(error, 500)}"
        ) from error


# --- private ------------------------------------------------------------------------------------------------------

_BUILDERS: Mapping[str, Callable[..., Architecture]] = {
    "mlp": mlp,
    "siren": siren,
    "cnn": cnn,
    "vgg": vgg,
    "resnet": resnet,
}

_LARGEST = 2**31 - 1  # of a width or size, as JAX has it

# The options that need no name, in order.
_POSITIONAL = {
    "mlp": ("widths", "activation"),
    "siren": ("widths",),
    "cnn": ("channels", "outputs", "activation"),
    "vgg": ("channels_per_stage", "outputs", "activation"),
    "resnet": ("depth", "widths", "outputs", "activation"),
}


def _given(text: str, kind: str, rest: str, known: list[str]) -> dict[str, str]:
    """The options by name, each as text."""
    given: dict[str, str] = {}
    unnamed = list(_POSITIONAL[kind])
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            # A word cannot be a number: resnet:20,tanh leaves out widths and outputs.
            if _is_word(item) and "activation" in unnamed:
                unnamed = ["activation"]
            if not unnamed:
                raise ValueError(
                    f"The architecture {_shown(text)} has one option too many, {_shown(item)}; expected "
                    f"{EXAMPLES[kind]!r}."
                )
            name, value = unnamed.pop(0), item
        if name not in known or name in given:
            raise ValueError(
                f"The architecture {_shown(text)} has the option {_shown(name)}, unknown or twice; a {kind} has "
                f"{', '.join(known)}."
            )
        given[name] = value
    return given


def _is_word(item: str) -> bool:
    return item[:1].isalpha()


def _shown(text: str) -> str:
    return _bounded.short(text)


def _flat(value: tuple[Any, ...]) -> list[Any]:
    return [entry for part in value for entry in (part if isinstance(part, tuple) else (part,))]


def _number(kind: type[int] | type[float], text: str, name: str, value: str) -> Any:
    try:
        number = kind(value)
        if not (math.isfinite(number) and abs(number) <= (_LARGEST if kind is int else math.inf)):
            raise ValueError
        return number
    except (ValueError, OverflowError):
        words = {int: f"a whole number up to {_LARGEST}", float: "a finite number"}
        raise ValueError(
            f"The architecture {_shown(text)}: {name} is {_shown(value)}; expected {words[kind]}."
        ) from None


def _int(text: str, name: str, value: str) -> int:
    return _number(int, text, name, value)


def _float(text: str, name: str, value: str) -> float:
    return _number(float, text, name, value)


def _floats(text: str, name: str, value: str) -> float | tuple[float, ...]:
    parts = value.split("-")
    if len(parts) > 1 and all(part[:1].isdecimal() and not part.endswith("e") for part in parts):
        return tuple(_float(text, name, part) for part in parts)
    return _float(text, name, value)


def _ints(text: str, name: str, value: str) -> tuple[int, ...]:
    return tuple(_int(text, name, part) for part in value.split("-"))


def _stages(text: str, name: str, value: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_int(text, name, part) for part in stage.split("+")) for stage in value.split("-"))


def _sides(text: str, name: str, value: str) -> tuple[int, ...] | None:
    if value == "none":
        return None
    sides = _ints(text, name, value)
    if len(sides) != 2:
        raise ValueError(
            f"The architecture {_shown(text)}: {name} is {_shown(value)}; expected height and width, like 28-28."
        )
    return sides


def _sizes(text: str, name: str, value: str) -> int | tuple[int, ...]:
    sizes = _ints(text, name, value)
    return sizes[0] if len(sizes) == 1 else sizes


def _padding(text: str, name: str, value: str) -> int | str:
    return _int(text, name, value) if value.isdecimal() else value.upper()


def _words(text: str, name: str, value: str) -> str | tuple[str, ...] | None:
    words = tuple(value.split("-"))
    return None if value == "none" else value if len(words) == 1 else words


_READ: Mapping[str, Callable[[str, str, str], Any]] = {
    "widths": _ints,
    "channels": _ints,
    "dense": _ints,
    "channels_per_stage": _stages,
    "flatten": _sides,
    "kernel_size": _sizes,
    "padding": _padding,
    **dict.fromkeys(("depth", "outputs", "input_channels", "strides", "groups"), _int),
    **dict.fromkeys(("offset", "epsilon"), _float),
    "w0": _floats,
}
