"""What element-wise operations require of the degrees of their operands and result.

A rule gets a function that records equations, the operands' degrees and the result's. It fixes the result's degree for
positive scales and for signs: relu and leaky relu keep positive scales, tanh and sine keep signs. A sum with a literal,
an exponential or a comparison of signs keeps neither, so that gelu and the like need no rule.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

from jax_scalegmn.architecture import SCALED, Scaling
from jax_scalegmn.inference._segments import Degree

# Records an equation: (the terms of sum(coefficient * degree) = 0, the groups that it holds for).
Require: TypeAlias = Callable[[Sequence[tuple[Fraction | int, Degree]], frozenset[Scaling]], None]
Rule: TypeAlias = Callable[[Require, Sequence[Degree], Degree], None]

_POSITIVE, _SIGN = frozenset({Scaling.POSITIVE}), frozenset({Scaling.SIGN})


def alike(require: Require, operands: Sequence[Degree], result: Degree, scalings: frozenset[Scaling] = SCALED) -> None:
    """A sum: every operand and the result follow a rescaling alike."""
    for degree in operands:
        require([(1, degree), (-1, result)], scalings)


def free(require: Require, operands: Sequence[Degree], result: Degree, scalings: frozenset[Scaling] = SCALED) -> None:
    """A function without a symmetry: no operand follows a rescaling."""
    for degree in (*operands, result):
        require([(1, degree)], scalings)


def product(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A product: degrees add up."""
    require([*((1, degree) for degree in operands), (-1, result)], SCALED)


def product_of_data(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A product of two values that depend on the inputs: like a square it hides the sign of both."""
    product(require, operands, result)
    require([(1, operands[0])], frozenset())


def quotient(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A quotient: the denominator's degree is subtracted."""
    numerator, denominator = operands
    require([(1, numerator), (-1, denominator), (-1, result)], SCALED)


def larger(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A maximum or minimum: a positive factor of all operands is one of the result, a sign is not."""
    alike(require, operands, result, _POSITIVE)
    free(require, operands, result, _SIGN)


def comparison(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A comparison does not change if both sides are multiplied by one positive factor."""
    first, second = operands
    require([(1, first), (-1, second)], _POSITIVE)
    require([(1, result)], _POSITIVE)
    free(require, operands, result, _SIGN)


def selection(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A selection: the first operand says which of the others is taken."""
    require([(1, operands[0])], SCALED)
    alike(require, operands[1:], result)


def odd(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """An odd function: signs pass, positive scales do not."""
    free(require, operands, result, _POSITIVE)
    alike(require, operands, result, _SIGN)


def odd_in(x: int) -> Rule:
    """The rule of a function that is odd in one operand, whatever numbers the others are."""

    def rule(require: Require, operands: Sequence[Degree], result: Degree) -> None:
        odd(require, [operands[x]], result)

    return rule


def even(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """An even function: signs do not show, positive scales do not pass."""
    free(require, operands, result, _POSITIVE)
    _hides_signs(require, operands, result)


def absolute(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """An absolute value: positive scales pass, signs do not show."""
    alike(require, operands, result, _POSITIVE)
    _hides_signs(require, operands, result)


def sign(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A sign: positive scales do not show, signs pass."""
    require([(1, result)], _POSITIVE)
    alike(require, operands, result, _SIGN)


def power(exponent: int | float | Fraction) -> Rule:
    """The rule of x ** exponent: the degree is multiplied by the exponent."""
    exact = Fraction(exponent)

    def rule(require: Require, operands: Sequence[Degree], result: Degree) -> None:
        require([(exact, operands[0]), (-1, result)], _POSITIVE)
        if exact.denominator > 1:
            free(require, operands, result, _SIGN)
        elif exact % 2:
            alike(require, operands[:1], result, _SIGN)
        else:
            _hides_signs(require, operands[:1], result)

    return rule


def cube_root(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """A cube root: the degree is divided by 3, signs pass."""
    require([(Fraction(1, 3), operands[0]), (-1, result)], _POSITIVE)
    alike(require, operands, result, _SIGN)


def _hides_signs(require: Require, operands: Sequence[Degree], result: Degree) -> None:
    """An even function. That its operand may flip holds for no group: `solve` looks for such operands."""
    require([(1, result)], _SIGN)
    require([(1, operands[0])], frozenset())


# The rules of jax.lax's primitives and those of `network.sine`. Primitives that are missing here are not known to be
# element-wise.
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any"), alike),
    "mul": product,
    "div": quotient,
    **dict.fromkeys(("max", "min", "clamp"), larger),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "atan2"), comparison),
    "select_n": selection,
    **dict.fromkeys(("tanh", "sin", "sine", "tan", "sinh", "asin", "atan", "asinh", "atanh", "erf", "erf_inv"), odd),
    **dict.fromkeys(("cos", "cosine", "cosh"), even),
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
