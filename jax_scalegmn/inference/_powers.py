"""The powers with which parameters follow a rescaling of a neuron layer: a program's equations, solved.

Every value has a degree on each layer along its axes: when the layer is scaled by s, the neurons' entries are
multiplied by s ** degree. Every operation relates the degrees of its operands and result. A group acts on the layer if
these equations have a solution.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.inference._segments import ANY_DEGREE, Degree

Unknown: TypeAlias = tuple[int, ...]
Form: TypeAlias = dict[Unknown, Fraction]

# The powers of the kernels that read the layer, in the order in which `solve` tries them. The degrees of positive
# scales are rational numbers; those of signs are numbers modulo 2, since (-1) ** 2 is 1.
_READ = {Scaling.POSITIVE: (-1,), Scaling.SIGN: (-1, 0)}


class Equation(NamedTuple):
    """sum(coefficient * degree) = 0 on one layer, for some groups, as an operation requires it.

    Without groups it requires nothing: it names the operand of an even function, whose signs are seen by nothing else.
    """

    layer: int
    terms: tuple[tuple[Fraction, Unknown], ...]
    scalings: frozenset[Scaling]
    operation: str


class Unknowns(NamedTuple):
    """The unknown degrees of a layer's parameters: of kernels by the place of its axis, and of vectors.

    A kernel's first neuron axis reads a layer and its second one feeds it, where kernels are [in, out].
    """

    reads: tuple[Unknown, ...]
    feeds: tuple[Unknown, ...]
    vectors: tuple[Unknown, ...]


class Solution(NamedTuple):
    """The group that acts on a layer, and how.

    Attributes:
      scaling: The group.
      powers: The power of every unknown of the parameters, for signs modulo 2; empty for permutations alone.
      unsigned: The unknowns of kernels that do not see the sign of a scale.
      refused: For every larger group, the operation that it fails at.
      generators: The number of independent rescalings; the powers are those of one.
      left_alone: Powers set to 0 although another admissible rescaling would move them, e.g. a kernel before a
        normalization.
    """

    scaling: Scaling
    powers: Mapping[Unknown, int]
    refused: Mapping[Scaling, str]
    generators: int
    left_alone: frozenset[Unknown]
    unsigned: frozenset[Unknown] = frozenset()


def equation(
    layer: int, terms: Iterable[tuple[Fraction | int, Degree]], scalings: frozenset[Scaling], operation: str
) -> Equation | None:
    """The equation; None if one of the values is a zero, which has every degree and so satisfies it."""
    terms = list(terms)
    if any(degree == ANY_DEGREE for _, degree in terms):
        return None
    known = tuple((Fraction(coefficient), degree) for coefficient, degree in terms if degree is not None)
    return Equation(layer, known, scalings, operation) if known else None


def solve(equations: Sequence[Equation], unknowns: Unknowns, *, turned: bool = False) -> Solution:
    """The largest group on a layer: positive scales with signs, either of the two, or permutations alone.

    Kernels that read the layer have power -1; or 0, if only signs that nothing after an even activation sees are left,
    as of w and b in cos(x @ w + b) @ v. If several rescalings act, the solution is the one with power 0 on the
    kernels that feed the layer, if possible, then on the first vectors: with a normalization, only its scale and bias
    are moved. With `turned`, kernels are [out, in]: those that read the layer have power 1, the rest follows.
    """
    refused: dict[Scaling, str] = {}
    for around in (True, False) if turned else (False,):
        sizes, signs = (_of_one(scaling, equations, unknowns, around, refused) for scaling in _READ)
        if sizes and signs and (both := _joined(sizes, signs)):
            return both
        if (one := sizes or signs) is not None:
            return one
    return Solution(Scaling.PERMUTATION, {}, refused, 0, frozenset())


def moving(equations: Sequence[Equation], value: Unknown, parameters: Sequence[Unknown]) -> dict[Unknown, int]:
    """The powers of the parameters that multiply one value of the program by a number; {} if none do.

    Args:
      equations: Those of the operations that compute the value, on its layer.
      value: The value's degree.
      parameters: The degrees of the layer's parameters: power 0 is preferred for the first.
    """
    system = _System(None)
    for equation in equations:
        if Scaling.POSITIVE in equation.scalings and not system.add(_terms(equation)):
            return {}
    if not system.add({value: Fraction(1)}, 1):
        return {}
    for unknown in parameters:
        system.add({unknown: Fraction(1)}, 0)
    powers = {unknown: system.reduce({unknown: Fraction(1)})[1] for unknown in parameters}
    if any(power.denominator != 1 for power in powers.values()):
        return {}
    return {unknown: -int(power) for unknown, power in powers.items() if power}


# --- private ------------------------------------------------------------------------------------------------------


def _of_one(
    scaling: Scaling, equations: Sequence[Equation], unknowns: Unknowns, around: bool, refused: dict[Scaling, str]
) -> Solution | None:
    """How positive scales or signs act, if they do; else the operation that they fail at is added to `refused`."""
    own = [equation for equation in equations if scaling in equation.scalings]
    even = [_terms(equation) for equation in equations if not equation.scalings]
    ends = unknowns._replace(reads=unknowns.feeds, feeds=unknowns.reads) if around else unknowns
    for read in _READ[scaling]:
        system = _System(2 if scaling is Scaling.SIGN else None)
        powers = _powers(system, own, ends, -read if around else read, even)
        if isinstance(powers, str):
            refused.setdefault(scaling, powers)
            continue
        signed = _representable(powers, ends, scaling, turned=around)
        if signed is None:
            stored = all(power in (-1, 0, 1) for power in powers.values())
            refused.setdefault(
                scaling, "a kernel that is stored [out, in]" if stored else "a power other than -1, 0 and 1"
            )
            continue
        generators, movable = _freedom(own, unknowns, system.modulus)
        alone = frozenset(unknown for unknown in movable if not signed[unknown])
        return Solution(scaling, signed, refused, generators, alone, frozenset() if read else frozenset(ends.reads))
    return None


def _joined(sizes: Solution, signs: Solution) -> Solution | None:
    """Positive scales together with signs; None if a sign moves what no positive scale moves, which no axis says."""
    if any(signs.powers[unknown] and not power for unknown, power in sizes.powers.items()):
        return None
    unsigned = frozenset(unknown for unknown, power in sizes.powers.items() if power and not signs.powers[unknown])
    return sizes._replace(scaling=Scaling.NONZERO, unsigned=unsigned)


class _System:
    """Linear equations over the rationals, or modulo a prime, that are solved one after another."""

    def __init__(self, modulus: int | None) -> None:
        self.modulus = modulus
        self._pivots: dict[Unknown, tuple[Form, Fraction]] = {}  # unknown = sum(coefficient * free unknown) + constant

    def add(self, terms: Form, constant: Fraction | int = 0) -> bool:
        """Adds sum(coefficient * unknown) = constant; returns False if it contradicts the equations so far."""
        form, rest = self.reduce(terms, constant)
        if not form:
            return rest == 0
        pivot = max(form)  # the newest, so that results are written in terms of what they come from
        leading = form.pop(pivot)
        inverse = 1 / leading if self.modulus is None else Fraction(pow(int(leading), -1, self.modulus))
        self._pivots[pivot] = {u: self._number(-c * inverse) for u, c in form.items()}, self._number(rest * inverse)
        return True

    def reduce(self, terms: Form, constant: Fraction | int = 0) -> tuple[Form, Fraction]:
        """The equation in terms of the unknowns that are still free."""
        form: Form = {}
        rest = Fraction(constant)
        for unknown, coefficient in terms.items():
            if unknown in self._pivots:
                others, value = self._pivots[unknown]
                if others.keys() & self._pivots.keys():
                    others, negative = self.reduce(others)
                    value -= negative
                    self._pivots[unknown] = others, self._number(value)
                rest -= coefficient * value
                for other, c in others.items():
                    form[other] = form.get(other, Fraction(0)) + coefficient * c
            else:
                form[unknown] = form.get(unknown, Fraction(0)) + coefficient
        form = {unknown: self._number(c) for unknown, c in form.items() if self._number(c)}
        return form, self._number(rest)

    def _number(self, value: Fraction) -> Fraction:
        return value if self.modulus is None else value % self.modulus


def _terms(equation: Equation) -> Form:
    terms: Form = {}
    for coefficient, degree in equation.terms:
        terms[degree] = terms.get(degree, Fraction(0)) + coefficient
    return terms


def _powers(
    system: _System, equations: Sequence[Equation], unknowns: Unknowns, read: int, even: Sequence[Form]
) -> Form | str:
    """The powers of all unknowns, or the operation at which there is no solution.

    Kernels that read the layer have the degree `read`. If it is 0, one of the operands of `even` functions must flip.
    """
    for unknown in unknowns.reads:
        system.add({unknown: Fraction(1)}, read)
    # The equations of the reading kernels come first, so that the one that fails names the operation that makes the
    # group smaller.
    for equation in sorted(equations, key=lambda equation: not _terms(equation).keys() & set(unknowns.reads)):
        if not system.add(_terms(equation)):
            return f"`{equation.operation}`"
    free = (*unknowns.feeds, *unknowns.vectors)
    if not read and not any(system.add(operand, 1) for operand in even):
        return "every operation that would hide it"
    if not unknowns.reads:
        movable = [unknown for unknown in free if system.reduce({unknown: Fraction(1)})[0]]
        if not movable:
            return f"`{equations[-1].operation}`" if equations else "nothing that reads it"
        system.add({movable[0]: Fraction(1)}, 1)
    for unknown in free:
        system.add({unknown: Fraction(1)}, 0)
    return {unknown: -system.reduce({unknown: Fraction(1)})[1] for unknown in (*unknowns.reads, *free)}


def _representable(powers: Form, unknowns: Unknowns, scaling: Scaling, *, turned: bool) -> dict[Unknown, int] | None:
    """The powers, if a `Parameter` can have them: a kernel reads with -1 and feeds with 0 or 1, `turned` negatively."""
    if scaling is Scaling.SIGN:
        return {unknown: int(power) % 2 for unknown, power in powers.items()}
    allowed = {"reads": (1,) if turned else (-1,), "feeds": (-1, 0) if turned else (0, 1), "vectors": (-1, 0, 1)}
    if any(powers[unknown] not in allowed[role] for role, some in unknowns._asdict().items() for unknown in some):
        return None
    return {unknown: int(power) for unknown, power in powers.items()}


def _freedom(equations: Sequence[Equation], unknowns: Unknowns, modulus: int | None) -> tuple[int, list[Unknown]]:
    """The number of independent rescalings, and the unknowns that they move."""
    system = _System(modulus)
    for equation in equations:
        system.add(_terms(equation))
    every = [unknown for role in unknowns for unknown in role]
    movable = [unknown for unknown in every if system.reduce({unknown: Fraction(1)})[0]]
    count = 0
    for unknown in movable:
        if system.reduce({unknown: Fraction(1)})[0]:
            system.add({unknown: Fraction(1)})
            count += 1
    return count, movable
