"""What element-wise operations ask of the degrees of their operands and result.

A rule gets the operation's equations, the layer, the operands' degrees and the result's. Each pins the result's
degree for positive scales and for signs: relu and leaky relu keep positive scales, tanh and sine keep signs, and a sum
with a literal, an exponential or a comparison of signs keeps neither, so that gelu and its like need no rule.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.inference._powers import SCALED
from jax_scalegmn.inference._segments import Degree

# (terms of an equation sum(coefficient * degree) = 0, the groups that it holds for)
Ask: TypeAlias = Callable[[Sequence[tuple[Fraction | int, Degree]], Sequence[Scaling]], None]
Rule: TypeAlias = Callable[[Ask, Sequence[Degree], Degree], None]

_POSITIVE, _SIGN = (Scaling.POSITIVE,), (Scaling.SIGN,)


def alike(ask: Ask, operands: Sequence[Degree], result: Degree, scalings: Sequence[Scaling] = SCALED) -> None:
    """A sum: every operand and the result follow a rescaling alike."""
    for degree in operands:
        ask([(1, degree), (-1, result)], scalings)


def free(ask: Ask, operands: Sequence[Degree], result: Degree, scalings: Sequence[Scaling] = SCALED) -> None:
    """A function without a symmetry: no operand follows a rescaling."""
    for degree in (*operands, result):
        ask([(1, degree)], scalings)


def product(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    ask([*((1, degree) for degree in operands), (-1, result)], SCALED)


def quotient(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    numerator, denominator = operands
    ask([(1, numerator), (-1, denominator), (-1, result)], SCALED)


def larger(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    """A maximum or minimum: a positive scale may be taken out of all operands, a sign of none."""
    alike(ask, operands, result, _POSITIVE)
    free(ask, operands, result, _SIGN)


def comparison(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    """Stays what it is if both sides get one positive factor."""
    first, second = operands
    ask([(1, first), (-1, second)], _POSITIVE)
    ask([(1, result)], _POSITIVE)
    free(ask, operands, result, _SIGN)


def selection(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    """The first operand says which of the others is taken."""
    ask([(1, operands[0])], SCALED)
    alike(ask, operands[1:], result)


def odd(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    free(ask, operands, result, _POSITIVE)
    alike(ask, operands, result, _SIGN)


def even(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    free(ask, operands, result, _POSITIVE)
    ask([(1, result)], _SIGN)


def absolute(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    alike(ask, operands, result, _POSITIVE)
    ask([(1, result)], _SIGN)


def sign(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    ask([(1, result)], _POSITIVE)
    alike(ask, operands, result, _SIGN)


def power(exponent: int | float | Fraction) -> Rule:
    """x ** exponent."""
    exact = Fraction(exponent)

    def rule(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
        ask([(exact, operands[0]), (-1, result)], _POSITIVE)
        if exact.denominator > 1:
            free(ask, operands, result, _SIGN)
        elif exact % 2:
            alike(ask, operands[:1], result, _SIGN)
        else:
            ask([(1, result)], _SIGN)

    return rule


def cube_root(ask: Ask, operands: Sequence[Degree], result: Degree) -> None:
    ask([(Fraction(1, 3), operands[0]), (-1, result)], _POSITIVE)
    alike(ask, operands, result, _SIGN)


# Of jax.lax's primitives. Those that are missing here and take one shape are not known to be element-wise.
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any"), alike),
    "mul": product,
    "div": quotient,
    **dict.fromkeys(("max", "min", "clamp"), larger),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "atan2"), comparison),
    "select_n": selection,
    **dict.fromkeys(("tanh", "sin", "tan", "sinh", "asin", "atan", "asinh", "atanh", "erf", "erf_inv"), odd),
    **dict.fromkeys(("cos", "cosh"), even),
    "abs": absolute,
    "sign": sign,
    "square": power(2),
    "sqrt": power(Fraction(1, 2)),
    "rsqrt": power(Fraction(-1, 2)),
    "cbrt": cube_root,
    **dict.fromkeys(
        (
            *("exp", "exp2", "expm1", "log", "log1p", "logistic", "erfc", "lgamma", "digamma", "acos", "acosh"),
            *("floor", "ceil", "round", "is_finite", "rem", "nextafter", "pow", "integer_pow"),
            *("not", "and", "or", "xor", "convert_element_type"),
        ),
        free,
    ),
}
