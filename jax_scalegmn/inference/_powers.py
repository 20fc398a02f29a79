"""How parameters follow a rescaling of a neuron layer: the equations of a program, solved.

Every value has a degree on each layer along its axes: scaled by s, the neurons' entries scale by s ** degree. Every
operation says how the degrees of its operands and result relate. A group acts if the equations have a solution.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from jax_scalegmn.architecture import Scaling
from jax_scalegmn.inference._segments import ANY, Degree

Unknown: TypeAlias = tuple[int, ...]
Form: TypeAlias = dict[Unknown, Fraction]

# Positive scales have degrees in the rationals; signs modulo 2, since (-1) ** 2 is 1.
SCALED = (Scaling.POSITIVE, Scaling.SIGN)


class Equation(NamedTuple):
    """sum(coefficient * degree) = 0 on one layer, for the groups that it holds for, as an operation asks for it."""

    layer: int
    terms: tuple[tuple[Fraction, Unknown], ...]
    scalings: tuple[Scaling, ...]
    operation: str


class Unknowns(NamedTuple):
    """The degrees of a layer's parameters: of the kernels that read it, that feed it, and of its vectors."""

    reads: tuple[Unknown, ...]
    feeds: tuple[Unknown, ...]
    vectors: tuple[Unknown, ...]


class Solution(NamedTuple):
    """What acts on a layer.

    Attributes:
      scaling: its group.
      powers: of every unknown of the parameters, for signs modulo 2; empty where permutations act alone.
      refused: what no solution of a larger group satisfies, by group: an operation.
      generators: how many independent rescalings there are; the powers are those of one.
      left_alone: the unknowns with power 0 that a further rescaling moves: that in front of a normalization, say.
    """

    scaling: Scaling
    powers: Mapping[Unknown, int]
    refused: Mapping[Scaling, str]
    generators: int
    left_alone: frozenset[Unknown]


def equation(
    layer: int, terms: Iterable[tuple[Fraction | int, Degree]], scalings: Sequence[Scaling], operation: str
) -> Equation | None:
    """The equation; None where a zero among the values, which has every degree, satisfies it."""
    terms = list(terms)
    if any(degree == ANY for _, degree in terms):
        return None
    known = tuple((Fraction(coefficient), degree) for coefficient, degree in terms if degree is not None)
    return Equation(layer, known, tuple(scalings), operation) if known else None


def solve(equations: Sequence[Equation], unknowns: Unknowns) -> Solution:
    """The largest group on a layer: positive scales, or else signs, or else permutations alone.

    Kernels that read the layer go against the rescaling. Where several rescalings act, that one is taken which leaves
    alone first the kernels that feed the layer, then the first vectors: behind a normalization its scale and bias.
    """
    refused: dict[Scaling, str] = {}
    for scaling in SCALED:
        system = _System(2 if scaling is Scaling.SIGN else None)
        own = [equation for equation in equations if scaling in equation.scalings]
        powers = _powers(system, own, unknowns)
        if isinstance(powers, str):
            refused[scaling] = powers
            continue
        signed = _representable(powers, unknowns, scaling)
        if signed is None:
            refused[scaling] = "a kernel that is stored [out, in], or a power other than -1, 0 and 1"
            continue
        generators, movable = _freedom(own, unknowns, system.modulus)
        return Solution(scaling, signed, refused, generators, frozenset(u for u in movable if not signed[u]))
    return Solution(Scaling.PERMUTATION, {}, refused, 0, frozenset())


# --- private ------------------------------------------------------------------------------------------------------


class _System:
    """Linear equations over the rationals, or modulo a prime, that are solved as they come."""

    def __init__(self, modulus: int | None) -> None:
        self.modulus = modulus
        self._pivots: dict[Unknown, tuple[Form, Fraction]] = {}  # unknown = sum(coefficient * free unknown) + constant

    def add(self, terms: Form, constant: Fraction | int = 0) -> bool:
        """Whether sum(coefficient * unknown) = constant agrees with the others; if so, it is one of them now."""
        form, rest = self.reduce(terms, constant)
        if not form:
            return rest == 0
        pivot = max(form)  # the newest, so that results are written in terms of what they come from
        leading = form.pop(pivot)
        inverse = 1 / leading if self.modulus is None else Fraction(pow(int(leading), -1, self.modulus))
        self._pivots[pivot] = {u: self._number(-c * inverse) for u, c in form.items()}, self._number(rest * inverse)
        return True

    def reduce(self, terms: Form, constant: Fraction | int = 0) -> tuple[Form, Fraction]:
        """The equation in the unknowns that are still free."""
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


def _powers(system: _System, equations: Sequence[Equation], unknowns: Unknowns) -> Form | str:
    """The powers of all unknowns, or the operation that has none."""
    for unknown in unknowns.reads:
        system.add({unknown: Fraction(1)}, -1)
    # The equations of the reading kernels first: then the one that fails is of what makes the group smaller.
    for equation in sorted(equations, key=lambda equation: not _terms(equation).keys() & set(unknowns.reads)):
        if not system.add(_terms(equation)):
            return f"`{equation.operation}`"
    free = (*unknowns.feeds, *unknowns.vectors)
    if not unknowns.reads:
        movable = [unknown for unknown in free if system.reduce({unknown: Fraction(1)})[0]]
        if not movable:
            return f"`{equations[-1].operation}`" if equations else "nothing that reads it"
        system.add({movable[0]: Fraction(1)}, 1)
    for unknown in free:
        system.add({unknown: Fraction(1)}, 0)
    return {unknown: -system.reduce({unknown: Fraction(1)})[1] for unknown in (*unknowns.reads, *free)}


def _representable(powers: Form, unknowns: Unknowns, scaling: Scaling) -> dict[Unknown, int] | None:
    """The powers as a `Parameter` has them: a kernel reads with -1 and feeds with 0 or 1."""
    if scaling is Scaling.SIGN:
        return {unknown: int(power) % 2 for unknown, power in powers.items()}
    allowed = {"reads": (-1,), "feeds": (0, 1), "vectors": (-1, 0, 1)}
    if any(powers[unknown] not in allowed[role] for role, some in unknowns._asdict().items() for unknown in some):
        return None
    return {unknown: int(power) for unknown, power in powers.items()}


def _freedom(equations: Sequence[Equation], unknowns: Unknowns, modulus: int | None) -> tuple[int, list[Unknown]]:
    """How many independent rescalings there are, and which unknowns any of them moves."""
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
